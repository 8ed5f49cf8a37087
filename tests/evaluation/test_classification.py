"""Scores by class, confusion and calibration against scikit-learn, a naive loop and a grid."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics

from lad_dist.evaluation import classification
from lad_dist.evaluation.classification_plots import confusion_figure, reliability_figure

NAMES = ["no", "yes", "maybe", "never"]


def toy(seed: int, examples: int = 200, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a classifier that is often right and too sure; the last class has no examples."""
    state = np.random.default_rng(seed)
    labels = state.integers(0, 3, examples)
    logits = state.normal(size=(examples, 4))
    logits[np.arange(examples), labels] += 1
    return (scale * logits).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(3))
def test_scores_by_class_are_those_of_scikit_learn(seed: int) -> None:
    logits, labels = toy(seed, 40)
    expected = sklearn_metrics.classification_report(
        labels, logits.argmax(axis=1), labels=range(4), target_names=NAMES, output_dict=True, zero_division=0
    )
    scores = classification.class_scores(logits, labels, NAMES)
    assert list(scores) == NAMES
    for name in NAMES:
        twin = {key.replace("f1-score", "f1"): value for key, value in expected[name].items()}
        assert scores[name] == pytest.approx(twin)
    assert scores["never"]["support"] == 0
    counts = np.zeros((4, 4), dtype=int)
    for label, prediction in zip(labels, logits.argmax(axis=1), strict=True):
        counts[label, prediction] += 1
    assert classification.confusion(logits, labels) == counts.tolist()


def naive_ece(logits: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    probabilities = softmax(logits.astype(np.float64), axis=1)
    for number in range(15):
        right, confidences = [], []
        for row, label in zip(probabilities, labels, strict=True):
            if number / 15 < min(row.max(), 1.0) <= (number + 1) / 15:
                right.append(row.argmax() == label)
                confidences.append(row.max())
        if right:
            total += len(right) / len(labels) * abs(np.mean(right) - np.mean(confidences))
    return total


@given(st.integers(0, 1000), st.integers(1, 60), st.floats(0.01, 30))
def test_calibration_is_that_of_a_naive_loop(seed: int, examples: int, scale: float) -> None:
    logits, labels = toy(seed, examples, scale)
    result = classification.calibration(logits, labels)
    assert result.ece == pytest.approx(naive_ece(logits, labels), abs=1e-9)
    assert result.accuracy == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    assert result.confidence == pytest.approx(softmax(logits.astype(np.float64), axis=1).max(axis=1).mean())
    assert result.nll == pytest.approx(-log_softmax(logits.astype(np.float64), axis=1)[range(examples), labels].mean())
    assert sum(each["count"] for each in result.bins) == examples


def test_the_calibration_of_two_decisions() -> None:
    """One is right and 0.9 sure, the other wrong and 0.62 sure."""
    result = classification.calibration(np.log([[0.9, 0.1], [0.38, 0.62]]), np.array([0, 0]))
    assert result.ece == pytest.approx((0.1 + 0.62) / 2)
    assert (result.accuracy, result.confidence) == (0.5, pytest.approx(0.76))
    assert [(each["lower"], each["accuracy"]) for each in result.bins] == [(9 / 15, 0.0), (13 / 15, 1.0)]


@pytest.mark.parametrize("scale", [0.3, 1.0, 8.0])
def test_the_temperature_is_the_best_of_a_grid(scale: float) -> None:
    logits, labels = toy(0, 500, scale)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 4000))
    likelihoods = [-log_softmax(logits / t, axis=1)[range(500), labels].mean() for t in grid]
    assert classification.fit_temperature(logits, labels) == pytest.approx(grid[np.argmin(likelihoods)], rel=3e-3)


def test_a_temperature_is_scored_on_what_it_was_not_fitted_on() -> None:
    """Each half is divided by the other half's temperature; what is too sure is less so, and no decision changes."""
    logits, labels = toy(1, 400, 6.0)
    scaled = classification.cross_fitted(logits, labels)
    factors = np.round((logits / scaled)[:, 0], 5)
    first, second = np.unique(factors)
    halves = [factors == value for value in (second, first)]
    for half, factor in zip(halves, (first, second), strict=True):
        assert half.sum() == 200
        assert classification.fit_temperature(logits[half], labels[half]) == pytest.approx(factor, abs=1e-4)
    report = classification.classification_report(logits, labels, NAMES, with_temperature=True)
    before, after = report["calibration"], report["temperature"]
    assert after["ece"] < before["ece"] / 2
    assert after["nll"] < before["nll"]
    assert after["accuracy"] == before["accuracy"]
    assert first < after["value"] < second


@pytest.mark.parametrize(("labels", "limit"), [([0, 1], 0.01), ([1, 0], 100.0)])
def test_where_no_temperature_is_best_it_is_at_a_limit(labels: list[int], limit: float) -> None:
    temperature = classification.fit_temperature(np.array([[2.0, -2.0], [-2.0, 2.0]]), np.array(labels))
    assert temperature == pytest.approx(limit, rel=0.01)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    report = classification.classification_report(*toy(2), NAMES, with_temperature=True)
    calibrations = {"as it is": report["calibration"], "temperature": report["temperature"]}
    figures = {
        "confusion": confusion_figure("a model", report["classes"], report["confusion"]),
        "reliability": reliability_figure("a model", calibrations),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert imread(tmp_path / f"{name}.png").std() > 0.01
    texts = [text.get_text() for text in figures["confusion"].axes[0].texts]
    assert len(texts) == np.count_nonzero(report["confusion"])
    lines = figures["reliability"].axes[0].lines
    assert [list(line.get_ydata()) for line in lines[1:]] == [
        [each["accuracy"] for each in calibration["bins"]] for calibration in calibrations.values()
    ]
