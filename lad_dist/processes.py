"""Processes: who am I among how many, on which device, and what do we agree on.

Everything comes from the environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which `deepspeed`,
`torchrun` and Ray set alike; under a bare `srun` they are derived from SLURM's own variables, and without any launcher
the world is this one process. This is the only module that reads SLURM_*.

    check_environment()          refuses variables that say nonsense, before anything goes by them
    start()                      joins the group, once; returns the device
    rank, local_rank, world, main, device
                                 plain answers
    barrier, any_of, each_of, average, mean_of, gather, from_main, on_main
                                 what all processes agree on
    asked_to_stop()              whether this one was (SIGTERM, SIGUSR1)
    seed_everything(*key)        randomness as a function of (seed, step, slot)
"""

import atexit
import contextlib
import ctypes
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lad_dist.config.errors import Fault, UserError

T = TypeVar("T")

_asked_to_stop = False
_control: Any = None  # a gloo group: agreeing on a flag must not wait for the accelerator


# An index, or NVIDIA's name of a device or of a part of one; what hides them all.
DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
# Seconds at the end in which gloo's threads let go of the tensors that they worked on, which they do just after saying
# that they are done. An interpreter that goes before them aborts (github.com/pytorch/pytorch/pull/179291).
LET_GO = 0.25
NO_DEVICE = ("", "-1", "none", "nodevfiles", "void")


def check_environment() -> None:
    """Raises UserError for a variable of the environment that says nonsense, or lacks another that it needs."""
    _check_numbers("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    _check_numbers(*(f"SLURM_{name}" for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID", "JOB_ID")))
    _check_world()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", threads):
        raise UserError(f"OMP_NUM_THREADS = {threads!r} is no number of threads; set it to one, or unset it")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    wrong = [name for name in visible.split(",") if not DEVICE.fullmatch(name.strip())]
    if wrong and visible.lower() not in NO_DEVICE:
        raise UserError(f"CUDA_VISIBLE_DEVICES = {visible!r}: {wrong[0]!r} is no device; list numbers such as 0,1")
    folder = os.environ.get("TMPDIR")
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"TMPDIR = {folder!r} is no folder that can be written; make it, or unset TMPDIR")


def _check_numbers(*names: str) -> None:
    for name in names:
        value = os.environ.get(name)
        if value and not re.fullmatch(r"\d{1,9}", value):
            raise UserError(f"{name} = {value!r} is not a whole number; unset it, or let a launcher set it")


def _check_world() -> None:
    set_ = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if bool(set_["RANK"]) != bool(set_["WORLD_SIZE"]):
        there, lacking = ("RANK", "WORLD_SIZE") if set_["RANK"] else ("WORLD_SIZE", "RANK")
        raise UserError(f"{there} is set and {lacking} is not; unset it, or start with deepspeed, torchrun or srun")
    if world() < 1 or rank() >= world():
        raise UserError(f"RANK = {rank()}, but the {world()} processes of WORLD_SIZE are numbered from 0; mend one")
    if world() > 1 and set_["WORLD_SIZE"]:
        lacking_names = [name for name, value in set_.items() if not value]
        if lacking_names:
            raise UserError(f"{lacking_names[0]} is not set, and {world()} processes need it; let a launcher set it")
        if not 0 < int(set_["MASTER_PORT"] or 0) < 65536:
            raise UserError(f"MASTER_PORT = {set_['MASTER_PORT']} is no port; give one from 1024 to 65535")


def world() -> int:
    """Number of processes, also before `start`."""
    return int(os.environ.get("WORLD_SIZE") or _slurm("STEP_NUM_TASKS") or 1)


def rank() -> int:
    return int(os.environ.get("RANK") or (_slurm("PROCID") if _slurm("STEP_NUM_TASKS") else None) or 0)


def local_rank() -> int:
    """Among the processes of this host."""
    return int(os.environ.get("LOCAL_RANK") or (_slurm("LOCALID") if _slurm("STEP_NUM_TASKS") else None) or 0)


def main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def device() -> torch.device:
    """Of this process. DeepSpeed's DS_ACCELERATOR=cpu leaves GPUs alone."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def device_name() -> str:
    where = device()
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"


def start() -> torch.device:
    """Joins the process group and prepares this process for training. Calling it again changes nothing."""
    global _control
    for name, value in _environment().items():
        os.environ.setdefault(name, value)
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        _keep_memory()
    if not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        _join(backend)
    if _control is None:
        _control = dist.new_group(backend="gloo")
        if world() > 1:
            atexit.register(time.sleep, LET_GO)
    return where


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **_meeting())
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = " and ".join(f"{name} = {os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).strip().splitlines()[0][:100]
        if "EADDRINUSE" in str(error) and not _slurm("JOB_ID"):
            raise UserError(f"{where}: the processes cannot meet there ({reason}); take another port") from None
        raise Fault(f"{where}: the processes did not meet there ({reason})") from None


def _meeting() -> dict[str, Any]:
    """One process meets nobody: it opens no port, which another process could take before it does."""
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world() == 1 else {}


def _slurm(name: str) -> str | None:
    return os.environ.get(f"SLURM_{name}")


def _environment() -> dict[str, str]:
    """RANK and its companions for a process that no launcher set up."""
    if not _slurm("STEP_NUM_TASKS") or _slurm("STEP_NUM_TASKS") == "1":
        return {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        }  # fmt: skip
    needed = ("PROCID", "LOCALID", "STEP_NODELIST", "JOB_ID")
    lacking = [name for name in needed if not _slurm(name)]
    if lacking:
        raise UserError(f"SLURM_STEP_NUM_TASKS is set and SLURM_{lacking[0]} is not; start the processes with srun")
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
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: scontrol names no host of it; set MASTER_ADDR") from None


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: a step on the CPU otherwise spends much of its time on page faults, giving
    gradients back to the system and mapping them anew."""
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def catch_signals() -> None:
    """SIGTERM and SIGUSR1 ask for a stop at the end of a step instead of ending the process. A search's trial runs in a
    thread, where Tune decides on its end."""
    global _asked_to_stop
    _asked_to_stop = False
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _ask_to_stop)


def _ask_to_stop(*_: Any) -> None:
    global _asked_to_stop
    _asked_to_stop = True


def asked_to_stop() -> bool:
    return _asked_to_stop


def any_of(flag: bool) -> bool:
    """True on all processes when it is true on one."""
    return each_of(flag)[0]


def each_of(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process: one exchange for all of them."""
    if world() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_control)
    return [bool(value) for value in values.tolist()]


def barrier() -> None:
    if world() > 1:
        dist.barrier(group=_control)


def from_main(value: T) -> T:
    """The main process's value, on all processes."""
    return on_main(lambda: value)


def on_main(work: Callable[[], T]) -> T:
    """Does the work on the main process; what it returns or raises, all processes return or raise."""
    if world() == 1:
        return work()
    box: list[Any] = [None, None]
    if main():
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=_control)
    if box[1] is not None:
        raise box[1]
    return box[0]


def average(x: torch.Tensor) -> torch.Tensor:
    """The tensor averaged over the processes, without waiting for the device."""
    if world() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world()


def mean_of(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars averaged over the processes: one transfer from the device for all of them."""
    if not values:
        return {}
    stacked = torch.stack(
        [v.detach().double() if v.device.type == "cpu" else v.detach().float() for v in values.values()]
    )
    if world() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world()).tolist(), strict=True))


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, on each of them."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value, group=_control)
    return box


def seed_everything(*key: int) -> None:
    """All generators as a function of the key: same key, same dropout and new weights, on any process."""
    word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.manual_seed(word)
