"""Tokenized examples of a task: the tokens that the head reads, its targets there, and scores of its outputs.

R rows of all examples, V outputs of the head.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.core.collate import collate, span_starts
from lad_dist.data.tasks import metrics, multilabel
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.squad import Answer, AnswerWindows, Questions, find_answers
from lad_dist.data.tasks.tagging import Sentences
from lad_dist.data.tasks.task import Kind, RawExamples, Task
from lad_dist.data.tokenization.encoding import (
    EncodedSequences,
    EncodedWords,
    encode_framed,
    encode_windows,
    encode_words,
    refuse_unknown,
)
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast
from lad_dist.data.tokenization.special_tokens import special_token_frame
from lad_dist.distributed.logs import get_logger

DEV_BATCH_SIZE = 64
CHECKED_EXAMPLES = 500  # for unknown tokens
FIRST_TOKEN = np.zeros(1, dtype=np.int64)  # the rows of a text

Raw = TypeVar("Raw", bound=RawExamples)
Logits = NDArray[np.floating]
Thresholds = Sequence[float]
Batches = list[Callable[[], Batch]]

logger = get_logger(__name__)


class Encoded(NamedTuple):
    """Sequences, the places int64 that the head reads in each of them (its rows), and a label for each of these."""

    sequences: EncodedSequences
    rows: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]


class TaskExamples(Generic[Raw]):
    """Sequences, in each of them rows that the head reads, and the labels of these rows."""

    def __init__(
        self,
        task: Task,
        raw: Raw,
        tokenizer: PreTrainedTokenizerFast,
        data: TaskDataConfig,
        description: str,
        pad_to: int | None,
    ) -> None:
        """Encode the examples, which `description` names in messages."""
        self._metrics, self._description = task.metrics, description
        self.kind, self.outputs = task.kind, task.outputs
        self._positive = None if task.positive is None else task.outputs.index(task.positive)
        self._encoded, self._rows, self._labels = self._encode(raw, tokenizer, data)
        self._pad, self._pad_to = special_token_frame(tokenizer).pad, pad_to

    def _encode(self, raw: Raw, tokenizer: PreTrainedTokenizerFast, data: TaskDataConfig) -> Encoded:
        raise NotImplementedError

    def extend(self, other: "TaskExamples[Raw]") -> None:
        """Add the examples of `other`, of the same task, after these."""
        ids, segments, cut = self._encoded
        self._encoded = EncodedSequences(
            [*ids, *other._encoded.ids], [*segments, *other._encoded.segments], cut + other.cut
        )
        self._rows, self._labels = [*self._rows, *other._rows], [*self._labels, *other._labels]
        for name in ("labels", "fingerprint"):
            vars(self).pop(name, None)  # of the examples before

    def score(self, logits: Logits) -> dict[str, float]:
        """Return the task's metrics of logits [R, V], which are finite."""
        raise NotImplementedError

    def baseline(self) -> float:
        """Return the first metric of one constant answer: the best label or labels, one number, or "no answer"."""
        return self.score(self._constant_logits())[self._metrics[0]]

    def _constant_logits(self) -> Logits:
        """Return the logits [R, V] of the constant answer."""
        constant = np.zeros((len(self.labels), len(self.outputs)))
        if self.kind != "regression":
            constant[:, np.bincount(self.labels).argmax()] = 1
        return constant

    def tuned_thresholds(self, logits: Logits) -> Thresholds:
        """Return the thresholds [V] of probabilities that are best for logits [R, V]; none where there are none."""
        return ()

    def tuned_score(self, logits: Logits, thresholds: Thresholds) -> dict[str, float]:
        """Return the task's metrics with these thresholds, by their names and _tuned; none without thresholds."""
        return {}

    def loss(self, logits: Logits) -> float:
        """Return the mean loss of logits [R, V] against the labels."""
        return metrics.mean_loss(logits, self.labels)

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        """Return how far a student decides as its teacher does, from logits [R, V] of both."""
        return metrics.loyalty(student, teacher)

    @property
    def count(self) -> int:
        """Return the number of examples."""
        return len(self._rows)

    def refuse_unknown(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise UserError when the tokenizer does not know the text."""
        refuse_unknown(tokenizer, self._encoded.ids[:CHECKED_EXAMPLES], self._description)

    @property
    def cut(self) -> int:
        """Return the number of texts of which tokens were left out."""
        return self._encoded.cut

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all examples, with padding where `pad_to` is set."""
        return self.count * self._pad_to if self._pad_to else sum(map(len, self._encoded.ids))

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example, without padding."""
        return np.array([len(ids) for ids in self._encoded.ids])

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the labels of all rows."""
        return np.concatenate(self._labels)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all that a model reads of the examples."""
        total = hashlib.sha256(f"{self._pad_to} {self._pad}".encode())
        for ids, segments, rows in zip(self._encoded.ids, self._encoded.segments, self._rows, strict=True):
            total.update(len(ids).to_bytes(4, "little") + ids.tobytes() + segments.tobytes() + rows.tobytes())
        return total.hexdigest()

    def batch(self, numbers: np.ndarray) -> Batch:
        """Return the examples of these numbers as one batch."""
        sequences = [self._encoded.ids[example] for example in numbers]
        segments = [self._encoded.segments[example] for example in numbers]
        starts = span_starts(sequences, self._pad_to)[:-1]
        rows = np.concatenate([start + self._rows[n] for start, n in zip(starts, numbers, strict=True)])
        labels = np.concatenate([self._labels[example] for example in numbers])
        return collate(sequences, segments, rows, labels, self._pad_to, self._pad)

    def in_order(self, batch_size: int = DEV_BATCH_SIZE) -> Batches:
        """Return all examples, in batches."""
        numbers = np.arange(self.count)
        return [partial(self.batch, numbers[i : i + batch_size]) for i in range(0, len(numbers), batch_size)]


def tokenize(
    task: Task,
    raw: RawExamples,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskDataConfig,
    description: str,
    pad_to: int | None = None,
    *,
    check_text: bool = True,
) -> TaskExamples[Any]:
    """Return the tokenized examples; `description` names them in messages.

    With `check_text`, raise UserError when the tokenizer does not know the text.
    """
    kinds: dict[Kind, Any] = {
        "classification": TextExamples,
        "multilabel": MultilabelExamples,
        "regression": TextExamples,
        "tagging": TaggingExamples,
        "question_answering": QuestionExamples,
    }
    examples: TaskExamples[Any] = kinds[task.kind](task, raw, tokenizer, data, description, pad_to)
    if check_text:
        examples.refuse_unknown(tokenizer)
    return examples


def tokenize_dev(task: Task, tokenizer: PreTrainedTokenizerFast, data: TaskDataConfig) -> dict[str, TaskExamples[Any]]:
    """Return the tokenized dev sets of a task by name. Raise UserError when the tokenizer does not know the text."""
    return {name: tokenize(task, raw, tokenizer, data, f"{task.name}'s {name} data") for name, raw in task.dev.items()}


class TextExamples(TaskExamples[Texts]):
    """Texts, or pairs of texts; the head reads the first token."""

    def _encode(self, raw: Texts, tokenizer: PreTrainedTokenizerFast, data: TaskDataConfig) -> Encoded:
        sequences = encode_framed(tokenizer, raw.texts, raw.pairs, data.max_length)
        return Encoded(sequences, [FIRST_TOKEN] * len(sequences.ids), list(raw.labels[:, None]))

    def score(self, logits: Logits) -> dict[str, float]:
        return metrics.score(self._metrics, logits, self.labels, self._positive)


class MultilabelExamples(TextExamples):
    """Texts with any number of labels: those of all rows are 0 and 1 [R, V]."""

    def score(self, logits: Logits) -> dict[str, float]:
        return multilabel.score(logits, self.labels)

    def tuned_thresholds(self, logits: Logits) -> Thresholds:
        return multilabel.tuned_thresholds(logits, self.labels)

    def tuned_score(self, logits: Logits, thresholds: Thresholds) -> dict[str, float]:
        if not thresholds:
            return {}
        return {f"{name}_tuned": x for name, x in multilabel.score(logits, self.labels, thresholds).items()}

    def _constant_logits(self) -> Logits:
        answer = np.where(multilabel.constant_answer(self.labels), 1.0, -1.0)
        return np.broadcast_to(answer, self.labels.shape)

    def loss(self, logits: Logits) -> float:
        return multilabel.mean_loss(logits, self.labels)

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        return multilabel.loyalty(student, teacher)


class TaggingExamples(TaskExamples[Sentences]):
    """Stretches of sentences; the head reads the first token of each word. Rows are all words, in order."""

    def _encode(self, raw: Sentences, tokenizer: PreTrainedTokenizerFast, data: TaskDataConfig) -> Encoded:
        frame = special_token_frame(tokenizer)
        ids: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        room = data.max_length - frame.size
        for words, tags in zip(encode_words(tokenizer, raw.words), raw.tags, strict=True):
            borders = [0, *words.firsts[1:].tolist(), len(words.ids)]
            for first, end in pairwise(split_sentence(words, room)):
                content = words.ids[borders[first] : borders[end]][:room]  # a longer word gives its first tokens
                ids.append(np.concatenate([frame.before, content, frame.after]).astype(np.int32))
                rows.append(words.firsts[first:end] - borders[first] + len(frame.before))
                labels.append(tags[first:end])
        segments = [np.zeros(len(sequence), dtype=np.uint8) for sequence in ids]
        self._sentences = np.cumsum([len(words) for words in raw.words])
        return Encoded(EncodedSequences(ids, segments), rows, labels)

    def score(self, logits: Logits) -> dict[str, float]:
        gold, predicted = self._tags(self.labels), self._tags(logits.argmax(axis=1))
        values = metrics.entity_metrics(gold, predicted) | metrics.score(["accuracy"], logits, self.labels)
        return {name: values[name] for name in self._metrics}

    def _tags(self, numbers: np.ndarray) -> list[list[str]]:
        """Return the tags of class ids [R], sentence by sentence."""
        return [[self.outputs[n] for n in sentence] for sentence in np.split(numbers, self._sentences[:-1])]


def split_sentence(words: EncodedWords, room: int) -> list[int]:
    """Return borders between words, from 0 to the end of the last word.

    Between two borders are at most `room` tokens, or one longer word. The stretches are about as long as each other.
    """
    total = len(words.ids)
    aim = -(-total // -(-total // room))
    ends = [*words.firsts[1:].tolist(), total]
    borders, begin = [0], 0
    for word, first in enumerate(words.firsts.tolist()):
        if word and (ends[word] - begin > room or first - begin >= aim):
            borders.append(word)
            begin = first
    return [*borders, len(words.firsts)]


class QuestionExamples(TaskExamples[Questions]):
    """Windows of contexts; the head reads the first token, for "no answer", and the tokens of the context.

    Labels are [R, 2]: 1 in the row where the answer begins, and in the one where it ends.
    Both are the row of the first token where the window lacks the answer.
    """

    def _encode(self, raw: Questions, tokenizer: PreTrainedTokenizerFast, data: TaskDataConfig) -> Encoded:
        windows = encode_windows(tokenizer, raw.questions, raw.contexts, data.max_length, data.overlap)
        rows = [np.concatenate([FIRST_TOKEN, np.arange(x.start, x.stop)]) for x in windows.context]
        labels = [
            _answer_labels(raw.answers[question], characters)
            for question, characters in zip(windows.question.tolist(), windows.characters, strict=True)
        ]
        self._raw, self._data = raw, data
        self._warn_of_cut_answers(windows.question, labels)
        nothing = np.zeros((1, 2), dtype=np.int64)
        characters = np.concatenate([x for window in windows.characters for x in (nothing, window)])
        self._places = AnswerWindows(windows.question, np.cumsum([0, *map(len, rows)]), characters)
        return Encoded(windows.encoded, rows, labels)

    def _constant_logits(self) -> Logits:
        constant = np.zeros((self._places.starts[-1], 2))
        constant[self._places.starts[:-1]] = 1 + abs(self._data.null_score_diff_threshold)
        return constant

    def _warn_of_cut_answers(self, question: np.ndarray, labels: Sequence[np.ndarray]) -> None:
        """Log how many answers are in no window as a whole: the labels of their windows are those of "no answer"."""
        answered = {number for number, window in zip(question.tolist(), labels, strict=True) if not window[0, 0]}
        answers = self._raw.answers
        if cut := sum(bool(some) and number not in answered for number, some in enumerate(answers)):
            message = "%s: %d of %d answers are in no window as a whole; raise data.doc_stride or data.max_length"
            logger.warning(message, self._description, cut, len(answers))

    def answers(self, logits: Logits) -> list[str]:
        """Return the answer to each question."""
        return find_answers(
            logits, self._places, self._raw, self._data.max_answer_length, self._data.null_score_diff_threshold
        )

    def score(self, logits: Logits) -> dict[str, float]:
        golds = [[answer.text for answer in answers] for answers in self._raw.answers]
        values = metrics.answer_metrics(self.answers(logits), golds, self._raw.unanswerable)
        return {name: values[name] for name in self._metrics}

    def loss(self, logits: Logits) -> float:
        return metrics.mean_window_loss(logits, self.labels, self._places.starts[:-1])

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        equal = [one == other for one, other in zip(self.answers(student), self.answers(teacher), strict=True)]
        return {
            "label_loyalty": sum(equal) / len(equal),
            "probability_loyalty": metrics.window_probability_loyalty(student, teacher, self._places.starts[:-1]),
        }


def _answer_labels(answers: Sequence[Answer], characters: np.ndarray) -> np.ndarray:
    """Return float32 [rows, 2] of a window whose tokens stand for these characters [tokens, 2].

    The first of several answers counts.
    """
    labels = np.zeros((1 + len(characters), 2), dtype=np.float32)
    begin = end = 0
    if answers and len(characters) and characters[0, 0] <= answers[0].begin and characters[-1, 1] >= answers[0].end:
        begin = int(np.searchsorted(characters[:, 0], answers[0].begin, side="right"))
        end = 1 + int(np.searchsorted(characters[:, 1], answers[0].end))
    labels[begin, 0] = labels[end, 1] = 1
    return labels
