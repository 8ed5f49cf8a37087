"""Preflight: whether these machines can do the run, found out together and in about a second, before a model is built.

    check(made, folder)   devices, an all-reduce, the data, room on the disk
    together(work)        work() on every process; what one of them could not do ends all, in one line
    Unfit                 other machines may do better: the job goes back to the queue

What any machines would run into ends with 2: more processes than GPUs, data that nobody sees, a disk without room. What
is wrong with one of them ends with 75: no GPU or another one than the others', data that it does not see, a collective
that fails, sums wrongly or takes too long. All processes leave with the same code, and the line names process and host.
"""

import shutil
import socket
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from lad_dist.compression import footprint
from lad_dist.config.errors import EXIT_RUN_AGAIN, Fault, UserError
from lad_dist.config.schema import CorpusDataConfig
from lad_dist.data.shards.reader import SPLITS, Shards
from lad_dist.distributed import processes
from lad_dist.training import cost_model, run_spec

NUMBERS = 1 << 17  # of the all-reduce: 1 MiB
BOUND = timedelta(seconds=120)  # for it: the first one also connects everybody with everybody

Result = TypeVar("Result")


class DeviceFault(Fault):
    """Of this set of machines."""

    code = EXIT_RUN_AGAIN


class Device(NamedTuple):
    """What a process computes on: `gpus` are those that it sees on its host."""

    host: str
    name: str
    gpus: int


def check(made: run_spec.RunSpec, folder: Path) -> None:
    """Raises UserError or Unfit, the same on all processes. `folder` is the run's."""
    check_devices(processes.all_gather(_mine()))
    check_devices_together(_sum)
    check_devices_together(lambda: _see_data(made))
    processes.on_main(lambda: _check_room(made, folder))


def check_devices_together(work: Callable[[], Result]) -> Result:
    """What `work` returns on this process. Raises UserError: its own where it failed on all, Unfit where on some."""
    error: UserError | None = None
    try:
        result = work()
    except UserError as caught:
        error = caught
    faults = processes.all_gather(error and f"on {socket.gethostname()}: {error}")
    failed = [rank for rank, fault in enumerate(faults) if fault]
    if not failed:
        return result
    if error is not None and len(failed) == len(faults):
        raise error
    others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    raise DeviceFault(f"process {failed[0]} {faults[failed[0]]}{others}; the other processes had no such trouble")


def _mine() -> Device:
    where = processes.device()
    if where.type == "cpu":
        return Device(socket.gethostname(), "no GPU", 0)
    return Device(socket.gethostname(), torch.cuda.get_device_name(where), torch.cuda.device_count())


def check_devices(devices: list[Device]) -> None:
    """`devices` by rank. Raises Unfit where they are not alike, UserError where processes would share a GPU."""
    usual, _ = Counter(device.name for device in devices).most_common(1)[0]
    for rank, device in enumerate(devices):
        if device.name != usual:
            raise DeviceFault(f"process {rank} on {device.host} has {device.name}, most processes have {usual}")
    for rank, device in enumerate(devices):
        here = sum(other.host == device.host for other in devices)
        if device.gpus and here > device.gpus:
            raise UserError(
                f"process {rank} on {device.host}: {here} processes there see {device.gpus} GPUs; start as many "
                "processes as GPUs (with SLURM, --ntasks-per-node equal to --gpus-per-node)"
            )


def _sum() -> None:
    """An all-reduce of whole numbers, whose sum is known exactly."""
    world = processes.world_size()
    if world == 1:
        return
    places = torch.arange(NUMBERS, device=processes.device())
    total = places + processes.rank()
    try:
        dist.all_reduce(total, async_op=True).wait(BOUND)
    except RuntimeError as error:
        raise DeviceFault(f"an all-reduce among {world} processes failed ({str(error).splitlines()[0]})") from None
    if not torch.equal(total, world * places + world * (world - 1) // 2):
        raise DeviceFault(f"an all-reduce among {world} processes gave a wrong sum")


def _see_data(made: run_spec.RunSpec) -> None:
    """Every file of the corpus is there, as long as the manifest says. Raises UserError."""
    if isinstance(made.config.data, CorpusDataConfig):
        for split in SPLITS:
            Shards(made.config.data.shards, split)


def _check_room(made: run_spec.RunSpec, folder: Path) -> None:
    """Raises UserError where the disk lacks room for the checkpoints that the run keeps, the next, and the export."""
    words = made.config.run
    method = cost_model.meta_distiller(made)
    each, export = cost_model.checkpoint_bytes(made, method), 4 * footprint.exported(method.student)
    there = len([path for path in (folder / "checkpoints").glob("step-*") if not path.suffix])
    missing = max(1, words.keep + 1 - there) if words.save_every else 1
    needed = missing * each + export
    free = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"{folder}: {missing} checkpoints of {each / 1e9:.2g} GB and the export take {needed / 1e9:.2g} GB, "
            f"{free / 1e9:.2g} GB are free on {socket.gethostname()}; make room there, or set run.dir to another disk"
        )
