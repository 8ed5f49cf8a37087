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
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lad_dist.config.errors import Fault, UserError
from lad_dist.distributed.slurm import launcher_variables, slurm_variable

T = TypeVar("T")

_stop_requested = False
_control: Any = None  # a gloo group: agreeing on a flag must not wait for the accelerator
# Seconds at the end in which gloo's threads let go of the tensors that they worked on, which they do just after saying
# that they are done. An interpreter that goes before them aborts (github.com/pytorch/pytorch/pull/179291).
GLOO_RELEASE_SECONDS = 0.25


def world_size() -> int:
    """Number of processes, also before `start`."""
    return int(os.environ.get("WORLD_SIZE") or slurm_variable("STEP_NUM_TASKS") or 1)


def rank() -> int:
    return int(os.environ.get("RANK") or (slurm_variable("PROCID") if slurm_variable("STEP_NUM_TASKS") else None) or 0)


def local_rank() -> int:
    """Among the processes of this host."""
    return int(
        os.environ.get("LOCAL_RANK") or (slurm_variable("LOCALID") if slurm_variable("STEP_NUM_TASKS") else None) or 0
    )


def is_main() -> bool:
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
    for name, value in launcher_variables().items():
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
        if world_size() > 1:
            atexit.register(time.sleep, GLOO_RELEASE_SECONDS)
    return where


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **_meeting())
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = " and ".join(f"{name} = {os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).strip().splitlines()[0][:100]
        if "EADDRINUSE" in str(error) and not slurm_variable("JOB_ID"):
            raise UserError(f"{where}: the processes cannot meet there ({reason}); take another port") from None
        raise Fault(f"{where}: the processes did not meet there ({reason})") from None


def _meeting() -> dict[str, Any]:
    """One process meets nobody: it opens no port, which another process could take before it does."""
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size() == 1 else {}


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
    _stop_requested = False
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _request_stop)


def _request_stop(*_: Any) -> None:
    global _asked_to_stop
    _stop_requested = True


def stop_requested() -> bool:
    return _stop_requested


def any_of(flag: bool) -> bool:
    """True on all processes when it is true on one."""
    return any_of_each(flag)[0]


def any_of_each(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process: one exchange for all of them."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_control)
    return [bool(value) for value in values.tolist()]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_control)


def from_main(value: T) -> T:
    """The main process's value, on all processes."""
    return on_main(lambda: value)


def on_main(work: Callable[[], T]) -> T:
    """Does the work on the main process; what it returns or raises, all processes return or raise."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_main():
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
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def means(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars averaged over the processes: one transfer from the device for all of them."""
    if not values:
        return {}
    stacked = torch.stack(
        [v.detach().double() if v.device.type == "cpu" else v.detach().float() for v in values.values()]
    )
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, on each of them."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=_control)
    return box


def seed_everything(*key: int) -> None:
    """All generators as a function of the key: same key, same dropout and new weights, on any process."""
    word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.manual_seed(word)
