"""Connection to Ray: to the cluster at RAY_ADDRESS, or to one started on this machine for as long as it is needed."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from lad_dist.config.errors import UserError

OBJECT_STORE_BYTES = 100_000_000  # trials exchange nothing but numbers

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to Ray, and disconnect in the end; a cluster that was started here is shut down and removed."""
    address, folder = os.environ.get("RAY_ADDRESS"), None
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        else:
            folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets in it have 107 characters at most
            ray.init(
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=folder,
            )
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def check_trial_fits(processes: int, cpus: float, gpus: float, placement_strategy: str = "PACK") -> None:
    """Raise UserError where no node can hold a trial: Tune would wait for one without end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(cpus <= node.get("CPU", 0) and gpus <= node.get("GPU", 0) for node in nodes):
        most_cpus, most_gpus = (max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UserError(
            f"search.cpus = {cpus:g}, search.gpus = {gpus:g}: no node can hold such a trial, "
            f"the largest has {most_cpus:g} CPUs and {most_gpus:g} GPUs; lower what a trial gets"
        )
