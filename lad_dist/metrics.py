"""Metrics: plain functions on arrays, GLUE's by the names that `data/tasks.py` gives each task, and loyalty to a
teacher.

E examples, C classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
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


METRICS = {
    "accuracy": accuracy_score,
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
    distance = jensenshannon(softmax(student, axis=1), softmax(teacher, axis=1), base=2, axis=1)
    return {
        "label_loyalty": float((student.argmax(axis=1) == teacher.argmax(axis=1)).mean()),
        "probability_loyalty": float(1 - np.nan_to_num(distance).mean()),
    }
