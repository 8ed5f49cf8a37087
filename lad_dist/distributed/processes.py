"""The processes of a run: ranks, devices, collectives, signals and seeds.

Everything comes from the environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which `deepspeed`,
`torchrun` and Ray set alike. Under a bare `srun` they are derived from SLURM's own variables (slurm.py). Without any
launcher the world is this one process.
"""

import atexit
import contextlib
import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lad_dist.config.errors import Fault, UserError
from lad_dist.distributed.ranks import is_main, local_rank, world_size
from lad_dist.distributed.slurm import launcher_variables, slurm_variable
from lad_dist.utils.text import first_line

T = TypeVar("T")

_stop_requested = False
_control_group: Any = None  # a gloo group: agreeing on a flag must not wait for the accelerator
# Seconds at the end for gloo's threads to release the tensors that they worked on: they do so just after they report
# completion. An interpreter that exits before them aborts (github.com/pytorch/pytorch/pull/179291).
GLOO_RELEASE_SECONDS = 0.25


def device() -> torch.device:
    """Return the device of this process: the CPU where DeepSpeed's DS_ACCELERATOR says so, or without a GPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def device_name() -> str:
    """Return the name of the GPU, or "cpu"."""
    current = device()
    return torch.cuda.get_device_name(current) if current.type == "cuda" else "cpu"


def start() -> torch.device:
    """Join the process group and prepare this process for training; a second call changes nothing."""
    global _control_group
    for name, value in launcher_variables().items():
        os.environ.setdefault(name, value)
    own_device = device()
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    else:
        _keep_memory()
    if not dist.is_initialized():
        _join("nccl" if own_device.type == "cuda" else "gloo")
    if _control_group is None:
        _control_group = dist.new_group(backend="gloo")
        if world_size() > 1:
            atexit.register(time.sleep, GLOO_RELEASE_SECONDS)
    return own_device


def _join(backend: str) -> None:
    # A process alone opens no port, which another process could take before it does.
    store: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size() == 1 else {}
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **store)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = " and ".join(f"{name} = {os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = first_line(error)
        if "EADDRINUSE" in str(error) and not slurm_variable("JOB_ID"):
            raise UserError(
                f"{address}: the processes cannot meet at this address ({reason}); set another port"
            ) from None
        raise Fault(f"{address}: the processes did not meet at this address ({reason})") from None


def _keep_memory() -> None:
    """Tell glibc to keep freed memory.

    Otherwise a step on the CPU spends much of its time on page faults: it returns gradients to the system and maps them
    anew.
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def catch_signals() -> None:
    """Let SIGTERM and SIGUSR1 request a stop at the end of a step instead of ending the process.

    A search's trial runs in a thread, where Tune decides when it ends.
    """
    global _stop_requested
    _stop_requested = False
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _request_stop)


def _request_stop(*_: Any) -> None:
    global _stop_requested
    _stop_requested = True


def stop_requested() -> bool:
    """Return whether a signal requested a stop."""
    return _stop_requested


def any_of(flag: bool) -> bool:
    """Return, on all processes, whether the flag is true on any."""
    return any_of_each(flag)[0]


def any_of_each(*flags: bool) -> list[bool]:
    """Return for each flag whether it is true on any process: one exchange for all of them."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_control_group)
    return [bool(value) for value in values.tolist()]


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier(group=_control_group)


def from_main(value: T) -> T:
    """Return the main process's value, on all processes."""
    return on_main(lambda: value)


def on_main(work: Callable[[], T]) -> T:
    """Do the work on the main process; what it returns or raises, all processes return or raise."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=_control_group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def sums(values: Sequence[float]) -> list[float]:
    """Return numbers of the host summed over the processes: exact for integers, and no device is waited for."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_control_group)
    return total.tolist()


def average(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor averaged over the processes, without waiting for the device."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def means(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return scalars averaged over the processes: one transfer from the device for all of them."""
    if not values:
        return {}
    stacked = torch.stack(
        [v.detach().double() if v.device.type == "cpu" else v.detach().float() for v in values.values()]
    )
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, on each of them."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=_control_group)
    return box


def seed_everything(*key: int) -> None:
    """Seed all generators by the key: the same key gives the same dropout and new weights, on any process."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
