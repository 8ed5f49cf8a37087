"""Starts real training processes the way users do."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lad_dist.cli.errors import one_line_errors
from lad_dist.cli.main import main

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Processes from one that has imported what takes seconds. It is one for all tests, and so is what it imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lad_dist.training.train", "lad_dist.data.shards.prepare", "pytest", "hypothesis"])


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


def curves(
    folder: Path, configs: dict[str, dict[str, Any]], *, by: str = "torchrun", processes: int
) -> dict[str, list[dict]]:
    """Trains the configs in `processes` processes; their rows by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, tables in configs.items():
        paths.append(folder / f"{name}.toml")
        paths[-1].write_text(tomli_w.dumps(tables))
    done = launch([ROOT / "tests" / "training_worker.py", folder / "rows.json", *paths], by=by, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
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
