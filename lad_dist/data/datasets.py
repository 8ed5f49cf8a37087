"""What the training loop reads: micro-batches by (step, micro-batch), and the batches to evaluate on.

Both datasets have `.micro_batches_per_step`, `.steps_per_epoch` (an epoch reads every source of a corpus, and the
unlabelled texts of a task, as often as their weight says, and every labelled example once), `.fingerprint` (of the
data, in ids), `.description` and two pure functions of the seed and their arguments: `.batch(step, micro_batch)`, and
`.samples(step, micro_batch)`, what it consists of.
"""

import hashlib
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.config.schema import CorpusDataConfig, TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.core.collate import pack
from lad_dist.data.mlm import Vocabulary, mask_windows
from lad_dist.data.sampling import CorpusOrder, MixedTaskOrder, TaskOrder, WindowRead, num_windows, window_span
from lad_dist.data.shards.reader import Shards
from lad_dist.data.tasks.examples import Batches, tokenize, tokenize_dev
from lad_dist.data.tasks.task import Task
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, fingerprint
from lad_dist.data.tokenization.special_tokens import ordinary_ids, special_token_frame, vocabulary_size, word_starts
from lad_dist.distributed.logs import get_logger
from lad_dist.utils.rng import MASK, derive_key, derive_keys
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.text import si_number

HELD_OUT_MICRO_BATCHES = 32

logger = get_logger(__name__)


class CorpusDataset:
    """Windows of the corpus between the tokenizer's special tokens, some of their tokens masked."""

    def __init__(self, data: CorpusDataConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Open the shards.

        Raise UserError when they are damaged or of another tokenizer, the tokenizer has no mask token, or
        data.source_weights names an unknown source.
        """
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._train = _CorpusWindows(data, tokenizer, "train")
        self.micro_batches_per_step = data.micro_batches_per_step
        self._windows = data.micro_batch_tokens // data.max_length  # of a micro-batch
        self._order = CorpusOrder(
            self._train.counts, self._train.weights, self._windows, data.micro_batches_per_step, seed
        )
        self.steps_per_epoch, self.fingerprint = self._order.steps_per_epoch, self._train.fingerprint
        if not self._train.any_held_out:
            message = "%s: no document is held out, so nothing is evaluated; prepare the corpus with held_out above 0"
            logger.warning(message, data.shards)

    @property
    def description(self) -> str:
        """What there is to train on, for a person."""
        tokens, names = sum(self._train.tokens), self._train.names
        return f"{si_number(tokens)} tokens of {', '.join(names)}, in windows of {self._data.max_length}"

    def batch(self, step: int, micro_batch: int) -> Batch:
        """Return a micro-batch of a step: the head reads the masked tokens, labels are their ids."""
        return self._train.batch(self._order.micro_batch(step, micro_batch), self._seed)

    def samples(self, step: int, micro_batch: int) -> list[str]:
        """Return what the micro-batch consists of, for a log: windows by their source and number."""
        reading = self._order.micro_batch(step, micro_batch)
        places = zip(reading.source.tolist(), reading.window.tolist(), strict=True)
        return [f"{self._train.names[source]} {window}" for source, window in places]

    @cached_property
    def held_out(self) -> Batches:
        """Return at most 32 micro-batches of the held-out documents, the same and with the same masks in every run.

        They are whole micro-batches, or one that repeats documents where these are fewer. The list is empty when the
        corpus was prepared with nothing held out.
        """
        held_out = _CorpusWindows(self._data, self._tokenizer, "held_out")
        if not held_out.counts:
            return []
        weights = [1.0] * len(held_out.counts)
        order = CorpusOrder(held_out.counts, weights, self._windows, micro_batches_per_step=1, seed=0)
        count = min(HELD_OUT_MICRO_BATCHES, int(order.steps_per_epoch) or 1)
        return [partial(held_out.batch, order.micro_batch(number, 0), 0) for number in range(count)]


def check_shards(shards: Shards, data: CorpusDataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError where shards are of another tokenizer, or data.source_weights names an unknown source."""
    if shards.manifest["tokenizer"]["fingerprint"] != fingerprint(tokenizer):
        raise UserError(f"{data.shards}: prepared with another tokenizer; use the one in {shards.tokenizer_folder}")
    _weights(data, shards)


class _CorpusWindows:
    """One split of the shards, cut into windows. U windows, L = max_length places."""

    def __init__(self, data: CorpusDataConfig, tokenizer: PreTrainedTokenizerFast, split: str) -> None:
        shards = Shards(data.shards, split)
        check_shards(shards, data, tokenizer)
        self.fingerprint = shards.fingerprint
        self.any_held_out = any(source["splits"]["held_out"]["tokens"] for source in shards.manifest["sources"])
        self._frame = special_token_frame(tokenizer)
        self._room = data.max_length - self._frame.size
        self._length, self._cross_documents = data.max_length, data.cross_documents
        self._streams = shards.streams
        self.names = [stream.name for stream in self._streams]
        self.tokens = [stream.tokens for stream in self._streams]
        self.counts = [num_windows(stream.length, self._room) for stream in self._streams]
        self.weights = _weights(data, shards)
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token: masked language modelling needs one")
        starts = word_starts(tokenizer) if data.whole_word_mask else None
        self._vocabulary = Vocabulary(tokenizer.mask_token_id, ordinary_ids(tokenizer), starts)
        self._is_content = np.ones(vocabulary_size(tokenizer), dtype=bool)  # by token id
        self._is_content[[*self._frame.before, *self._frame.after]] = False
        tokens = sum(stream.tokens * weight for stream, weight in zip(self._streams, self.weights, strict=True))
        windows = sum(count * weight for count, weight in zip(self.counts, self.weights, strict=True)) or 1
        self._masked_per_window = max(1, round(data.mlm_probability * (tokens / windows)))

    def batch(self, reading: WindowRead, seed: int) -> Batch:
        ids = np.stack([self._row(*place) for place in zip(reading.source, reading.window, strict=True)])
        content = self._is_content[ids]
        starts, lengths = self._sequences(content)
        self._write_frames(ids, starts, lengths)
        input_ids, masked = mask_windows(
            ids, content, self._masked_per_window, self._vocabulary, self._mask_keys(reading, seed)
        )
        return pack(input_ids, starts, lengths, masked, ids)

    def _row(self, source: int, window: int) -> np.ndarray:
        """Return int64 [L]: the window after the tokens that come before a text, and a special token to the end."""
        stream = self._streams[source]
        begin, end = window_span(window, stream.length, self._room)
        # Any special token of the frame: no content, so it belongs to no sequence and packing drops it.
        filler = [*self._frame.after, *self._frame.before][0]
        row = np.full(self._length, filler, dtype=np.int64)
        first = len(self._frame.before)
        row[:first] = self._frame.before
        row[first : first + end - begin] = stream.read(int(begin), int(end))
        return row

    def _sequences(self, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the sequences begin in the U * L places, and their lengths.

        A sequence is a run of content with its special tokens, or all runs of a window where a sequence may cross
        documents.
        """
        edges = np.diff(np.concatenate([[False], content.ravel(), [False]]).astype(np.int8))
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        if self._cross_documents:
            _, first = np.unique(begins // self._length, return_index=True)
            begins, ends = begins[first], ends[[*(first[1:] - 1), -1]]
        return begins - len(self._frame.before), ends - begins + self._frame.size

    def _write_frames(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Write the special tokens of each sequence: a window that cuts a separator holds only some of them."""
        before, after = self._frame.before, self._frame.after
        flat = ids.reshape(-1)
        flat[starts[:, None] + np.arange(len(before))] = before
        flat[(starts + lengths)[:, None] - len(after) + np.arange(len(after))] = after

    def _mask_keys(self, reading: WindowRead, seed: int) -> np.ndarray:
        """Return uint64 [U]: a function of the seed, the window, and how often it was read before."""
        keys = np.empty(len(reading.window), dtype=np.uint64)
        for source, epoch in sorted(set(zip(reading.source.tolist(), reading.epoch.tolist(), strict=True))):
            selected = (reading.source == source) & (reading.epoch == epoch)
            keys[selected] = derive_keys(derive_key(MASK, seed, source, epoch), reading.window[selected])
        return keys


def _weights(data: CorpusDataConfig, shards: Shards) -> list[float]:
    names = [source["name"] for source in shards.manifest["sources"]]
    for name in data.source_weights:
        if name not in names:
            raise UserError(f'data.source_weights: no source "{name}" in {data.shards}; {did_you_mean(name, names)}')
    return [data.source_weights.get(stream.name, stream.weight) for stream in shards.streams]


class TaskDataset:
    """Examples of a task, tokenized when the dataset is made: in `train` the labelled ones, then the unlabelled."""

    def __init__(self, data: TaskDataConfig, task: Task, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Tokenize the examples. Raise UserError when the tokenizer does not know the text."""
        self._max_length = data.max_length
        self.train = tokenize(task, task.train, tokenizer, data, f"{task.name}'s training data", data.pad_to)
        self._labelled = self.train.count
        self._class_weights = _class_weights(data.class_weights, self.train.labels, len(task.outputs))
        sizes = {"micro_batch_size": data.micro_batch_size, "micro_batches_per_step": data.micro_batches_per_step}
        self._order: TaskOrder | MixedTaskOrder = TaskOrder(self._labelled, **sizes, seed=seed)
        if task.unlabelled is not None:
            unlabelled = tokenize(task, task.unlabelled, tokenizer, data, f"{task.name}'s unlabelled data", data.pad_to)
            self.train.extend(unlabelled)
            weight = data.unlabelled_weight
            self._order = MixedTaskOrder(self._labelled, unlabelled.count, weight, **sizes, seed=seed)
        self.micro_batches_per_step, self.steps_per_epoch = data.micro_batches_per_step, self._order.steps_per_epoch
        # Of as many examples as `train` has: fewer than an epoch where that reads some more than once.
        self.steps_per_pass = self.train.count / (data.micro_batch_size * data.micro_batches_per_step)
        self.dev = tokenize_dev(task, tokenizer, data)
        self.test = {}  # in the place of a dev set, and empty where there is none
        if task.test is not None:
            self.test["dev"] = tokenize(task, task.test, tokenizer, data, f"{task.name}'s test data")

    @property
    def description(self) -> str:
        """What there is to train and to evaluate on, for a person."""
        dev = sum(examples.count for examples in self.dev.values())
        test = sum(examples.count for examples in self.test.values())
        cut, unlabelled = self.train.cut, self.train.count - self._labelled
        train = f"{self._labelled:,} labelled and {unlabelled:,} unlabelled" if unlabelled else f"{self._labelled:,}"
        share = f", {cut / self.train.count:.2%} of them cut at {self._max_length} tokens" if cut else ""
        last = f", {test:,} to test on in the end" if test else ""
        return f"{train} training examples{share}; {dev:,} to evaluate on{last}"

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the training examples and their labels."""
        return hashlib.sha256(self.train.fingerprint.encode() + self.train.labels.tobytes()).hexdigest()

    def batch(self, step: int, micro_batch: int) -> Batch:
        """Return a micro-batch of a step, with the rows and labels of its examples."""
        batch = self.train.batch(self.example_ids(step, micro_batch))
        if self._class_weights is None:
            return batch
        if batch.labels.dim() == 2:  # 0 and 1: an example without a label counts 1 for it
            return batch._replace(row_weights=torch.where(batch.labels > 0, self._class_weights, 1.0))
        return batch._replace(row_weights=self._class_weights[batch.labels.clamp(min=0)])  # UNLABELLED counts 0 anyway

    def samples(self, step: int, micro_batch: int) -> list[int]:
        """Return the ids of the micro-batch's examples, for a log."""
        return self.example_ids(step, micro_batch).tolist()

    def example_ids(self, step: int, micro_batch: int) -> np.ndarray:
        """Return int64 [micro_batch_size]: which examples of `train` the micro-batch consists of."""
        return self._order.micro_batch(step, micro_batch)


def _class_weights(setting: Any, labels: np.ndarray, count: int) -> Tensor | None:
    """Return the weight of each of `count` classes, fp32, None where all are 1.

    Balanced is labels / (count · labels of the class), as in scikit-learn; over the training set its mean is 1. Of
    several labels [R, V] it is examples without the label / examples with it, each at least 1: torch's advice for the
    pos_weight of BCEWithLogitsLoss.
    """
    if setting is None:
        return None
    if setting == "balanced" and labels.ndim == 2:
        numbers = labels.sum(axis=0)
        setting = np.maximum(len(labels) - numbers, 1) / np.maximum(numbers, 1)
    elif setting == "balanced":
        numbers = np.maximum(np.bincount(labels, minlength=count), 1)  # of a class without examples none is read
        setting = len(labels) / (count * numbers)
    return torch.tensor(setting, dtype=torch.float32)
