"""Processes that train together, each an actor in a bundle of the placement group that the caller runs in."""

import contextlib
import os
import queue
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 10.0  # after one process failed, for the others to say whether one was lost

Report = Callable[[dict[str, Any]], None]


class _Worker:
    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        self._rows: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def place(self) -> tuple[str, str, int, list[str]]:
        """Return node, address, a free port and the GPUs of this process."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        context = ray.get_runtime_context()
        gpus = [str(number) for number in context.get_accelerator_ids().get("GPU", [])]
        return context.get_node_id(), ray.util.get_node_ip_address(), port, gpus

    def set_environment(self, variables: Mapping[str, str]) -> None:
        os.environ.update(variables)

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        report: Report = self._rows.put if os.environ["RANK"] == "0" else ignore
        return function(*arguments, report=report)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that were reported since the last call."""
        rows = []
        while not self._rows.empty():
            rows.append(self._rows.get())
        return rows


def ignore(row: dict[str, Any]) -> None:
    """Report nothing."""


class WorkerGroup:
    """As many processes as the placement group of the caller has bundles with resources, with ranks for PyTorch.

    Args:
        processes: their number.
        cpus: cores of each.
        gpus: GPUs of each; processes on one node see those of all of them, as their links need.
        variables: environment variables of each.
    """

    def __init__(self, processes: int, cpus: float, gpus: float, variables: Mapping[str, str]):
        group = ray.util.get_current_placement_group()
        assert group is not None
        first = group.bundle_count - processes
        self._workers: list[Any] = [
            ray.remote(_Worker)
            .options(
                num_cpus=cpus,
                num_gpus=gpus,
                max_concurrency=2,  # it runs a function while it hands out rows
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, first + number),
            )
            .remote(os.getcwd())
            for number in range(processes)
        ]
        places = ray.get([worker.place.remote() for worker in self._workers])
        settings = [dict(variables) | ranks for ranks in _rank_variables(places)]
        ray.get([w.set_environment.remote(each) for w, each in zip(self._workers, settings, strict=True)])

    def run(self, function: Callable[..., Any], *arguments: Any) -> Iterator[dict[str, Any]]:
        """Run `function(*arguments, report=…)` in every process; yield what the first one reports.

        The generator returns what the function returns there.

        Raises:
            RayActorError: A process was lost, also where another one noticed it first.
            Exception: What the function raises.
        """
        running = [worker.run.remote(function, arguments) for worker in self._workers]
        waiting = running
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            if not ended or not waiting:
                yield from self._rows()
            for reference in ended:
                self._check(reference, waiting)
        return ray.get(running[0])

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = ray.get(self._workers[0].rows.remote())
        return rows

    def _check(self, reference: Any, others: Sequence[Any]) -> None:
        """Raise what a process raised; where one of the others was lost, that."""
        try:
            ray.get(reference)
        except RayTaskError as error:
            count = len(others)
            ended = ray.wait(list(others), num_returns=count, timeout=LAST_WORDS_SECONDS)[0] if count else []
            for other in ended:
                with contextlib.suppress(RayTaskError):
                    ray.get(other)
            raise error.cause from None

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            ray.kill(worker)


def _rank_variables(places: Sequence[tuple[str, str, int, list[str]]]) -> list[dict[str, str]]:
    """Return the variables of each process that a launcher would set."""
    nodes = [node for node, *_ in places]
    _, address, port, _ = places[0]
    variables = []
    for rank, node in enumerate(nodes):
        gpus = sorted({gpu for other, _, _, own in places if other == node for gpu in own}, key=int)
        variables.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(nodes[:rank].count(node)),
                "LOCAL_WORLD_SIZE": str(nodes.count(node)),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            }
        )
    return variables
