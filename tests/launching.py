"""Starts real training processes: the way users do, and cheaper."""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import training_worker

from lad_dist.cli.errors import one_line_errors
from lad_dist.cli.main import main

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Processes from one that has imported what takes seconds. It is one for all tests, and so is what it imports.
FORKS = multiprocessing.get_context("forkserver")
# Those below the first line are imported where they are used, by most runs; the last one has torch import its compiler.
FORKS.set_forkserver_preload(
    [
        "lad_dist.training.train", "lad_dist.data.shards.prepare", "pytest", "hypothesis", "tomli_w",
        "lad_dist.cli.main", "lad_dist.runs.plots", "matplotlib.image",
        "scipy.stats", "scipy.spatial.distance", "sklearn.metrics",
        "transformers.models.bert.modeling_bert", "deepspeed.runtime.zero.muon.original_muon",
    ]
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(process: int) -> bool:
    """Whether it runs: a process that waits for its parent to take notice does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def launcher(name: str, processes: int) -> list[str]:
    port = str(free_port())
    return {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", str(processes), "--master-port", port],
    }[name]


def environment() -> dict[str, str]:
    """What a user's shell would hold: this Python, and no launcher's variables."""
    variables = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    return variables


def launch(
    command: Sequence[str | Path], *, by: str = "python", processes: int = 1, timeout: float = 1200, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    words = [*launcher(by, processes), *map(str, command)]
    return subprocess.run(words, cwd=cwd, env=environment(), timeout=timeout, text=True, capture_output=True)


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(work: Callable[..., None], *arguments: Any, folder: Path, processes: int) -> None:
    """Call `work` in ranks that torchrun would start alike, but that need not import first what it imports.

    As under torchrun, a rank that fails ends the others. The folder takes what they print.
    """
    ranks = start_ranks(work, *arguments, folder=folder, processes=processes)
    try:
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
            assert wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=1200)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    outputs = "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob("stderr-*")))
    assert [rank.exitcode for rank in ranks] == [0] * processes, outputs


def start_ranks(work: Callable[..., None], *arguments: Any, folder: Path, processes: int) -> list[ForkServerProcess]:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks: list[ForkServerProcess] = []
    for rank in range(processes):
        variables = rank_variables(rank, processes, port) | {"DS_ACCELERATOR": "cpu"}
        ranks.append(FORKS.Process(target=_rank, args=(folder / f"stderr-{rank}", variables, work, arguments)))
        ranks[-1].start()
    return ranks


class ForkedScript:
    """A script that runs in a session of its own, as a user starts it, but need not import first what it imports."""

    def __init__(self, script: Path, *words: str | Path, folder: Path, variables: Mapping[str, str] | None = None):
        """Start it.

        Args:
            script: to run.
            words: its arguments.
            folder: takes what it prints.
            variables: of the environment, beside those of `environment`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / "stdout", folder / "stderr"]
        arguments = (self._outputs, environment() | dict(variables or {}), script, [str(word) for word in words])
        self._process = FORKS.Process(target=_script, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None as long as it runs, and -9 where SIGKILL ended it."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; return what it printed on standard output and on standard error."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it still runs"
        out, error = (path.read_text() for path in self._outputs)
        return out, error


def _script(outputs: Sequence[Path], variables: Mapping[str, str], script: Path, words: Sequence[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(ROOT)
    gc.freeze()
    run_script(script, *words)


def run_script(script: Path, *words: str) -> None:
    """Run the script in this process as its main program."""
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def _rank(output: Path, variables: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    gc.freeze()  # what is imported stays, and `train` collects garbage at its start
    work(*arguments)


def curves(folder: Path, configs: dict[str, dict[str, Any]], *, processes: int) -> dict[str, list[dict[str, Any]]]:
    """Trains the configs in `processes` processes; their rows by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.toml" for name in configs]
    for path, tables in zip(paths, configs.values(), strict=True):
        path.write_text(tomli_w.dumps(tables))
    run_ranks(training_worker.train_all, folder / "rows.json", paths, folder=folder, processes=processes)
    return json.loads((folder / "rows.json").read_text())


def run_command(*arguments: str) -> int:
    """The exit code of `lad-dist COMMAND …`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lad-dist", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def exit_code(function: Callable[[], int | None]) -> int:
    """The exit code of a script that calls the function."""
    with pytest.raises(SystemExit) as ended, one_line_errors():
        sys.exit(function())
    return int(ended.value.code or 0)
