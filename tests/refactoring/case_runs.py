"""Runs of a case in a tree, one at a time on one core, and what they leave.

    running()            the Python that runs them
    Tree                 a commit's files, and the folder in which its runs lie
    run, prepare         a case, or a preparation, in a tree; raise RunFailed
    losses(case, tree)   the curve of a case

Nothing here imports lad_dist: each tree has another one.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case, Preparation

LONGEST = 600  # seconds of a run
TAIL = 12  # lines of a run that failed
# Variables of the environment that runs do not get: a launcher's, and those of another tree.
WITHHELD = re.compile("RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_.*|PYTHONPATH")


class RunFailed(Exception):
    """The end of what it printed."""


@dataclass(frozen=True)
class Tree:
    """`folder` holds launch/, configs/ and lad_dist/; the runs lie in `work`, beside the folder `inputs`."""

    name: str
    folder: Path
    work: Path
    python: "subprocess.Popen[str]"


@contextlib.contextmanager
def running() -> Iterator["subprocess.Popen[str]"]:
    """A warm_python.py."""
    command = [sys.executable, str(Path(__file__).with_name("warm_python.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment(), text=True) as python:
        yield python
        assert python.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            python.stdin.close()


def environment() -> dict[str, str]:
    """One core, no GPU, no hub, no bytecode in the tree."""
    changes = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return {name: value for name, value in os.environ.items() if not WITHHELD.fullmatch(name)} | changes


def prepare(preparation: Preparation, tree: Tree) -> Path:
    """The folder that it wrote."""
    _run(preparation, tree)
    return tree.work / preparation.folder


def run(case: Case, tree: Tree) -> Path:
    """The run's folder, complete."""
    _run(case, tree, case.processes)
    return tree.work / "runs" / case.name


def losses(case: Case, tree: Tree) -> list[float]:
    return [row["loss"] for row in rows(run(case, tree)) if "loss" in row]


def rows(folder: Path) -> list[dict[str, float]]:
    """What a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def in_toml(value: Any) -> str:
    """A value as a command line has it: TOML in a line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {in_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_toml, value)) + "]"
    return json.dumps(value)


def _run(case: Case | Preparation, tree: Tree, processes: int = 1) -> None:
    log = tree.work / "logs" / f"{case.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    script, overrides = str(tree.folder / case.script), (f"{key}={in_toml(x)}" for key, x in case.overrides.items())
    arguments = [str(tree.folder / case.config), *overrides]
    if processes == 1:
        code = _launch_one(script, arguments, tree, log)
    else:
        code = _launch_several(script, arguments, tree, log, processes)
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        raise RunFailed("\n".join([f"{case.name} at {tree.name}: exit code {code}", *(f"    {line}" for line in last)]))


def _launch_one(script: str, arguments: list[str], tree: Tree, log: Path) -> int:
    folders = {"tree": tree.folder, "folder": tree.work, "log": log, "bytecode": tree.work / "bytecode"}
    paths = {name: str(path) for name, path in folders.items()}
    job = {"script": script, "arguments": arguments, "seconds": LONGEST, **paths}
    assert tree.python.stdin is not None
    assert tree.python.stdout is not None
    answer = ""
    with contextlib.suppress(BrokenPipeError):
        tree.python.stdin.write(json.dumps(job) + "\n")
        tree.python.stdin.flush()
        answer = tree.python.stdout.readline()
    if not answer:
        raise RunFailed("warm_python.py has ended, and says why on standard error")
    return int(answer)


def _launch_several(script: str, arguments: list[str], tree: Tree, log: Path, processes: int) -> int:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, script, *arguments]
    changed = environment() | {"PYTHONPATH": str(tree.folder)}
    with (
        log.open("w") as printed,
        subprocess.Popen(command, cwd=tree.work, env=changed, stdout=printed, stderr=printed) as process,
    ):
        try:
            return process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends those that it started
            return process.wait()
