"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from lad_dist.metrics import loyalty, score


def one_hot(classes: list[int], width: int = 2) -> np.ndarray:
    return np.eye(width)[classes]


def test_classification_by_hand() -> None:
    # true positives 2, false positives 1, false negatives 2, true negatives 1
    labels = np.array([1, 1, 1, 1, 0, 0])
    found = score(("accuracy", "f1", "matthews"), one_hot([1, 1, 0, 0, 1, 0]), labels)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3))
    turned = score(("matthews",), one_hot([0, 0, 1, 1, 0, 0]), labels)
    assert turned["matthews"] == pytest.approx((2 * 2 - 0 * 2) / math.sqrt(2 * 4 * 2 * 4))


def test_f1_of_three_classes_is_the_mean_over_them() -> None:
    labels = np.array([0, 0, 1, 2])
    found = score(("f1",), one_hot([0, 1, 1, 2], 3), labels)
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_regression_by_hand() -> None:
    labels, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[1.0], [3.0], [2.0], [10.0]])
    found = score(("pearson", "spearman"), predicted, labels)
    # deviations -1.5, -0.5, 0.5, 1.5 and -3, -1, -2, 6
    assert found["pearson"] == pytest.approx((4.5 + 0.5 - 1 + 9) / math.sqrt(5 * 50))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # one neighbouring pair is the wrong way round


def test_a_constant_prediction_correlates_with_nothing() -> None:
    assert score(("pearson", "spearman"), np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == {"pearson": 0, "spearman": 0}


def test_loyalty_by_hand() -> None:
    student = np.log(np.array([[0.5, 0.5 + 1e-9], [0.9, 0.1]]))
    teacher = np.log(np.array([[0.5, 0.5 + 1e-9], [0.4, 0.6]]))

    def divergence(p: list[float], q: list[float]) -> float:
        return sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True))

    middle = [0.65, 0.35]
    distance = math.sqrt(divergence([0.9, 0.1], middle) / 2 + divergence([0.4, 0.6], middle) / 2)
    found = loyalty(student, teacher)
    assert found["label_loyalty"] == 0.5
    assert found["probability_loyalty"] == pytest.approx(1 - distance / 2, abs=1e-6)


def test_loyalty_has_ends() -> None:
    logits = np.array([[30.0, -30.0], [3.0, 1.0]])
    assert loyalty(logits, logits) == {"label_loyalty": 1.0, "probability_loyalty": pytest.approx(1.0)}
    opposite = np.array([[50.0, -50.0]])
    assert loyalty(opposite, -opposite) == {"label_loyalty": 0.0, "probability_loyalty": pytest.approx(0.0, abs=1e-6)}


def test_loyalty_of_a_regression_is_a_correlation() -> None:
    outputs = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    found = loyalty(-outputs, outputs)
    assert found == {"teacher_pearson": pytest.approx(-1)}
    assert type(found["teacher_pearson"]) is float  # results.json holds it
