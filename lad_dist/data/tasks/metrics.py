"""Metrics: plain functions on arrays and lists, and loyalty to a teacher.

    score       classification and regression, by the names that `data/tasks.py` gives each task
    accuracy    the share of equal class ids
    entities    named entities, as conlleval counts them
    answers     questions, as SQuAD's own scripts do
    loyalty     of decisions and distributions
    likeness    of distributions over the rows of each window

E examples or words, C classes, R rows of all windows.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Array = NDArray[np.floating] | NDArray[np.integer]


def score(names: Sequence[str], logits: NDArray[np.floating], labels: Array) -> dict[str, float]:
    """The named metrics of logits [E, C] ([E, 1] for regression) against labels [E]."""
    predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
    return {name: float(METRICS[name](labels, predicted)) for name in names}


def _f1(labels: Array, predicted: Array) -> float:
    return f1_score(labels, predicted, average="binary" if max(labels.max(), predicted.max()) <= 1 else "macro")


def _pearson(labels: Array, predicted: Array) -> float:
    return pearsonr(labels, predicted).statistic if np.ptp(predicted) else 0.0


def _spearman(labels: Array, predicted: Array) -> float:
    return spearmanr(labels, predicted).statistic if np.ptp(predicted) else 0.0


def accuracy(labels: Array, predicted: Array) -> float:
    return float(accuracy_score(labels, predicted))


METRICS = {
    "accuracy": accuracy,
    "f1": _f1,
    "matthews": matthews_corrcoef,
    "pearson": _pearson,
    "spearman": _spearman,
}


def loyalty(student: NDArray[np.floating], teacher: NDArray[np.floating]) -> dict[str, float]:
    """How far a student decides as its teacher does, from logits [E, C] of both (Xu et al., 2021): `label_loyalty` is
    the share of equal decisions, `probability_loyalty` 1 - the Jensen-Shannon distance (base 2) of their
    distributions, mean over examples. For regression the correlation of their outputs, `teacher_pearson`."""
    if student.shape[1] == 1:
        return {"teacher_pearson": float(_pearson(teacher[:, 0], student[:, 0]))}
    with np.errstate(invalid="ignore"):  # rounding takes equal ones below 0, and its root is NaN
        distance = jensenshannon(softmax(student, axis=1), softmax(teacher, axis=1), base=2, axis=1)
    return {
        "label_loyalty": float((student.argmax(axis=1) == teacher.argmax(axis=1)).mean()),
        "probability_loyalty": float(1 - np.nan_to_num(distance).mean()),
    }


def likeness(student: NDArray[np.floating], teacher: NDArray[np.floating], starts: NDArray[np.integer]) -> float:
    """1 - the Jensen-Shannon distance (base 2) of the distributions that logits [R, 2] of both are over each window's
    rows, mean over windows and both columns; `starts` are the windows' first rows."""
    p, q = (_softmax_by_window(x, starts) for x in (student, teacher))
    divergence = (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)) / (2 * np.log(2))
    return float(1 - np.sqrt(np.maximum(np.add.reduceat(divergence, starts), 0)).mean())


def _softmax_by_window(x: NDArray[np.floating], starts: NDArray[np.integer]) -> NDArray[np.floating]:
    sizes = np.diff(np.append(starts, len(x)))
    powers = np.exp(x.astype(np.float64) - np.repeat(np.maximum.reduceat(x, starts), sizes, axis=0))
    return powers / np.repeat(np.add.reduceat(powers, starts), sizes, axis=0)


class Entity(NamedTuple):
    """Words begin … end - 1 of a sentence."""

    sentence: int
    begin: int
    end: int
    kind: str


def entities(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over the entities of all sentences: one counts as found where borders and kind are right
    (conlleval, Tjong Kim Sang & De Meulder, 2003; seqeval's default mode). Tags are BIO (IOB1 or IOB2), IOBES or
    BILOU."""
    there, said = (set(found) for found in (_entities(gold), _entities(predicted)))
    right = len(there & said)
    return {
        "precision": right / len(said) if said else 0.0,
        "recall": right / len(there) if there else 0.0,
        "f1": 2 * right / (len(there) + len(said)) if there or said else 0.0,
    }


def _entities(sentences: Sequence[Sequence[str]]) -> list[Entity]:
    found = []
    for number, tags in enumerate(sentences):
        parts = [tag.partition("-")[::2] for tag in tags]
        begins = [n for n, part in enumerate(parts) if _begins(parts[n - 1] if n else ("O", ""), part)]
        for begin, limit in pairwise([*begins, len(parts)]):
            outside = (n for n in range(begin, limit) if parts[n][0] == "O")
            found.append(Entity(number, begin, next(outside, limit), parts[begin][1]))
    return found


def _begins(before: tuple[str, str], part: tuple[str, str]) -> bool:
    """Whether a word with this (prefix, kind) begins an entity after one with that."""
    if part[0] == "O":
        return False
    return part[0] in "BSU" or before[0] in "OELSU" or part[1] != before[1]


def answers(predicted: Sequence[str], golds: Sequence[Sequence[str]], unanswerable: bool) -> dict[str, float]:
    """Exact match and F1 over words, normalised, the best over each question's answers, mean over questions
    (Rajpurkar et al., 2016). Where some are unanswerable, as in SQuAD 2.0, an empty answer is right for those alone;
    F1 of both kinds of question is given beside."""
    exact, f1 = [], []
    for answer, gold in zip(predicted, golds, strict=True):
        texts = [text for text in gold if not unanswerable or normalised(text)] or [""]
        exact.append(max(float(normalised(answer) == normalised(text)) for text in texts))
        f1.append(max(_words_f1(normalised(answer).split(), normalised(text).split(), unanswerable) for text in texts))
    found = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    if unanswerable:
        answerable = np.array([any(map(normalised, gold)) for gold in golds])
        for name, mine in (("f1_answerable", answerable), ("f1_unanswerable", ~answerable)):
            found[name] = float(np.array(f1)[mine].mean()) if mine.any() else 0.0
    return found


def normalised(answer: str) -> str:
    """In lower case, without ASCII punctuation, articles and blanks between words but one."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _words_f1(answer: list[str], gold: list[str], unanswerable: bool) -> float:
    if unanswerable and not (answer and gold):
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold)) if common else 0.0
