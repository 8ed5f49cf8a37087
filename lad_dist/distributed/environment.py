"""Checks of the environment variables that launchers set, before anything reads them."""

import os
import re

from lad_dist.config.errors import UserError
from lad_dist.distributed.ranks import rank, world_size

DEVICE_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")  # an index, or NVIDIA's name of a device or of a slice of one
NO_DEVICES = ("", "-1", "none", "nodevfiles", "void")  # values that hide all devices
NUMBERS = "RANK LOCAL_RANK WORLD_SIZE MASTER_PORT SLURM_STEP_NUM_TASKS SLURM_PROCID SLURM_LOCALID SLURM_JOB_ID".split()


def check_environment() -> None:
    """Raise UserError where an environment variable has no valid value, or where one that it needs is not set."""
    for name in NUMBERS:
        value = os.environ.get(name)
        if value and not re.fullmatch(r"\d{1,9}", value):
            raise UserError(f"{name} = {value!r} is not a whole number; unset it, or let a launcher set it")
    _check_world()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", threads):
        raise UserError(f"OMP_NUM_THREADS = {threads!r} is not a number of threads; set it to one, or unset it")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    wrong = [name for name in visible.split(",") if not DEVICE_NAME.fullmatch(name.strip())]
    if wrong and visible.lower() not in NO_DEVICES:
        raise UserError(f"CUDA_VISIBLE_DEVICES = {visible!r}: {wrong[0]!r} is not a device; list numbers such as 0,1")
    folder = os.environ.get("TMPDIR")
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"TMPDIR = {folder!r} is not a writable folder; create it, or unset TMPDIR")


def _check_world() -> None:
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if bool(values["RANK"]) != bool(values["WORLD_SIZE"]):
        present, missing = ("RANK", "WORLD_SIZE") if values["RANK"] else ("WORLD_SIZE", "RANK")
        raise UserError(f"{present} is set and {missing} is not; unset it, or start with deepspeed, torchrun or srun")
    if world_size() < 1 or rank() >= world_size():
        raise UserError(
            f"RANK = {rank()}, but the {world_size()} processes of WORLD_SIZE are numbered from 0; correct one of them"
        )
    if world_size() > 1 and values["WORLD_SIZE"]:
        for name, value in values.items():
            if not value:
                raise UserError(f"{name} is not set, and {world_size()} processes need it; let a launcher set it")
        if not 0 < int(values["MASTER_PORT"] or 0) < 65536:
            raise UserError(f"MASTER_PORT = {values['MASTER_PORT']} is not a port; set one from 1024 to 65535")
