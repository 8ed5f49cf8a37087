"""Metrics: plain functions on arrays and lists, and loyalty to a teacher.

scipy.stats and sklearn are imported where a metric is computed: they are a sixth of what a process imports.

E examples or words, C classes, R rows of all windows.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating] | NDArray[np.integer]
Metric = Callable[[Array, Array], Any]  # of labels and predictions


def score(
    names: Sequence[str], logits: NDArray[np.floating], labels: Array, positive: int | None = None
) -> dict[str, float]:
    """Return the named metrics of finite logits [E, C] ([E, 1] for regression) against labels [E].

    `f1` is that of the class `positive`; `f1_macro` is the mean over the classes that occur among the labels.
    """
    assert np.isfinite(logits).all()
    predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
    metrics: dict[str, Metric] = METRICS if positive is None else METRICS | {"f1": partial(_f1, positive)}
    return {name: float(metrics[name](labels, predicted)) for name in names}


def _accuracy(labels: Array, predicted: Array) -> Any:
    from sklearn.metrics import accuracy_score  # noqa: PLC0415 (seconds)

    return accuracy_score(labels, predicted)


def _matthews(labels: Array, predicted: Array) -> Any:
    from sklearn.metrics import matthews_corrcoef  # noqa: PLC0415 (seconds)

    return matthews_corrcoef(labels, predicted)


def _f1(positive: int, labels: Array, predicted: Array) -> Any:
    from sklearn.metrics import f1_score  # noqa: PLC0415 (seconds)

    return f1_score(labels == positive, predicted == positive, zero_division=0)


def _f1_macro(labels: Array, predicted: Array) -> Any:
    from sklearn.metrics import f1_score  # noqa: PLC0415 (seconds)

    return f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)


def _pearson(labels: Array, predicted: Array) -> float:
    from scipy.stats import pearsonr  # noqa: PLC0415 (seconds)

    return _correlation(pearsonr, labels, predicted)


def _spearman(labels: Array, predicted: Array) -> float:
    from scipy.stats import spearmanr  # noqa: PLC0415 (seconds)

    return _correlation(spearmanr, labels, predicted)


def _correlation(test: Callable[[Array, Array], Any], labels: Array, predicted: Array) -> float:
    return test(labels, predicted).statistic if np.ptp(labels) and np.ptp(predicted) else 0.0


def best_output_order(logits: NDArray[np.floating], labels: Array) -> NDArray[np.integer]:
    """Return the class [C] that each output of logits [E, C] stands for, so that most decisions equal the labels.

    Labels are [E], or 0 and 1 [E, C] where an example may have several. The outputs stand for the classes in order,
    unless another order is right in clearly more decisions: by three standard deviations of the difference.
    """
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (seconds)

    classes = np.arange(logits.shape[1])
    if labels.ndim == 2:
        predicted, gold = logits >= 0, labels > 0
        order = linear_sum_assignment(predicted.T.astype(np.float64) @ gold, maximize=True)[1]
        right, right_in_order = predicted == gold, predicted[:, order.argsort()] == gold
    else:
        predicted = logits.argmax(axis=1)
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (predicted, labels.astype(np.int64)), 1)
        order = linear_sum_assignment(counts, maximize=True)[1]
        right, right_in_order = predicted == labels, order[predicted] == labels
    gained, lost = (right_in_order & ~right).sum(), (right & ~right_in_order).sum()
    return order if gained - lost > 3 * math.sqrt(gained + lost) else classes


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1_macro": _f1_macro,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def mean_loss(logits: NDArray[np.floating], labels: Array) -> float:
    """Return the cross-entropy of finite logits [E, C] against labels [E], a mean; of [E, 1] the mean squared error."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:
        return float(np.square(logits[:, 0] - labels).mean())
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), labels]).mean())


def mean_window_loss(logits: NDArray[np.floating], labels: Array, starts: NDArray[np.integer]) -> float:
    """Return the cross-entropy of begins and ends, finite logits [R, 2], a mean over both and over windows.

    Args:
        logits: Two distributions over the rows of each window.
        labels: [R, 2], 1 in the row of the answer, 0 elsewhere.
        starts: The first row of each window.
    """
    logits = logits.astype(np.float64)
    totals = np.logaddexp.reduceat(logits, starts, axis=0).sum()
    return float((totals - (labels * logits).sum()) / (2 * len(starts)))


def loyalty(student: NDArray[np.floating], teacher: NDArray[np.floating]) -> dict[str, float]:
    """Return how far a student decides as its teacher does, from logits [E, C] of both (Xu et al., 2021).

    `label_loyalty` is the share of equal decisions. `probability_loyalty` is 1 - the Jensen-Shannon distance (base 2)
    of the distributions, mean over examples. For a regression it is the correlation of the outputs, `teacher_pearson`.
    """
    if student.shape[1] == 1:
        return {"teacher_pearson": float(_pearson(teacher[:, 0], student[:, 0]))}
    return {
        "label_loyalty": float((student.argmax(axis=1) == teacher.argmax(axis=1)).mean()),
        "probability_loyalty": float(1 - jensen_shannon_distance(student, teacher, axis=1).mean()),
    }


def jensen_shannon_distance(
    student: NDArray[np.floating], teacher: NDArray[np.floating], axis: int
) -> NDArray[np.floating]:
    """Return the Jensen-Shannon distance (base 2) of the distributions that finite logits say along an axis."""
    from scipy.spatial.distance import jensenshannon  # noqa: PLC0415 (seconds)
    from scipy.special import softmax  # noqa: PLC0415 (seconds)

    assert np.isfinite(student).all()
    assert np.isfinite(teacher).all()
    with np.errstate(invalid="ignore"):  # rounding takes equal ones below 0, and its root is NaN
        distance = jensenshannon(softmax(student, axis=axis), softmax(teacher, axis=axis), base=2, axis=axis)
    return np.nan_to_num(distance)


def window_probability_loyalty(
    student: NDArray[np.floating], teacher: NDArray[np.floating], starts: NDArray[np.integer]
) -> float:
    """Return 1 - the Jensen-Shannon distance (base 2) of two distributions over each window's rows.

    The distributions are the softmax of logits [R, 2] over the rows of a window. The result is the mean over windows
    and both columns; `starts` are the windows' first rows.
    """
    students, teachers = (np.split(x.astype(np.float64), starts[1:]) for x in (student, teacher))
    return float(1 - np.mean([jensen_shannon_distance(*pair, 0) for pair in zip(students, teachers, strict=True)]))


def entity_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall and F1 over the entities of all sentences.

    A predicted entity is correct where borders and kind are (conlleval, Tjong Kim Sang & De Meulder, 2003; seqeval's
    default mode). Tags are BIO (IOB1 or IOB2), IOBES or BILOU.
    """
    gold_entities, predicted_entities = _entities(gold), _entities(predicted)
    correct = len(gold_entities & predicted_entities)
    total = len(gold_entities) + len(predicted_entities)
    return {
        "precision": correct / len(predicted_entities) if predicted_entities else 0.0,
        "recall": correct / len(gold_entities) if gold_entities else 0.0,
        "f1": 2 * correct / total if total else 0.0,
    }


def _entities(sentences: Sequence[Sequence[str]]) -> set[tuple[int, int, int, str]]:
    """Return (sentence, first word, end, kind) of each entity."""
    entities = set()
    for number, sentence in enumerate(sentences):
        tags = [tag.partition("-")[::2] for tag in sentence]  # (prefix, kind)
        begins = [n for n, tag in enumerate(tags) if _begins_entity(tags[n - 1] if n else ("O", ""), tag)]
        for begin, limit in pairwise([*begins, len(tags)]):
            outside = (n for n in range(begin, limit) if tags[n][0] == "O")
            entities.add((number, begin, next(outside, limit), tags[begin][1]))
    return entities


def _begins_entity(before: tuple[str, str], tag: tuple[str, str]) -> bool:
    """Return whether a word of this (prefix, kind) begins an entity after a word of (prefix, kind) `before`."""
    if tag[0] == "O":
        return False
    return tag[0] in "BSU" or before[0] in "OELSU" or tag[1] != before[1]


def answer_metrics(predicted: Sequence[str], golds: Sequence[Sequence[str]], unanswerable: bool) -> dict[str, float]:
    """Return exact match and F1 over normalised words, mean over questions (Rajpurkar et al., 2016).

    The best of each question's answers counts. Where some questions are unanswerable, as in SQuAD 2.0, an empty answer
    is right for those alone, and the F1 of both kinds of question is added.
    """
    exact, f1 = [], []
    for answer, gold in zip(predicted, golds, strict=True):
        texts = [text for text in gold if not unanswerable or normalised(text)] or [""]
        exact.append(max(float(normalised(answer) == normalised(text)) for text in texts))
        f1.append(max(_words_f1(normalised(answer).split(), normalised(text).split(), unanswerable) for text in texts))
    metrics = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    if unanswerable:
        answerable = np.array([any(map(normalised, gold)) for gold in golds])
        for name, selected in (("f1_answerable", answerable), ("f1_unanswerable", ~answerable)):
            metrics[name] = float(np.array(f1)[selected].mean()) if selected.any() else 0.0
    return metrics


def normalised(answer: str) -> str:
    """Return the answer in lower case, without ASCII punctuation and articles, with one blank between words."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _words_f1(answer: list[str], gold: list[str], unanswerable: bool) -> float:
    if unanswerable and not (answer and gold):
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold)) if common else 0.0
