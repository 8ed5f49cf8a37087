"""Processes: who am I among how many, on which device, and what do we agree on.

Everything comes from the environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which `deepspeed`,
`torchrun` and Ray set alike; under a bare `srun` they are derived from SLURM's own variables, and without any launcher
the world is this one process. This is the only module that reads SLURM_*.

    start()                      joins the group, once; returns the device
    rank, world, main, device    plain answers
    barrier, any_of, each_of, average, mean_of, gather, from_main, on_main
                                 what all processes agree on
    asked_to_stop()              whether this one was (SIGTERM, SIGUSR1)
    seed_everything(*key)        randomness as a function of (seed, step, slot)
"""

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")

_asked_to_stop = False
_control: Any = None  # a gloo group: agreeing on a flag must not wait for the accelerator


def world() -> int:
    """Number of processes, also before `start`."""
    return int(os.environ.get("WORLD_SIZE") or _slurm("STEP_NUM_TASKS") or 1)


def rank() -> int:
    return int(os.environ.get("RANK") or (_slurm("PROCID") if _slurm("STEP_NUM_TASKS") else None) or 0)


def main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


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
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **_meeting())
    if _control is None:
        _control = dist.new_group(backend="gloo")
    return where


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
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(10_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000),
    }


def _first_host(nodes: str) -> str:
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


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
