"""Check that these machines can do the run, on all processes in about a second, before a model is built.

What any machines would meet ends with 2: more processes than GPUs, data that nobody sees, a disk without room. What is
wrong with one machine ends with 75: no GPU or another one than the others', data that it does not see, a collective
that fails, sums wrongly or takes too long. All processes leave with the same code, and the line names process and host.
"""

import shutil
import socket
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lad_dist.compression import footprint
from lad_dist.config.errors import EXIT_RUN_AGAIN, Fault, UserError
from lad_dist.config.schema import CorpusDataConfig
from lad_dist.data.shards.reader import SPLITS, Shards
from lad_dist.distributed import processes, ranks
from lad_dist.training import cost_model, run_spec
from lad_dist.utils.text import first_line

ALL_REDUCE_SIZE = 1 << 17  # integers: 1 MiB
ALL_REDUCE_TIMEOUT = timedelta(seconds=120)  # the first one also connects all processes with each other


class DeviceFault(Fault):
    """Something is wrong with one of these machines: the job goes back to the queue, as others may do better."""

    code = EXIT_RUN_AGAIN


class Device(NamedTuple):
    """The device of a process. `gpus`: how many GPUs the process sees on the host."""

    host: str
    name: str
    gpus: int


def check(spec: run_spec.RunSpec, folder: Path) -> None:
    """Raise UserError or DeviceFault, the same on all processes, where the run cannot work. `folder`: the run's."""
    check_devices(processes.all_gather(_own_device()))
    run_on_all(_check_all_reduce)
    run_on_all(lambda: _check_data(spec))
    processes.on_main(lambda: _check_disk(spec, folder))


def run_on_all(work: Callable[[], None]) -> None:
    """Call `work` on every process.

    Raises:
        UserError: `work` raised UserError on all processes.
        DeviceFault: `work` raised UserError on some processes.
    """
    error: UserError | None = None
    try:
        work()
    except UserError as caught:
        error = caught
    faults = processes.all_gather(error and f"on {socket.gethostname()}: {error}")
    failed = [rank for rank, fault in enumerate(faults) if fault]
    if not failed:
        return
    if error is not None and len(failed) == len(faults):
        raise error
    others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    raise DeviceFault(f"process {failed[0]} {faults[failed[0]]}{others}; the other processes had no such trouble")


def _own_device() -> Device:
    device = processes.device()
    if device.type == "cpu":
        return Device(socket.gethostname(), "no GPU", 0)
    return Device(socket.gethostname(), torch.cuda.get_device_name(device), torch.cuda.device_count())


def check_devices(devices: list[Device]) -> None:
    """Raise DeviceFault where devices, by rank, are not alike, and UserError where processes would share a GPU."""
    usual, _ = Counter(device.name for device in devices).most_common(1)[0]
    for rank, device in enumerate(devices):
        if device.name != usual:
            raise DeviceFault(f"process {rank} on {device.host} has {device.name}, most processes have {usual}")
    for rank, device in enumerate(devices):
        neighbors = sum(other.host == device.host for other in devices)
        if device.gpus and neighbors > device.gpus:
            raise UserError(
                f"process {rank} on {device.host}: {neighbors} processes of this host see {device.gpus} GPUs; start "
                "as many processes as GPUs (with SLURM, --ntasks-per-node equal to --gpus-per-node)"
            )


def _check_all_reduce() -> None:
    """Raise DeviceFault where an all-reduce of integers fails, or does not give the exact sum."""
    world_size = ranks.world_size()
    if world_size == 1:
        return
    integers = torch.arange(ALL_REDUCE_SIZE, device=processes.device())
    total = integers + ranks.rank()
    try:
        dist.all_reduce(total, async_op=True).wait(ALL_REDUCE_TIMEOUT)
    except RuntimeError as error:
        raise DeviceFault(f"an all-reduce among {world_size} processes failed ({first_line(error)})") from None
    if not torch.equal(total, world_size * integers + world_size * (world_size - 1) // 2):
        raise DeviceFault(f"an all-reduce among {world_size} processes gave a wrong sum")


def _check_data(spec: run_spec.RunSpec) -> None:
    """Raise UserError where a file of the corpus is missing, or not as long as the manifest records."""
    if isinstance(spec.config.data, CorpusDataConfig):
        for split in SPLITS:
            Shards(spec.config.data.shards, split)


def _check_disk(spec: run_spec.RunSpec, folder: Path) -> None:
    """Raise UserError where the disk lacks room for the checkpoints that the run keeps, the next, and the export."""
    config = spec.config.run
    distiller = cost_model.meta_distiller(spec)
    checkpoint, export = cost_model.checkpoint_bytes(spec, distiller), 4 * footprint.exported_weights(distiller.student)
    existing = len([path for path in (folder / "checkpoints").glob("step-*") if not path.suffix])
    saves_more_than_once = config.save_every or config.best_metric is not None
    missing = max(1, cost_model.num_checkpoints(config) + 1 - existing) if saves_more_than_once else 1
    needed = missing * checkpoint + export
    free = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"{folder}: {missing} checkpoints of {checkpoint / 1e9:.2g} GB and the export take {needed / 1e9:.2g} GB, "
            f"{free / 1e9:.2g} GB are free on {socket.gethostname()}; make room, or set run.dir to another disk"
        )
