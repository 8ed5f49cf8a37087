"""Metrics of tasks that give an example several labels, and the thresholds from which on it gets them.

A label is given where the sigmoid of its logit reaches the label's threshold. sklearn and scipy are imported where they
are used: they are a sixth of what a process imports.

E examples, V labels. Logits [E, V] are finite, labels [E, V] are 0 and 1, thresholds [V] are in the order of labels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lad_dist.data.tasks.metrics import Array, jensen_shannon_distance

METRICS = ("f1_micro", "f1_macro", "subset_accuracy")
DEFAULT_THRESHOLD = 0.5

Logits = NDArray[np.floating]


def decisions(logits: Logits, thresholds: float | Sequence[float] = DEFAULT_THRESHOLD) -> NDArray[np.bool_]:
    """Return whether each example gets each label [E, V]."""
    return probabilities(logits) >= np.asarray(thresholds)


def probabilities(logits: Logits) -> NDArray[np.float64]:
    """Return the probability of each label [E, V]."""
    from scipy.special import expit  # noqa: PLC0415 (seconds)

    assert np.isfinite(logits).all()
    return expit(logits.astype(np.float64))


def score(logits: Logits, labels: Array, thresholds: float | Sequence[float] = DEFAULT_THRESHOLD) -> dict[str, float]:
    """Return F1 over all decisions, its mean over the labels that occur, and the share of examples without a mistake.

    A mean over no label is 0.
    """
    from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415 (seconds)

    gold, predicted = labels > 0, decisions(logits, thresholds)
    occurring = gold.any(axis=0)
    by_label = f1_score(gold, predicted, average=None, zero_division=0)
    return {
        "f1_micro": float(f1_score(gold, predicted, average="micro", zero_division=0)),
        "f1_macro": float(by_label[occurring].mean()) if occurring.any() else 0.0,
        "subset_accuracy": float(accuracy_score(gold, predicted)),
    }


def tuned_thresholds(logits: Logits, labels: Array) -> tuple[float, ...]:
    """Return the threshold of each label that maximises the F1 of that label's decisions.

    Candidates are 0.5 and the middle between each two neighbouring probabilities, 0 among them. Of equally good ones
    the nearest to 0.5 is taken, and of two as near the lower. So a label that no example has keeps 0.5.
    """
    return tuple(_tuned_threshold(*pair) for pair in zip(probabilities(logits).T, labels.T > 0, strict=True))


def _tuned_threshold(values: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> float:
    levels, positives = np.unique(values), np.sort(values[is_positive])
    middles = (np.concatenate([[0.0], levels[:-1]]) + levels) / 2
    candidates = np.concatenate([[DEFAULT_THRESHOLD], middles])
    predicted = len(values) - np.searchsorted(np.sort(values), candidates)
    right = len(positives) - np.searchsorted(positives, candidates)
    f1 = 2 * right / np.maximum(predicted + len(positives), 1)
    best = candidates[f1 == f1.max()].tolist()
    return min(best, key=lambda threshold: (abs(threshold - DEFAULT_THRESHOLD), threshold))


def constant_answer(labels: Array) -> NDArray[np.bool_]:
    """Return the labels bool [V] that, given to every example, have the highest micro F1."""
    counts = labels.sum(axis=0)
    order = np.argsort(-counts, kind="stable")
    right, given = np.cumsum(counts[order]), len(labels) * np.arange(1, len(counts) + 1)
    answer = np.zeros(len(counts), dtype=bool)
    answer[order[: 1 + int(np.argmax(2 * right / (given + counts.sum())))]] = True
    return answer


def mean_loss(logits: Logits, labels: Array) -> float:
    """Return the binary cross-entropy, mean over examples and labels."""
    logits = logits.astype(np.float64)
    return float((np.logaddexp(0, logits) - labels * logits).mean())


def constant_loss(labels: Array) -> float:
    """Return the binary cross-entropy of each label's share of the examples, mean over labels: of no model at all."""
    from scipy.special import entr  # noqa: PLC0415 (seconds)

    shares = labels.mean(axis=0, dtype=np.float64)
    return float((entr(shares) + entr(1 - shares)).mean())


def loyalty(student: Logits, teacher: Logits) -> dict[str, float]:
    """Return how far a student decides as its teacher does, mean over examples and labels (after Xu et al., 2021).

    `label_loyalty` is the share of equal decisions at 0.5. `probability_loyalty` is 1 - the Jensen-Shannon distance
    (base 2) of the Bernoulli distributions.
    """
    pair = [np.stack([x, np.zeros_like(x)], axis=-1) for x in (student.astype(np.float64), teacher.astype(np.float64))]
    return {
        "label_loyalty": float((decisions(student) == decisions(teacher)).mean()),
        "probability_loyalty": float(1 - jensen_shannon_distance(pair[0], pair[1], axis=-1).mean()),
    }
