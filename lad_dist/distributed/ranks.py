"""Which process this is, from the environment alone: without torch, for what has to answer at once."""

import os

from lad_dist.distributed.slurm import slurm_variable


def world_size() -> int:
    """Return the number of processes, also before they meet."""
    return int(os.environ.get("WORLD_SIZE") or slurm_variable("STEP_NUM_TASKS") or 1)


def rank() -> int:
    """Return the number of this process among all."""
    return int(os.environ.get("RANK") or _srun_variable("PROCID") or 0)


def local_rank() -> int:
    """Return the number of this process among those of this host."""
    return int(os.environ.get("LOCAL_RANK") or _srun_variable("LOCALID") or 0)


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def _srun_variable(name: str) -> str | None:
    """Return a variable that SLURM sets for each process; those of a job without a step mean nothing."""
    return slurm_variable(name) if slurm_variable("STEP_NUM_TASKS") else None
