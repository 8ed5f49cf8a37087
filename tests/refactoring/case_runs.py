"""Runs of a case in a tree, on one core, in processes of their own: nothing here imports lad_dist."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cases import Case

LONGEST = 600  # seconds of a run
TAIL = 12  # lines of a run that failed
# Variables of the environment that runs do not get: a launcher's, and those of another tree.
WITHHELD = re.compile("RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_.*|PYTHONPATH")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


class RunFailed(Exception):
    """The end of what it printed."""


class Tree(NamedTuple):
    """`folder` holds launch/, configs/ and lad_dist/; the runs lie in `work`, beside the folder `inputs`."""

    name: str
    folder: Path
    work: Path


def run(case: Case, tree: Tree) -> Path:
    """Run a case and return the folder that it wrote."""
    log = tree.work / "logs" / f"{case.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    overrides = [f"{key}={in_toml(value)}" for key, value in case.overrides.items()]
    command = [sys.executable, *(launcher if case.processes > 1 else [])]
    script = tree.folder / case.script
    # From the commit on that made it a command of lad-dist, a tree has no script of that name.
    program = [str(script)] if script.exists() else ["-m", "lad_dist.cli", script.stem.replace("_", "-")]
    command += [*program, str(tree.folder / case.config), *overrides]
    inherited = {name: value for name, value in os.environ.items() if not WITHHELD.fullmatch(name)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**inherited, **ENVIRONMENT, "PATH": path, "PYTHONPATH": str(tree.folder)}
    with log.open("w") as printed:
        done = subprocess.run(
            ["timeout", str(LONGEST), *command], cwd=tree.work, env=environment, stdout=printed, stderr=printed
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        lines = [f"{case.name} at {tree.name}: exit code {done.returncode}", *(f"    {line}" for line in last)]
        raise RunFailed("\n".join(lines))
    return tree.work / case.folder


def losses(folder: Path) -> list[float]:
    """Return the curve of a run."""
    return [row["loss"] for row in rows(folder) if "loss" in row]


def rows(folder: Path) -> list[dict[str, float]]:
    """Return what a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def in_toml(value: Any) -> str:
    """Return a value as a command line has it: TOML in a line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {in_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_toml, value)) + "]"
    return json.dumps(value)
