"""What a classifier gets right and how sure it is: by class, as confusion matrix, and as calibration.

E examples, C classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lad_dist.data.tasks.metrics import mean_loss

BINS = 15  # of equal width, as in Guo et al., 2017
TEMPERATURES = (0.01, 100.0)  # limits of the search

Logits = NDArray[np.floating]
Labels = NDArray[np.integer]


class Calibration(NamedTuple):
    """How far the confidence of decisions is their accuracy.

    The confidence of a decision is the probability of its label.
    """

    ece: float  # expected calibration error
    accuracy: float
    confidence: float  # mean over the decisions
    nll: float  # negative log-likelihood of the labels, mean over the examples
    bins: list[dict[str, float]]  # not empty: lower and upper bound, count, mean confidence, accuracy


def class_scores(logits: Logits, labels: Labels, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return precision, recall, f1 and support of each class by its name, from logits [E, C] and labels [E]."""
    from sklearn.metrics import precision_recall_fscore_support  # noqa: PLC0415 (seconds)

    columns = precision_recall_fscore_support(
        labels, logits.argmax(axis=1), labels=np.arange(len(names)), zero_division=0
    )
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    return {name: {"precision": p, "recall": r, "f1": f1, "support": support} for name, p, r, f1, support in rows}


def confusion(logits: Logits, labels: Labels) -> list[list[int]]:
    """Return [C, C]: how many examples of each class (rows) were taken for each class (columns)."""
    from sklearn.metrics import confusion_matrix  # noqa: PLC0415 (seconds)

    matrix: list[list[int]] = confusion_matrix(
        labels, logits.argmax(axis=1), labels=np.arange(logits.shape[1])
    ).tolist()
    return matrix


def calibration(logits: Logits, labels: Labels) -> Calibration:
    """Return the calibration of finite logits [E, C] against labels [E] (Guo et al., 2017).

    The expected calibration error is the mean over decisions of |accuracy - confidence| of their bin; bin b of B holds
    those of a confidence above (b - 1) / B, up to b / B.
    """
    logits = logits.astype(np.float64)
    confidence = np.exp(logits.max(axis=1) - np.logaddexp.reduce(logits, axis=1))
    correct = logits.argmax(axis=1) == labels
    numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        means = {"confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean())}
        bins.append({"lower": number / BINS, "upper": (number + 1) / BINS, "count": int(inside.sum()), **means})
    ece = sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / len(labels)
    return Calibration(ece, float(correct.mean()), float(confidence.mean()), mean_loss(logits, labels), bins)


def fit_temperature(logits: Logits, labels: Labels) -> float:
    """Return the T that minimises the negative log-likelihood of softmax(logits / T) (Guo et al., 2017).

    It is at one of TEMPERATURES where no finite T is best: where all decisions are right, or no better than chance.
    """
    from scipy.optimize import minimize_scalar  # noqa: PLC0415 (seconds)

    if (logits.argmax(axis=1) == labels).all():
        return TEMPERATURES[0]  # the smaller, the better, up to rounding
    # The likelihood is concave in 1 / T, so it has one maximum in log T too.
    limits = tuple(np.log(TEMPERATURES))
    fitted = minimize_scalar(lambda x: mean_loss(logits / np.exp(x), labels), bounds=limits, method="bounded")
    return float(np.exp(fitted.x))


def cross_fitted(logits: Logits, labels: Labels) -> Logits:
    """Return logits [E, C], each half of the examples divided by the temperature that fits the other half.

    So no example is scored by a temperature that it was fitted on. The halves are drawn at random, by the number of
    examples alone.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    scaled = logits.astype(np.float64)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    for half, other in (halves, halves[::-1]):
        scaled[half] /= fit_temperature(logits[other], labels[other])
    return scaled


def classification_report(
    logits: Logits, labels: Labels, names: Sequence[str], *, with_temperature: bool = False
) -> dict[str, Any]:
    """Return {"classes", "confusion", "calibration"} of logits [E, C], and "temperature" where that is asked for.

    "temperature" holds the value that fits all examples, and the calibration of `cross_fitted` logits.
    """
    report: dict[str, Any] = {
        "classes": class_scores(logits, labels, names),
        "confusion": confusion(logits, labels),
        "calibration": calibration(logits, labels)._asdict(),
    }
    if with_temperature:
        after = calibration(cross_fitted(logits, labels), labels)
        report["temperature"] = {"value": fit_temperature(logits, labels), **after._asdict()}
    return report
