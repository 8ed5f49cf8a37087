"""What the training loop reads: micro-batches by (step, slot), and the batches to evaluate on.

    CorpusFeed   masked language modelling over token shards
    TaskFeed     a labelled task

Both have `.slots`, `.steps_per_epoch`, `.fingerprint` (of the data, in ids), and pure functions of
their arguments and the seed: `.batch(step, slot)`, and `.samples(step, slot)`, what is in it.
"""

import hashlib
from functools import cached_property, partial

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.schema import CorpusDataConfig, TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.core.collate import pack
from lad_dist.data.mlm import Vocabulary, mask_windows
from lad_dist.data.sampling import CorpusOrder, TaskOrder, WindowRead, window_span, windows
from lad_dist.data.shards.reader import Shards
from lad_dist.data.tasks.examples import Batches, tokenize
from lad_dist.data.tasks.task import Task
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, fingerprint
from lad_dist.data.tokenization.special_tokens import frame_of, ordinary_ids, vocabulary_size, word_starts
from lad_dist.utils.rng import MASK, derive_key, derive_keys
from lad_dist.utils.suggest import did_you_mean

HELD_OUT_SLOTS = 32


class CorpusDataset:
    """Windows of the corpus between the tokenizer's special tokens, some of their tokens masked."""

    def __init__(self, data: CorpusDataConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Raises UserError when the shards are damaged or made with another tokenizer, the tokenizer has no mask
        token, or data.source_weights names a source that is not there."""
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._train = _CorpusWindows(data, tokenizer, "train")
        self._order = CorpusOrder(
            self._train.counts, self._train.weights, self._windows_per_slot, data.micro_batches_per_step, seed
        )
        self.micro_batches_per_step = data.micro_batches_per_step

    @property
    def steps_per_epoch(self) -> float:
        return self._order.steps_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        return self._train.fingerprint

    @property
    def _windows_per_slot(self) -> int:
        return self._data.micro_batch_tokens // self._data.max_length

    def batch(self, step: int, slot: int) -> Batch:
        """Micro-batch `slot` of step `step`: rows are the masked tokens, labels their ids."""
        return self._train.batch(self._order.micro_batch(step, slot), self._seed)

    def samples(self, step: int, slot: int) -> list[str]:
        """What the micro-batch consists of, for a log: windows by their source and number."""
        reading = self._order.micro_batch(step, slot)
        places = zip(reading.source.tolist(), reading.window.tolist(), strict=True)
        return [f"{self._train.names[source]} {window}" for source, window in places]

    @cached_property
    def held_out(self) -> Batches:
        """At most 32 slots of the held-out documents, the same and with the same masks in every run: whole slots, or
        one that repeats documents where they are fewer. Empty when the corpus was prepared with nothing held out."""
        held_out = _CorpusWindows(self._data, self._tokenizer, "held_out")
        if not held_out.counts:
            return []
        order = CorpusOrder(
            held_out.counts, [1.0] * len(held_out.counts), self._windows_per_slot, micro_batches_per_step=1, seed=0
        )
        slots = min(HELD_OUT_SLOTS, int(order.steps_per_epoch) or 1)
        return [partial(held_out.batch, order.micro_batch(number, 0), 0) for number in range(slots)]


def open_shards(data: CorpusDataConfig, tokenizer: PreTrainedTokenizerFast, split: str = "train") -> Shards:
    """Raises UserError when the shards are damaged or made with another tokenizer, or data.source_weights names a source that
    is not there."""
    shards = Shards(data.shards, split)
    if shards.manifest["tokenizer"]["fingerprint"] != fingerprint(tokenizer):
        raise UserError(f"{data.shards}: made with another tokenizer; use the one in {shards.tokenizer_folder}")
    _weights(data, shards)
    return shards


class _CorpusWindows:
    """One split of the shards, cut into windows. U windows, L = max_length places."""

    def __init__(self, data: CorpusDataConfig, tokenizer: PreTrainedTokenizerFast, split: str) -> None:
        shards = open_shards(data, tokenizer, split)
        self.fingerprint = shards.fingerprint
        self._frame = frame_of(tokenizer)
        self._room = data.max_length - self._frame.size
        self._length, self._joined = data.max_length, data.cross_documents
        self._streams = shards.streams
        self.names = [stream.name for stream in self._streams]
        self.counts = [windows(stream.length, self._room) for stream in self._streams]
        self.weights = _weights(data, shards)
        self._vocabulary = _vocabulary(tokenizer, data.whole_word_mask)
        self._ordinary = np.ones(vocabulary_size(tokenizer), dtype=bool)
        self._ordinary[[*self._frame.before, *self._frame.after]] = False
        self._hidden = max(1, round(data.mlm_probability * self._tokens_per_window()))

    def _tokens_per_window(self) -> float:
        """On the average, separators not counted."""
        tokens = sum(stream.tokens * weight for stream, weight in zip(self._streams, self.weights, strict=True))
        return tokens / (sum(c * weight for c, weight in zip(self.counts, self.weights, strict=True)) or 1)

    def batch(self, reading: WindowRead, seed: int) -> Batch:
        ids = np.stack([self._row(*place) for place in zip(reading.source, reading.window, strict=True)])
        content = self._ordinary[ids]
        starts, lengths = self._sequences(content)
        self._put_frames(ids, starts, lengths)
        masked, hidden = mask_windows(ids, content, self._hidden, self._vocabulary, self._mask_keys(reading, seed))
        return pack(masked, starts, lengths, hidden, ids, self._frame.size + 1)

    def _row(self, source: int, window: int) -> np.ndarray:
        """int64 [L]: the window after the tokens that come before a text, and special tokens to the end."""
        stream = self._streams[source]
        begin, end = window_span(window, stream.length, self._room)
        row = np.full(self._length, [*self._frame.after, *self._frame.before][0], dtype=np.int64)
        first = len(self._frame.before)
        row[:first] = self._frame.before
        row[first : first + end - begin] = stream.read(int(begin), int(end))
        return row

    def _sequences(self, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the sequences begin in the U * L places, and their lengths: a run of content with its special tokens,
        or all runs of a window where documents are joined."""
        edges = np.diff(np.concatenate([[False], content.ravel(), [False]]).astype(np.int8))
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        if self._joined:
            _, first = np.unique(begins // self._length, return_index=True)
            begins, ends = begins[first], ends[[*(first[1:] - 1), -1]]
        return begins - len(self._frame.before), ends - begins + self._frame.size

    def _put_frames(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Writes each sequence's own special tokens: where a window cuts a separator, only a part of them is there."""
        before, after = self._frame.before, self._frame.after
        flat = ids.reshape(-1)
        flat[starts[:, None] + np.arange(len(before))] = before
        flat[(starts + lengths)[:, None] - len(after) + np.arange(len(after))] = after

    def _mask_keys(self, reading: WindowRead, seed: int) -> np.ndarray:
        """uint64 [U]: a function of the seed, the window, and how often it was read before."""
        found = np.empty(len(reading.window), dtype=np.uint64)
        for source, turn in sorted(set(zip(reading.source.tolist(), reading.epoch.tolist(), strict=True))):
            mine = (reading.source == source) & (reading.epoch == turn)
            found[mine] = derive_keys(derive_key(MASK, seed, source, turn), reading.window[mine])
        return found


def _weights(data: CorpusDataConfig, shards: Shards) -> list[float]:
    names = [source["name"] for source in shards.manifest["sources"]]
    for name in data.source_weights:
        if name not in names:
            raise UserError(f'data.source_weights: no source "{name}" in {data.shards}; {did_you_mean(name, names)}')
    return [data.source_weights.get(stream.name, stream.weight) for stream in shards.streams]


def _vocabulary(tokenizer: PreTrainedTokenizerFast, whole_words: bool) -> Vocabulary:
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer has no mask token: masked language modelling needs one")
    starts = word_starts(tokenizer) if whole_words else None
    return Vocabulary(tokenizer.mask_token_id, ordinary_ids(tokenizer), starts)


class TaskDataset:
    """Examples of a task, tokenized when the feed is made."""

    def __init__(self, data: TaskDataConfig, task: Task, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Raises UserError when the tokenizer does not know the text."""
        self.train = tokenize(task, task.train, tokenizer, data, f"{task.name}'s training data", data.pad_to)
        self._order = TaskOrder(self.train.count, data.micro_batch_size, data.micro_batches_per_step, seed)
        self.micro_batches_per_step = data.micro_batches_per_step
        self.dev = {
            name: tokenize(task, raw, tokenizer, data, f"{task.name}'s {name} data") for name, raw in task.dev.items()
        }

    @property
    def steps_per_epoch(self) -> float:
        return self._order.steps_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.train.fingerprint.encode() + self.train.labels.tobytes()).hexdigest()

    def batch(self, step: int, slot: int) -> Batch:
        """Micro-batch `slot` of step `step`: rows and labels are those of its examples."""
        return self.train.batch(self.numbers(step, slot))

    def samples(self, step: int, slot: int) -> list[int]:
        """The numbers for a log."""
        return self.numbers(step, slot).tolist()

    def numbers(self, step: int, slot: int) -> np.ndarray:
        """int64 [examples_per_slot]: which examples of `train` the micro-batch consists of."""
        return self._order.micro_batch(step, slot)
