"""Batches ahead of the model.

A batch is a function of (step, micro-batch), so any number of loader processes gives the same ones, and none of them
has a state to save. They send plain arrays: a tensor would be sent as an open file, of which a process may have few.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.utils import worker_process

PREFETCHED_STEPS = 2  # of each loader process

NumpyBatch = dict[str, Any]


class _StepDataset(Dataset[list[NumpyBatch] | UserError]):
    def __init__(self, dataset: CorpusDataset | TaskDataset, micro_batches: Sequence[int]) -> None:
        self._dataset, self._micro_batches = dataset, micro_batches

    def __getitem__(self, step: int) -> list[NumpyBatch] | UserError:
        try:
            batches = [self._dataset.batch(step, micro_batch) for micro_batch in self._micro_batches]
        except UserError as error:  # the loader would put its traceback in front of the message
            return error
        return [
            {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in batch._asdict().items()}
            for batch in batches
        ]


def load_batches(
    dataset: CorpusDataset | TaskDataset, steps: Iterable[int], micro_batches: Sequence[int], num_workers: int
) -> Iterator[list[Batch]]:
    """Yield these micro-batches of each step. Raise UserError where the dataset does."""
    loader = DataLoader(
        _StepDataset(dataset, micro_batches),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        collate_fn=lambda batches: batches,
        worker_init_fn=(lambda worker: worker_process.die_with_parent()) if num_workers else None,
        prefetch_factor=PREFETCHED_STEPS if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # the loader draws a seed that nobody needs, and not from the global generator
    )
    for batches in loader:
        if isinstance(batches, UserError):
            raise batches
        yield [Batch(**{name: _to_tensor(x) for name, x in batch.items()}) for batch in batches]


def _to_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor  # the copy to a device need not be waited for
