"""Which windows or examples a step reads: pure functions of (seed, step, micro-batch).

They are the same for every process and after every resume. An order is an endless row, epoch after epoch. Step s reads
M micro-batches, from micro-batch s * M on. So nothing is left over at the end of an epoch: a micro-batch may hold the
last windows of one epoch and the first of the next.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lad_dist.utils.rng import SHUFFLE, Permutation, derive_key

EPOCHS = 1000  # after so many a weight that is no integer comes out even, to half a window


def rank_share(micro_batches: int, rank: int, world_size: int) -> range:
    """Return the micro-batches of a step that process `rank` of `world_size` computes."""
    return range(rank, micro_batches, world_size)


def num_windows(length: int, room: int) -> int:
    """Return how many windows of at most `room` tokens a stream of `length` is cut into: as few as possible."""
    return -(-length // room)


def window_span(window: Any, length: int, room: int) -> tuple[Any, Any]:
    """Return (begin, end) of a window, or of windows int64 [n], in their stream.

    Windows differ by at most one token in size and cover the stream without overlap.
    """
    size, longer = divmod(length, num_windows(length, room))
    begin = window * size + np.minimum(window, longer)
    return begin, begin + size + (window < longer)


class WindowRead(NamedTuple):
    """The windows of a micro-batch, int64 [U] each."""

    source: np.ndarray
    window: np.ndarray
    epoch: np.ndarray  # how often the source has been read through before: the epoch of this source


class CorpusOrder:
    """Windows of several sources, `windows_per_micro_batch` in each micro-batch.

    An epoch reads a source `weight` times, on the average of EPOCHS epochs where it is no integer. The sources
    alternate as evenly as possible: any stretch of the row has each in its share, up to one window for each source. A
    source is read through in a fresh shuffle each time. Nothing is stored: a shuffle is a keyed permutation.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        windows_per_micro_batch: int,
        micro_batches_per_step: int,
        seed: int,
    ) -> None:
        """Make the order of sources of these counts of windows, each >= 1."""
        self._counts = list(counts)
        self._size = windows_per_micro_batch
        self.micro_batches_per_step = micro_batches_per_step
        self._seed = seed
        epochs = 1 if all(float(weight).is_integer() for weight in weights) else EPOCHS
        shares = [count * weight * epochs for count, weight in zip(counts, weights, strict=True)]
        self._quotas = [max(1, round(share)) for share in shares]
        self._left = [sum(self._quotas[source:]) for source in range(len(counts))]
        self.steps_per_epoch = self._left[0] / (epochs * windows_per_micro_batch * micro_batches_per_step)

    def micro_batch(self, step: int, micro_batch: int) -> WindowRead:
        """Return the windows that a micro-batch of a step reads."""
        first = (step * self.micro_batches_per_step + micro_batch) * self._size
        places = np.array([self._place(number) for number in range(first, first + self._size)], dtype=np.int64)
        source, epoch, position = places.T
        window = np.empty_like(position)
        for s, e in sorted({(s, e) for s, e, _ in places.tolist()}):
            selected = (source == s) & (epoch == e)
            shuffle = Permutation(self._counts[s], derive_key(SHUFFLE, self._seed, s, e))
            window[selected] = shuffle(position[selected])
        return WindowRead(source, window, epoch)

    def _place(self, number: int) -> tuple[int, int, int]:
        """Return (source, its epoch, position within the epoch's shuffle) of a place in the row."""
        cycle, place = divmod(number, self._left[0])
        for source, (quota, left) in enumerate(zip(self._quotas, self._left, strict=True)):
            before = place * quota // left  # of this source, among the places that the sources before it left
            if (place + 1) * quota // left > before:
                return source, *divmod(cycle * quota + before, self._counts[source])
            place -= before
        raise AssertionError("the last source takes what is left")


class MixedTaskOrder:
    """Labelled and unlabelled examples as two sources of a `CorpusOrder`.

    Ids of unlabelled examples follow those of labelled ones. An epoch reads each labelled example once and each
    unlabelled one `weight` times.
    """

    def __init__(
        self,
        labelled: int,
        unlabelled: int,
        weight: float,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int,
        seed: int,
    ) -> None:
        """Make the order of so many examples, at least one of each."""
        self._labelled = labelled
        counts, weights = [labelled, unlabelled], [1.0, weight]
        self._order = CorpusOrder(counts, weights, micro_batch_size, micro_batches_per_step, seed)
        self.steps_per_epoch = self._order.steps_per_epoch

    def micro_batch(self, step: int, micro_batch: int) -> np.ndarray:
        """Return the ids, int64 [micro_batch_size], of the examples in a micro-batch of a step."""
        reading = self._order.micro_batch(step, micro_batch)
        return reading.window + self._labelled * reading.source


class TaskOrder:
    """Examples in micro-batches of one size, each example once per epoch: the epochs' permutations end to end."""

    def __init__(self, count: int, micro_batch_size: int, micro_batches_per_step: int, seed: int) -> None:
        self._count, self._size, self._seed = count, micro_batch_size, seed
        self.micro_batches_per_step = micro_batches_per_step
        self.steps_per_epoch = count / (micro_batch_size * micro_batches_per_step)

    def micro_batch(self, step: int, micro_batch: int) -> np.ndarray:
        """Return the ids, int64 [micro_batch_size], of the examples in a micro-batch of a step."""
        places = (step * self.micro_batches_per_step + micro_batch) * self._size + np.arange(self._size)
        epochs, examples = np.divmod(places, self._count)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            shuffle = Permutation(self._count, derive_key(SHUFFLE, self._seed, int(epoch)))
            examples[selected] = shuffle(examples[selected])
        return examples
