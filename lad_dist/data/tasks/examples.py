"""Tokenized examples of a task: what the head reads of them, what it should say there, and how good an answer is.

    tokenize(task, raw, …)   Texts, Sentences or Questions -> their TaskExamples
    TaskExamples             numbered from 0, a sequence each; batches of them
    TextExamples             one row each, the first token
    TaggingExamples          a row for each word, its first token; a long sentence is several examples
    QuestionExamples         a window of a context each; rows are its tokens, and the first token for "no answer"

R rows of all examples, V outputs of the head.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.core.collate import collate, span_starts
from lad_dist.data.tasks import metrics
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.squad import Answer, AnswerWindows, Questions, find_answers
from lad_dist.data.tasks.tagging import Sentences
from lad_dist.data.tasks.task import RawExamples, Task
from lad_dist.data.tokenization.encoding import (
    EncodedSequences,
    EncodedWords,
    encode_framed,
    encode_windows,
    encode_words,
    refuse_unknown,
)
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast
from lad_dist.data.tokenization.special_tokens import Frame, frame_of
from lad_dist.distributed import processes

DEV_EXAMPLES = 64
CHECKED_EXAMPLES = 500
FIRST = np.zeros(1, dtype=np.int64)

Logits = NDArray[np.floating]
Batches = list[Callable[[], Batch]]


class TaskExamples:
    """Sequences, in each of them rows that the head reads, and what it should say there."""

    def __init__(
        self,
        encoded: EncodedSequences,
        rows: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
        tokenizer: PreTrainedTokenizerFast,
        what: str,
        pad_to: int | None,
    ) -> None:
        """rows: int64, places in the sequence; labels: one for each row; `what` names the examples in complaints.
        Raises UserError when the tokenizer does not know the text."""
        refuse_unknown(tokenizer, encoded.ids[:CHECKED_EXAMPLES], what)
        self._encoded, self._rows, self._labels = encoded, rows, labels
        self._pad, self._pad_to = frame_of(tokenizer).pad, pad_to

    def score(self, logits: Logits) -> dict[str, float]:
        """The task's metrics of logits [R, V]."""
        raise NotImplementedError

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        """How far a student decides as its teacher does, from logits [R, V] of both."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """Of all examples, padding that was asked for included."""
        return self.count * self._pad_to if self._pad_to else sum(map(len, self._encoded.ids))

    @cached_property
    def labels(self) -> np.ndarray:
        """Of all rows."""
        return np.concatenate(self._labels)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that a model sees of them."""
        total = hashlib.sha256(f"{self._pad_to} {self._pad}".encode())
        for ids, segments, rows in zip(self._encoded.ids, self._encoded.segments, self._rows, strict=True):
            total.update(len(ids).to_bytes(4, "little") + ids.tobytes() + segments.tobytes() + rows.tobytes())
        return total.hexdigest()

    def batch(self, numbers: np.ndarray) -> Batch:
        sequences = [self._encoded.ids[example] for example in numbers]
        segments = [self._encoded.segments[example] for example in numbers]
        starts = span_starts(sequences, self._pad_to)[:-1]
        rows = np.concatenate([start + self._rows[n] for start, n in zip(starts, numbers, strict=True)])
        labels = np.concatenate([self._labels[example] for example in numbers])
        return collate(sequences, segments, rows, labels, self._pad_to, self._pad)

    def in_order(self) -> Batches:
        """All of them, in batches."""
        everything = np.arange(self.count)
        return [partial(self.batch, everything[i : i + DEV_EXAMPLES]) for i in range(0, len(everything), DEV_EXAMPLES)]


def tokenize(
    task: Task,
    raw: RawExamples,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskDataConfig,
    what: str,
    pad_to: int | None = None,
) -> TaskExamples:
    """`what` names them in complaints. Raises UserError when the tokenizer does not know the text."""
    kinds: dict[type[Any], Any] = {
        Texts: TextExamples,
        Sentences: TaggingExamples,
        Questions: QuestionExamples,
    }
    return kinds[type(raw)](task, raw, tokenizer, data, what, pad_to)


class TextExamples(TaskExamples):
    def __init__(
        self,
        task: Task,
        raw: Texts,
        tokenizer: PreTrainedTokenizerFast,
        data: TaskDataConfig,
        what: str,
        pad_to: int | None,
    ) -> None:
        encoded = encode_framed(tokenizer, raw.texts, raw.pairs, data.max_length)
        super().__init__(encoded, [FIRST] * len(encoded.ids), list(raw.labels[:, None]), tokenizer, what, pad_to)
        self._metrics = task.metrics

    def score(self, logits: Logits) -> dict[str, float]:
        return metrics.score(self._metrics, logits, self.labels)

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        return metrics.loyalty(student, teacher)


class TaggingExamples(TaskExamples):
    """Rows are all words of all sentences, in order."""

    def __init__(
        self,
        task: Task,
        raw: Sentences,
        tokenizer: PreTrainedTokenizerFast,
        data: TaskDataConfig,
        what: str,
        pad_to: int | None,
    ) -> None:
        frame = frame_of(tokenizer)
        ids: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for words, tags in zip(encode_words(tokenizer, raw.words), raw.tags, strict=True):
            for first, end in pairwise(split_sentence(words, data.max_length - frame.size)):
                sequence, places = _sequence_of_words(words, first, end, frame, data.max_length)
                ids.append(sequence)
                rows.append(places)
                labels.append(tags[first:end])
        segments = [np.zeros(len(sequence), dtype=np.uint8) for sequence in ids]
        super().__init__(EncodedSequences(ids, segments), rows, labels, tokenizer, what, pad_to)
        self._metrics, self._names = task.metrics, task.label_names
        self._sentences = np.cumsum([len(words) for words in raw.words])

    def score(self, logits: Logits) -> dict[str, float]:
        gold, predicted = self._tags(self.labels), self._tags(logits.argmax(axis=1))
        found = {**metrics.entities(gold, predicted), "accuracy": metrics.accuracy(self.labels, logits.argmax(axis=1))}
        return {name: found[name] for name in self._metrics}

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        return metrics.loyalty(student, teacher)

    def _tags(self, numbers: np.ndarray) -> list[list[str]]:
        """Class ids [R] to tags, sentence by sentence."""
        return [[self._names[n] for n in part] for part in np.split(numbers, self._sentences[:-1])]


def split_sentence(words: EncodedWords, room: int) -> list[int]:
    """Borders between words, from 0 to the last word's end, so that what stands between two of them takes at most
    `room` tokens, a longer word alone excepted; pieces are about as long as each other."""
    total = len(words.ids)
    aim = -(-total // -(-total // room))
    ends = [*words.firsts[1:].tolist(), total]
    borders, begin = [0], 0
    for word, first in enumerate(words.firsts.tolist()):
        if word and (ends[word] - begin > room or first - begin >= aim):
            borders.append(word)
            begin = first
    return [*borders, len(words.firsts)]


def _sequence_of_words(
    words: EncodedWords, first: int, end: int, frame: Frame, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and rows of words first … end - 1. Of a word that does not fit, its first tokens are there."""
    borders = [0, *words.firsts[1:].tolist(), len(words.ids)]
    begin = borders[first]
    content = words.ids[begin : borders[end]][: max_length - frame.size]
    sequence = np.concatenate([frame.before, content, frame.after]).astype(np.int32)
    return sequence, words.firsts[first:end] - begin + len(frame.before)


class QuestionExamples(TaskExamples):
    """Labels are [R, 2]: 1 in the row where the answer begins, and in that where it ends; in the first token's where
    the window lacks it."""

    def __init__(
        self,
        task: Task,
        raw: Questions,
        tokenizer: PreTrainedTokenizerFast,
        data: TaskDataConfig,
        what: str,
        pad_to: int | None,
    ) -> None:
        windows = encode_windows(tokenizer, raw.questions, raw.contexts, data.max_length, data.overlap)
        rows = [np.concatenate([FIRST, np.arange(part.start, part.stop)]) for part in windows.context]
        labels = [
            _answer_labels(raw.answers[question], characters)
            for question, characters in zip(windows.question.tolist(), windows.characters, strict=True)
        ]
        super().__init__(windows.encoded, rows, labels, tokenizer, what, pad_to)
        _warn_of_lost(raw, windows.question, labels, what)
        self._raw, self._data, self._metrics = raw, data, task.metrics
        nothing = np.zeros((1, 2), dtype=np.int64)
        characters = np.concatenate([x for each in windows.characters for x in (nothing, each)])
        self._places = AnswerWindows(windows.question, np.cumsum([0, *map(len, rows)]), characters)

    def answers(self, logits: Logits) -> list[str]:
        """The answer to each question."""
        return find_answers(
            logits, self._places, self._raw, self._data.max_answer_length, self._data.null_score_diff_threshold
        )

    def score(self, logits: Logits) -> dict[str, float]:
        golds = [[answer.text for answer in answers] for answers in self._raw.answers]
        found = metrics.answers(self.answers(logits), golds, self._raw.unanswerable)
        return {name: found[name] for name in self._metrics}

    def loyalty(self, student: Logits, teacher: Logits) -> dict[str, float]:
        equal = [mine == theirs for mine, theirs in zip(self.answers(student), self.answers(teacher), strict=True)]
        return {
            "label_loyalty": sum(equal) / len(equal),
            "probability_loyalty": metrics.likeness(student, teacher, self._places.starts[:-1]),
        }


def _answer_labels(answers: Sequence[Answer], characters: np.ndarray) -> np.ndarray:
    """float32 [rows, 2] of a window whose tokens stand for these characters [tokens, 2]; of several answers the first
    one counts."""
    labels = np.zeros((1 + len(characters), 2), dtype=np.float32)
    begin = end = 0
    if answers and len(characters) and _holds(characters, answers[0]):
        begin = int(np.searchsorted(characters[:, 0], answers[0].begin, side="right"))
        end = 1 + int(np.searchsorted(characters[:, 1], answers[0].end))
    labels[begin, 0] = labels[end, 1] = 1
    return labels


def _holds(characters: np.ndarray, answer: Answer) -> bool:
    return bool(characters[0, 0] <= answer.begin and characters[-1, 1] >= answer.end)


def _warn_of_lost(raw: Questions, question: np.ndarray, labels: Sequence[np.ndarray], what: str) -> None:
    """Says how many answers are in no window as a whole, so that each says "no answer"."""
    found = {number for number, each in zip(question.tolist(), labels, strict=True) if not each[0, 0]}
    lost = sum(bool(answers) and number not in found for number, answers in enumerate(raw.answers))
    if lost and processes.is_main():
        print(
            f"{what}: {lost} of {len(raw.answers)} answers are in no window as a whole; "
            "raise data.doc_stride or data.max_length",
            file=sys.stderr,
        )
