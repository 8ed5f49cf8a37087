"""Batches ahead of the model: `load(feed, steps, slots, workers)`.

A batch is a function of (step, slot), so any number of loader processes gives the same ones, and none of them has a
state to save. They send plain arrays: a tensor would be sent as an open file, of which a process may have few.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.utils import worker_process

AHEAD = 2  # steps that each loader process is ahead

NumpyBatch = list[dict[str, Any]]


class Feed(Protocol):
    def batch(self, step: int, slot: int) -> Batch: ...


class _StepDataset(Dataset[NumpyBatch | UserError]):
    def __init__(self, feed: Feed, slots: Sequence[int]) -> None:
        self._feed, self._slots = feed, slots

    def __getitem__(self, step: int) -> NumpyBatch | UserError:
        try:
            return [_to_numpy(self._feed.batch(step, slot)) for slot in self._slots]
        except UserError as error:  # the loader would put its traceback in front of the message
            return error


def load_batches(feed: Feed, steps: Iterable[int], slots: Sequence[int], workers: int) -> Iterator[list[Batch]]:
    """The batches of these slots, step by step. Raises UserError when the feed does."""
    loader = DataLoader(
        _StepDataset(feed, slots),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: it draws a seed that nobody needs
    )
    for batches in loader:
        if isinstance(batches, UserError):
            raise batches
        yield [_to_tensors(batch) for batch in batches]


def _as_it_is(batches: Any) -> Any:
    return batches


def _start_worker(worker: int) -> None:
    worker_process.die_with_parent()


def _to_numpy(batch: Batch) -> dict[str, Any]:
    return {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in batch._asdict().items()}


def _to_tensors(bare: dict[str, Any]) -> Batch:
    values: dict[str, Any] = {name: _tensor(x) if isinstance(x, np.ndarray) else x for name, x in bare.items()}
    return Batch(**values)


def _tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor  # the copy to a device need not be waited for
