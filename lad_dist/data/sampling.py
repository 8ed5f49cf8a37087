"""Which windows or examples a step reads: pure functions of (seed, step, slot), the same for every process and after
every resume.

    share                  the slots of a step that a process computes
    windows, window_span   a stream of tokens cut into windows
    CorpusOrder            (step, slot) -> windows of the sources of a corpus
    TaskOrder              (step, slot) -> examples of a task

An order is an endless row, epoch after epoch; step s reads `slots` slots from slot s * slots on. So nothing is left
over at the end of an epoch: a slot may hold the last windows of one and the first of the next.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lad_dist.utils.rng import SHUFFLE, Permutation, derive_key

EPOCHS = 1000  # after so many a weight that is no integer comes out even, to half a window


def rank_share(slots: int, rank: int, world: int) -> range:
    """The slots of a step that process `rank` of `world` computes."""
    return range(rank, slots, world)


def windows(length: int, room: int) -> int:
    """How many windows of at most `room` tokens a stream of `length` is cut into: as few as possible."""
    return -(-length // room)


def window_span(window: Any, length: int, room: int) -> tuple[Any, Any]:
    """(begin, end) of a window, or of windows int64 [n], in their stream. Windows differ by at most one token in size
    and cover the stream without overlap."""
    size, longer = divmod(length, windows(length, room))
    begin = window * size + np.minimum(window, longer)
    return begin, begin + size + (window < longer)


class WindowRead(NamedTuple):
    """The windows of a slot, int64 [U] each."""

    source: np.ndarray
    window: np.ndarray
    epoch: np.ndarray  # how often the source has been read through before: the epoch of its own


class CorpusOrder:
    """Windows of several sources, `windows_per_slot` in each slot.

    An epoch reads a source `weight` times, on the average of EPOCHS epochs where it is no integer. The sources take
    turns as evenly as can be, so that any stretch of the row has each in its share, up to one window for each source.
    A source is read through in a fresh shuffle each time. Nothing is stored: a shuffle is a keyed permutation.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        windows_per_micro_batch: int,
        micro_batches_per_step: int,
        seed: int,
    ) -> None:
        """counts: windows of each source, >= 1."""
        self._counts, self._size, self._seed, self.slots = (
            list(counts),
            windows_per_micro_batch,
            seed,
            micro_batches_per_step,
        )
        self._epochs = 1 if all(float(weight).is_integer() for weight in weights) else EPOCHS
        shares = [count * weight * self._epochs for count, weight in zip(counts, weights, strict=True)]
        self._quotas = [max(1, round(share)) for share in shares]
        self._left = [sum(self._quotas[source:]) for source in range(len(counts))]

    @property
    def steps_per_epoch(self) -> float:
        return self._left[0] / (self._epochs * self._size * self.slots)

    def micro_batch(self, step: int, slot: int) -> WindowRead:
        """What micro-batch `slot` of step `step` reads."""
        first = (step * self.slots + slot) * self._size
        places = np.array([self._place(number) for number in range(first, first + self._size)], dtype=np.int64)
        source, turn, position = places.T
        window = np.empty_like(position)
        for s, t in sorted({(s, t) for s, t, _ in places.tolist()}):
            mine = (source == s) & (turn == t)
            window[mine] = Permutation(self._counts[s], derive_key(SHUFFLE, self._seed, s, t))(position[mine])
        return WindowRead(source, window, turn)

    def _place(self, number: int) -> tuple[int, int, int]:
        """(source, how often it was read through before, position within its shuffle) of a place in the row."""
        cycle, place = divmod(number, self._left[0])
        for source, (quota, left) in enumerate(zip(self._quotas, self._left, strict=True)):
            before = place * quota // left  # of this source, among the places that the sources before it left
            if (place + 1) * quota // left > before:
                return source, *divmod(cycle * quota + before, self._counts[source])
            place -= before
        raise AssertionError("the last source takes what is left")


class TaskOrder:
    """Examples in slots of exactly `examples_per_slot`, each example once per epoch: the epochs' permutations end to
    end."""

    def __init__(self, count: int, micro_batch_size: int, micro_batches_per_step: int, seed: int) -> None:
        self._count, self._size, self.slots, self._seed = count, micro_batch_size, micro_batches_per_step, seed

    @property
    def steps_per_epoch(self) -> float:
        return self._count / (self._size * self.slots)

    def micro_batch(self, step: int, slot: int) -> np.ndarray:
        """Ids, int64 [examples_per_slot], of the examples in micro-batch `slot` of step `step`."""
        places = (step * self.slots + slot) * self._size + np.arange(self._size)
        epochs, examples = np.divmod(places, self._count)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            examples[mine] = Permutation(self._count, derive_key(SHUFFLE, self._seed, int(epoch)))(examples[mine])
        return examples
