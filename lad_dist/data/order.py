"""Which sequences a step reads: pure functions of (seed, step, slot), the same for every process and after every
resume.

    random_source(…)       the generator that belongs to (purpose, seed, epoch, item)
    sequences_of(…)        documents cut into sequences
    CorpusOrder, TaskOrder (step, slot) -> ids of the sequences of that micro-batch
    _pack, _next_fit, _fill how CorpusOrder's slots come to be full

An order is an endless row of slots, epoch after epoch; step s reads `slots` of them from s * slots on. So nothing is
left over at the end of an epoch: a step may hold the last slots of one and the first of the next.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What randomness is for: no two purposes share a stream."""

    PLAN = 0
    ORDER = 1
    MASK = 2


def random_source(purpose: Purpose, seed: int, epoch: int = 0, item: int = 0) -> np.random.Generator:
    """A Philox generator whose stream belongs to these four numbers alone: key (seed, epoch), counter from (item,
    purpose)."""
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, item, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sequences_of(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of `lengths` tokens cut into pieces of at most `room`: (document, begin within it, length) of each
    piece, in the documents' order. Every token is in exactly one piece, and no piece spans two documents."""
    pieces = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), pieces)
    within = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = within * room
    return document, begin, np.minimum(room, lengths[document] - begin)


class CorpusOrder:
    """Sequences in slots of at most `tokens_per_slot` tokens, each sequence once per epoch.

    The slots are packed once, over a random permutation. What that fixes is the lengths that lie together, not the
    sequences: each epoch shuffles the sequences among the places of their length, and the slots among themselves. So
    every epoch is as full as the first and has the same number of slots, and (step, slot) finds its epoch by a
    division.
    """

    def __init__(self, lengths_with_specials: np.ndarray, tokens_per_slot: int, slots: int, seed: int) -> None:
        """lengths_with_specials: int [n], n >= 1, tokens of each sequence as the model sees it, none above
        tokens_per_slot."""
        lengths = np.asarray(lengths_with_specials).astype(_small(int(lengths_with_specials.max())))
        assert lengths.max() <= tokens_per_slot
        random = random_source(Purpose.PLAN, seed)
        permutation = random.permutation(len(lengths))
        slot_of = np.empty(len(lengths), dtype=np.int64)
        slot_of[permutation] = _pack(lengths[permutation].astype(np.int64), tokens_per_slot, random)
        by_length = np.argsort(lengths, kind="stable")
        self._lengths, self._seed, self.slots = lengths, seed, slots
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(slot_of))])
        self._places = np.argsort(np.argsort(slot_of, kind="stable"))[by_length]
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None
        self.fill = float(lengths.sum(dtype=np.int64)) / (tokens_per_slot * self.slots_per_epoch)

    @property
    def slots_per_epoch(self) -> int:
        return len(self._bounds) - 1

    @property
    def steps_per_epoch(self) -> float:
        return self.slots_per_epoch / self.slots

    def epoch(self, step: int, slot: int = 0) -> int:
        """The epoch, from 0, that this slot of this step belongs to."""
        return (step * self.slots + slot) // self.slots_per_epoch

    def slot(self, step: int, slot: int) -> np.ndarray:
        """Ids, int64, of the sequences in micro-batch `slot` of step `step`."""
        epoch, position = divmod(step * self.slots + slot, self.slots_per_epoch)
        sequences, row = self._plan(epoch)
        chosen = row[position]
        return sequences[self._bounds[chosen] : self._bounds[chosen + 1]]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(sequences slot by slot, the order in which the slots are read)"""
        if self._planned is None or self._planned[0] != epoch:
            random = random_source(Purpose.ORDER, self._seed, epoch)
            shuffled = random.permutation(len(self._lengths))
            sequences = np.empty_like(shuffled)
            sequences[self._places] = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]
            self._planned = epoch, sequences, random.permutation(self.slots_per_epoch)
        return self._planned[1:]


class TaskOrder:
    """Examples in slots of exactly `examples_per_slot`, each example once per epoch: the epochs' permutations end to
    end."""

    def __init__(self, count: int, examples_per_slot: int, slots: int, seed: int) -> None:
        self._count, self._size, self.slots, self._seed = count, examples_per_slot, slots, seed
        self._shuffled: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> float:
        return self._count / (self._size * self.slots)

    def epoch(self, step: int, slot: int = 0) -> int:
        """The epoch, from 0, of the first example of this slot."""
        return (step * self.slots + slot) * self._size // self._count

    def slot(self, step: int, slot: int) -> np.ndarray:
        """Ids, int64 [examples_per_slot], of the examples in micro-batch `slot` of step `step`."""
        places = (step * self.slots + slot) * self._size + np.arange(self._size)
        epochs, positions = np.divmod(places, self._count)
        return np.concatenate(
            [self._permutation(int(epoch))[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            random = random_source(Purpose.ORDER, self._seed, epoch)
            self._shuffled = epoch, random.permutation(self._count)
        return self._shuffled[1]


def _small(largest: int) -> type[np.unsignedinteger]:
    """The smallest type for lengths: numpy sorts those of 16 bits by counting."""
    return np.uint16 if largest < 2**16 else np.uint32


def _pack(lengths: np.ndarray, capacity: int, random: np.random.Generator) -> np.ndarray:
    """The slot of each piece, over windows of the row of pieces. In a window pieces go in as they come, but about two
    short ones per slot are held back; these then fill the gaps, the longest that fits first, and what no gap takes is
    mixed into the next window. A window has hundreds of slots where it can: that many gaps find what they need."""
    slot_of = np.full(len(lengths), -1)
    count = 0
    left = np.empty(0, dtype=np.int64)
    windows = np.array_split(np.arange(len(lengths)), min(32, lengths.sum() // (512 * capacity) + 1))
    while windows or len(left):
        pending = random.permutation(np.concatenate([left, *windows[:1]]))
        windows = windows[1:]
        held = _held_back(lengths[pending], capacity)
        placed, left = pending[~held], pending[held]
        bins = _next_fit(lengths[placed], capacity)
        gaps = capacity - np.bincount(bins, weights=lengths[placed]).astype(np.int64)
        slot_of[placed] = count + bins
        filled = _fill_all(lengths[left], gaps)
        fits = filled >= 0
        slot_of[left[fits]] = count + filled[fits]
        count, left = count + len(gaps), left[~fits]
    return slot_of


def _held_back(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Boolean: two short pieces per slot, but no more than half of all."""
    short = np.flatnonzero(lengths < lengths.max())
    held = np.zeros(len(lengths), dtype=bool)
    held[short[: min(2 * int(lengths.sum()) // capacity, len(lengths) // 2)]] = True
    return held


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece when a bin is closed by the first piece that does not fit."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    after = np.searchsorted(ends, ends[:-1] + capacity, side="right") - 1
    opens = np.zeros(len(lengths), dtype=np.int64)
    first = 0
    while first < len(lengths):
        opens[first] = 1
        first = int(after[first])
    return np.cumsum(opens) - 1


def _fill_all(lengths: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """The gap of each piece, or -1: round after round, until no gap takes another. Shrinks the gaps."""
    chosen = np.full(len(lengths), -1)
    pending = np.arange(len(lengths))
    while len(pending):
        found = _fill(lengths[pending], gaps)
        fits = found >= 0
        if not fits.any():
            break
        chosen[pending[fits]] = found[fits]
        gaps[found[fits]] -= lengths[pending[fits]]
        pending = pending[~fits]
    return chosen


def _fill(lengths: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """At most one piece for each gap, long pieces first, each into the tightest gap that still takes it: the gap of
    each piece, or -1."""
    chosen = np.full(len(lengths), -1)
    widest_first = np.argsort(-gaps, kind="stable")
    pieces = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    open_until = np.searchsorted(-gaps[widest_first], values, side="right")
    stack = np.empty(len(gaps), dtype=np.int64)  # gaps that take the current length, the tightest on top
    height = pushed = begin = 0
    for count, until in zip(counts.tolist(), open_until.tolist(), strict=True):
        stack[height : height + until - pushed] = widest_first[pushed:until]
        height, pushed = height + until - pushed, until
        taken = min(count, height)
        chosen[pieces[begin : begin + taken]] = stack[height - taken : height]
        height, begin = height - taken, begin + count
    return chosen
