"""The environment variables that SLURM sets; only this module reads them."""

import os
import subprocess

from lad_dist.config.errors import UserError


def slurm_variable(name: str) -> str | None:
    """Return the value of SLURM_`name`, None where it is not set."""
    return os.environ.get(f"SLURM_{name}")


def launcher_variables() -> dict[str, str]:
    """Return RANK, WORLD_SIZE and the like for a process that no launcher but srun started."""
    if slurm_variable("STEP_NUM_TASKS") in (None, "", "1"):
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name in ("PROCID", "LOCALID", "STEP_NODELIST", "JOB_ID"):
        if not slurm_variable(name):
            raise UserError(f"SLURM_STEP_NUM_TASKS is set and SLURM_{name} is not; start the processes with srun")
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(10_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000),
    }


def _first_host(nodes: str) -> str:
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: scontrol names none of the hosts; set MASTER_ADDR") from None
