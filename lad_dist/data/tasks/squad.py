"""Questions about texts, in SQuAD's JSON (Rajpurkar et al., 2016, version 1.1; 2018, version 2.0).

A file is {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text", "answer_start"}]}]}]}]}. A
question without answers, or with "is_impossible": true, has none in its context, as in version 2.0.

R rows that the head reads: the first token of each window, which stands for "no answer", and the context's tokens.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lad_dist.config.errors import UserError
from lad_dist.utils.strict_json import parse_json


class Answer(NamedTuple):
    """A stretch of a context."""

    text: str
    begin: int  # the first character in the context

    @property
    def end(self) -> int:
        """Return the end of the answer in the context."""
        return self.begin + len(self.text)


class Questions(NamedTuple):
    """n questions, each with its context and the answers that people gave."""

    questions: list[str]
    contexts: list[str]
    answers: list[list[Answer]]
    unanswerable: bool  # whether some question of the task has no answer


class AnswerWindows(NamedTuple):
    """The rows of all windows, end to end."""

    question: np.ndarray  # int64 [windows]: the question of each, ascending
    starts: np.ndarray  # int64 [windows + 1]: where each window's rows begin
    characters: np.ndarray  # int64 [R, 2]: the characters of the context that each stands for


def load_squad(files: Sequence[Path]) -> list[Questions]:
    """Return the questions of each file. Raise UserError, with file and place, for a mistake in one."""
    read = [read_squad(file) for file in files]
    unanswerable = any(not answers for questions in read for answers in questions.answers)
    return [questions._replace(unanswerable=unanswerable) for questions in read]


def read_squad(file: Path, labelled: bool = True) -> Questions:
    """Return the questions of a file; unless `labelled`, entries may lack answers, and then have none.

    Raises:
        UserError: The file has a mistake; the message names the place.
    """
    questions = Questions([], [], [], False)
    try:
        content = parse_json(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (at byte {error.start}); convert the file first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    for a, article in enumerate(_list(content, "data", str(file))):
        in_article = f"{file}: data[{a}]"
        for p, paragraph in enumerate(_list(article, "paragraphs", in_article)):
            in_paragraph = f"{in_article}.paragraphs[{p}]"
            context = _text(paragraph, "context", in_paragraph)
            for q, entry in enumerate(_list(paragraph, "qas", in_paragraph)):
                in_entry = f"{in_paragraph}.qas[{q}]"
                questions.questions.append(_text(entry, "question", in_entry).strip())
                questions.contexts.append(context)
                has_answers = labelled or "answers" in entry
                questions.answers.append(_answers(entry, context, in_entry) if has_answers else [])
    if not questions.questions:
        raise UserError(f"{file}: no questions")
    return questions


def _list(table: Any, key: str, where: str) -> list[Any]:
    if not isinstance(table, dict) or not isinstance(table.get(key), list):
        raise UserError(f'{where}: no list "{key}"; SQuAD\'s JSON has one')
    return table[key]


def _text(table: Any, key: str, where: str) -> str:
    if not isinstance(table, dict) or not isinstance(table.get(key), str) or not table[key].strip():
        raise UserError(f'{where}: no text "{key}"; SQuAD\'s JSON has one')
    return table[key]


def _answers(entry: dict[str, Any], context: str, where: str) -> list[Answer]:
    if entry.get("is_impossible", False) is True:
        return []
    answers = _list(entry, "answers", where)
    return [_answer(answer, context, f"{where}.answers[{n}]") for n, answer in enumerate(answers)]


def _answer(answer: Any, context: str, where: str) -> Answer:
    text = _text(answer, "text", where)
    begin = answer.get("answer_start")
    if not isinstance(begin, int) or isinstance(begin, bool) or begin < 0:
        raise UserError(f"{where}: answer_start is {begin!r}, not a place in the context")
    if context[begin : begin + len(text)] != text:
        actual = context[begin : begin + len(text)]
        raise UserError(f'{where}: at answer_start {begin} the context has "{actual}", not "{text}"')
    return Answer(text.strip(), begin + len(text) - len(text.lstrip()))


READERS = {".json": read_squad}


def find_answers(
    logits: NDArray[np.floating], rows: AnswerWindows, questions: Questions, max_length: int, threshold: float
) -> list[str]:
    """Return the answer to each question, from logits [R, 2] of begins and ends.

    It is the stretch of at most `max_length` tokens with the greatest sum of both logits in any window. Where questions
    may lack answers, it is "" when the least sum of any window's first token exceeds that sum by more than `threshold`
    (Devlin et al., 2019, section 4.3).
    """
    best = np.full(len(questions.questions), -np.inf)
    none = np.full(len(questions.questions), np.inf)
    answers = [""] * len(questions.questions)
    for question, (first, end) in zip(rows.question.tolist(), pairwise(rows.starts.tolist()), strict=True):
        none[question] = min(none[question], float(logits[first].sum()))
        score, begin, last = _best_stretch(logits[first + 1 : end], max_length)
        if score > best[question]:
            best[question] = score
            span = rows.characters[first + 1 + begin, 0], rows.characters[first + 1 + last, 1]
            answers[question] = questions.contexts[question][slice(*span)].strip()
    lacking = none - best > threshold if questions.unanswerable else np.zeros(len(best), dtype=bool)
    return ["" if lacks else answer for lacks, answer in zip(lacking.tolist(), answers, strict=True)]


def _best_stretch(logits: NDArray[np.floating], max_length: int) -> tuple[float, int, int]:
    """Return (sum, first token, last token) of the best stretch of logits [T, 2]."""
    best = (-np.inf, 0, 0)
    for more in range(min(max_length, len(logits))):
        sums = logits[: len(logits) - more, 0] + logits[more:, 1]
        begin = int(sums.argmax())
        if sums[begin] > best[0]:
            best = (float(sums[begin]), begin, begin + more)
    return best
