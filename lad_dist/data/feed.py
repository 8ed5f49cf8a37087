"""What the training loop reads: micro-batches by (step, slot), and the batches to evaluate on.

    CorpusFeed   masked language modelling over token shards
    TaskFeed     a labelled task

Both have `.slots`, `.steps_per_epoch` and `.batch(step, slot)`, a pure function of its arguments and the seed.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from lad_dist.config import CorpusData, TaskData, UserError
from lad_dist.data import tokenizers
from lad_dist.data.batch import collate, span_starts
from lad_dist.data.masking import mask_tokens
from lad_dist.data.order import CorpusOrder, TaskOrder, sequences_of
from lad_dist.data.shards import Shards
from lad_dist.data.tasks import Examples, Task
from lad_dist.data.tokenizers import Encoded, PreTrainedTokenizerFast
from lad_dist.flat import Batch

HELD_OUT_SLOTS = 32
DEV_EXAMPLES = 64
UNKNOWN_EXAMPLES = 500

Batches = list[Callable[[], Batch]]


class CorpusFeed:
    """Pieces of documents between the tokenizer's special tokens, some of their tokens masked."""

    def __init__(self, data: CorpusData, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Raises UserError when the shards are damaged or made with another tokenizer, the tokenizer has no mask
        token, or a sequence does not fit a slot."""
        if data.tokens_per_slot < data.max_length:
            raise UserError(
                f"data.tokens_per_slot = {data.tokens_per_slot} is less than max_length = {data.max_length}"
            )
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._train = _Pieces(data, tokenizer, "train")
        self._order = CorpusOrder(self._train.lengths, data.tokens_per_slot, data.slots, seed)
        self.slots = data.slots

    @property
    def steps_per_epoch(self) -> float:
        return self._order.steps_per_epoch

    def batch(self, step: int, slot: int) -> Batch:
        """Micro-batch `slot` of step `step`: rows are the masked tokens, labels their ids."""
        epoch = self._order.epoch(step, slot)
        return self._train.batch(self._order.slot(step, slot), self._seed, epoch)

    def held_out(self) -> Batches:
        """At most 32 slots of the held-out documents, the same and with the same masks in every run; empty when the
        corpus was prepared with nothing held out."""
        pieces = _Pieces(self._data, self._tokenizer, "held_out")
        if not len(pieces.lengths):
            return []
        order = CorpusOrder(pieces.lengths, self._data.tokens_per_slot, slots=1, seed=0)
        slots = [order.slot(number, 0) for number in range(min(HELD_OUT_SLOTS, order.slots_per_epoch))]
        return [partial(pieces.batch, slot, 0, 0) for slot in slots]


class _Pieces:
    """One split of the shards, cut into sequences."""

    def __init__(self, data: CorpusData, tokenizer: PreTrainedTokenizerFast, split: str) -> None:
        self._shards = Shards(data.shards, split)
        if self._shards.manifest["tokenizer"]["fingerprint"] != tokenizers.fingerprint(tokenizer):
            raise UserError(
                f"{data.shards}: made with another tokenizer; use the one in {self._shards.tokenizer_folder}"
            )
        self._frame = tokenizers.frame(tokenizer)
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token: masked language modelling needs one")
        self._mask_id: int = tokenizer.mask_token_id
        self._mask_share = data.mask
        self._vocabulary = tokenizers.vocabulary_size(tokenizer)
        room = data.max_length - self._frame.size
        self._documents, self._begins, self._sizes = sequences_of(self._shards.lengths, room)

    @property
    def lengths(self) -> np.ndarray:
        return self._sizes + self._frame.size

    def batch(self, sequences: np.ndarray, seed: int, epoch: int) -> Batch:
        masked = [self._masked(int(sequence), seed, epoch) for sequence in sequences]
        ids, positions, labels = zip(*masked, strict=True)
        rows = [start + each for start, each in zip(span_starts(ids), positions, strict=False)]
        return collate(ids, None, np.concatenate(rows), np.concatenate(labels))

    def _masked(self, sequence: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        frame, begin, size = self._frame, int(self._begins[sequence]), int(self._sizes[sequence])
        piece = self._shards.tokens(int(self._documents[sequence]), begin, begin + size)
        ids = np.concatenate([frame.before, piece, frame.after])
        special = np.ones(len(ids), dtype=bool)
        special[len(frame.before) : len(frame.before) + size] = False
        return mask_tokens(ids, special, self._mask_share, self._mask_id, self._vocabulary, (seed, epoch, sequence))


class TaskFeed:
    """Examples of a task, tokenized when the feed is made."""

    def __init__(self, data: TaskData, task: Task, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Raises UserError when the tokenizer does not know the text."""
        train = _Examples(task.train, tokenizer, data.max_length, f"{task.name}'s training data")
        self._order = TaskOrder(len(task.train.labels), data.examples_per_slot, data.slots, seed)
        self._train, self._pad_to = train, data.pad_to
        self.slots = data.slots
        self.dev: dict[str, Batches] = {
            name: _Examples(examples, tokenizer, data.max_length, f"{task.name}'s {name} data").in_order()
            for name, examples in task.dev.items()
        }

    @property
    def steps_per_epoch(self) -> float:
        return self._order.steps_per_epoch

    def batch(self, step: int, slot: int) -> Batch:
        """Micro-batch `slot` of step `step`: rows are the sequences' first tokens, labels those of the examples."""
        return self._train.batch(self._order.slot(step, slot), self._pad_to)


class _Examples:
    """Tokenized examples and their labels."""

    def __init__(self, examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int, what: str) -> None:
        self._encoded: Encoded = tokenizers.encode_framed(tokenizer, examples.texts, examples.pairs, max_length)
        self._labels = examples.labels
        self._pad = tokenizers.frame(tokenizer).pad
        tokenizers.refuse_unknown(tokenizer, self._encoded.ids[:UNKNOWN_EXAMPLES], what)

    def batch(self, ids: np.ndarray, pad_to: int | None = None) -> Batch:
        sequences = [self._encoded.ids[example] for example in ids]
        segments = [self._encoded.segments[example] for example in ids]
        rows = span_starts(sequences, pad_to)[:-1]
        return collate(sequences, segments, rows, self._labels[ids], pad_to, self._pad)

    def in_order(self) -> Batches:
        everything = np.arange(len(self._labels))
        return [partial(self.batch, everything[i : i + DEV_EXAMPLES]) for i in range(0, len(everything), DEV_EXAMPLES)]
