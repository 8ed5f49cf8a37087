"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from lad_dist.data.tasks.metrics import (
    answer_metrics,
    entity_metrics,
    loyalty,
    mean_loss,
    score,
    window_probability_loyalty,
)


def one_hot(classes: list[int], width: int = 2) -> np.ndarray:
    return np.eye(width)[classes]


def test_classification_by_hand() -> None:
    # true positives 2, false positives 1, false negatives 2, true negatives 1
    labels = np.array([1, 1, 1, 1, 0, 0])
    metrics = score(("accuracy", "f1", "matthews"), one_hot([1, 1, 0, 0, 1, 0]), labels, positive=1)
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert metrics["matthews"] == pytest.approx((2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3))
    turned = score(("matthews",), one_hot([0, 0, 1, 1, 0, 0]), labels)
    assert turned["matthews"] == pytest.approx((2 * 2 - 0 * 2) / math.sqrt(2 * 4 * 2 * 4))


@pytest.mark.parametrize(
    ("labels", "predicted", "first", "macro"),
    [
        ([0, 0, 1, 2], [0, 1, 1, 2], 2 / 3, (2 / 3 + 2 / 3 + 1) / 3),
        ([0, 0, 1, 2], [0, 1, 1, 1], 2 / 3, (2 / 3 + 1 / 2 + 0) / 3),  # without the last class
        ([0, 0, 1, 1], [0, 0, 2, 2], 1, (1 + 0) / 2),  # with a class that no label names
        ([1, 1, 2, 2], [1, 1, 2, 2], 0, 1),
    ],
)
def test_what_f1_means_does_not_depend_on_what_is_predicted(
    labels: list[int], predicted: list[int], first: float, macro: float
) -> None:
    metrics = score(("f1", "f1_macro"), one_hot(predicted, 3), np.array(labels), positive=0)
    assert metrics == {"f1": pytest.approx(first), "f1_macro": pytest.approx(macro)}


def test_logits_that_are_not_finite_have_no_metric() -> None:
    broken, labels = np.full((2, 2), np.nan), np.array([0, 0])
    for measure in (lambda: score(("accuracy",), broken, labels), lambda: loyalty(broken, broken)):
        with pytest.raises(AssertionError):
            measure()


def test_regression_by_hand() -> None:
    labels, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[1.0], [3.0], [2.0], [10.0]])
    metrics = score(("pearson", "spearman"), predicted, labels)
    # deviations -1.5, -0.5, 0.5, 1.5 and -3, -1, -2, 6
    assert metrics["pearson"] == pytest.approx((4.5 + 0.5 - 1 + 9) / math.sqrt(5 * 50))
    assert metrics["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # one neighbouring pair is the wrong way round


def test_a_constant_prediction_correlates_with_nothing() -> None:
    one, more = np.ones((3, 1)), np.array([[1.0], [2.0], [3.0]])
    assert score(("pearson", "spearman"), one, more[:, 0]) == {"pearson": 0, "spearman": 0}
    assert loyalty(more, one) == {"teacher_pearson": 0}


def test_losses_by_hand() -> None:
    logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]], dtype=np.float32)) + 7
    assert mean_loss(logits, np.array([1, 0])) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    assert mean_loss(np.array([[1.0], [4.0]]), np.array([2.0, 2.0])) == pytest.approx((1 + 4) / 2)


def test_loyalty_by_hand() -> None:
    student = np.log(np.array([[0.5, 0.5 + 1e-9], [0.9, 0.1]]))
    teacher = np.log(np.array([[0.5, 0.5 + 1e-9], [0.4, 0.6]]))

    def divergence(p: list[float], q: list[float]) -> float:
        return sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True))

    middle = [0.65, 0.35]
    distance = math.sqrt(divergence([0.9, 0.1], middle) / 2 + divergence([0.4, 0.6], middle) / 2)
    metrics = loyalty(student, teacher)
    assert metrics["label_loyalty"] == 0.5
    assert metrics["probability_loyalty"] == pytest.approx(1 - distance / 2, abs=1e-6)


def test_loyalty_has_ends() -> None:
    logits = np.array([[30.0, -30.0], [3.0, 1.0]])
    assert loyalty(logits, logits) == {"label_loyalty": 1.0, "probability_loyalty": pytest.approx(1.0)}
    opposite = np.array([[50.0, -50.0]])
    assert loyalty(opposite, -opposite) == {"label_loyalty": 0.0, "probability_loyalty": pytest.approx(0.0, abs=1e-6)}


def test_loyalty_of_a_regression_is_a_correlation() -> None:
    outputs = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    metrics = loyalty(-outputs, outputs)
    assert metrics == {"teacher_pearson": pytest.approx(-1)}
    assert type(metrics["teacher_pearson"]) is float  # results.json holds it


@pytest.mark.parametrize(
    ("gold", "predicted", "correct", "in_gold", "in_predicted"),
    [
        ("B-A I-A O B-B", "B-A I-A O B-B", 2, 2, 2),
        ("B-A I-A O B-B", "B-A O O B-A", 0, 2, 2),  # a wrong border, a wrong kind
        ("I-A I-A O I-B", "B-A I-A O B-B", 2, 2, 2),  # IOB1 says the same as IOB2
        ("B-A B-A", "I-A I-A", 0, 2, 1),  # neighbours of a kind are two, or one
        ("I-A I-B", "B-A B-B", 2, 2, 2),  # another kind begins another entity
        ("B-A I-A E-A S-B", "B-A I-A I-A B-B", 2, 2, 2),  # IOBES
        ("B-A L-A U-A U-B", "B-A I-A B-A B-B", 3, 3, 3),  # BILOU
        ("B-A E-A I-A", "B-A I-A B-A", 2, 2, 2),  # after an end the inside begins anew
        ("B-x-y I-x-y", "B-x-y I-x-z", 0, 1, 2),
        ("O O", "O B-A", 0, 0, 1),
        ("B I O", "B I O", 1, 1, 1),  # without kinds
    ],
)
def test_entities_by_hand(gold: str, predicted: str, correct: int, in_gold: int, in_predicted: int) -> None:
    """As conlleval counts; a sentence's end ends an entity."""
    metrics = entity_metrics([gold.split(), ["O"]], [predicted.split(), ["O"]])
    assert metrics["precision"] == (correct / in_predicted if in_predicted else 0)
    assert metrics["recall"] == (correct / in_gold if in_gold else 0)
    assert metrics["f1"] == pytest.approx(2 * correct / (in_gold + in_predicted))
    split = entity_metrics([["B-A"], ["I-A"]], [["B-A"], ["I-A"]])
    assert split == {"precision": 1, "recall": 1, "f1": 1}
    assert entity_metrics([["B-A"], ["I-A"]], [["B-A"], ["O"]])["recall"] == 0.5


def test_entities_without_any_score_zero() -> None:
    assert entity_metrics([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}


@pytest.mark.parametrize(
    ("predicted", "gold", "exact", "f1"),
    [
        ("The  Ada-Lovelace!", ["ada lovelace", "adalovelace"], 1, 1),
        ("Ada Lovelace", ["Lovelace", "Ada"], 0, 2 / 3),
        ("in the year 1843", ["1843 in London"], 0, 2 * 2 / (3 + 3)),
        ("a", ["Rome"], 0, 0),
        ("Rome Rome", ["Rome"], 0, 2 / 3),  # words count as often as they occur
    ],
)
def test_answers_by_hand(predicted: str, gold: list[str], exact: float, f1: float) -> None:
    assert answer_metrics([predicted], [gold], False) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_unanswerable_questions_by_hand() -> None:
    """SQuAD 2.0: an empty answer is right for unanswerable questions alone."""
    golds = [["Rome"], ["Rome"], [], [], ["the", "Ada Lovelace"]]
    metrics = answer_metrics(["Rome", "", "", "Rome", "Ada"], golds, True)
    assert metrics == {
        "exact_match": pytest.approx(2 / 5),
        "f1": pytest.approx((1 + 0 + 1 + 0 + 2 / 3) / 5),
        "f1_answerable": pytest.approx((1 + 0 + 2 / 3) / 3),
        "f1_unanswerable": pytest.approx(1 / 2),
    }
    assert answer_metrics(["the"], [["the"]], False) == {"exact_match": 1, "f1": 0}  # version 1.1: no word in common


def test_window_probability_loyalty_is_that_of_each_window() -> None:
    """Against scipy, window by window and column by column."""
    random = np.random.default_rng(0)
    student, teacher = (random.normal(size=(9, 2)) * 3 for _ in range(2))
    starts, distances = np.array([0, 4, 5]), []
    for first, end in ((0, 4), (4, 5), (5, 9)):
        for column in (0, 1):
            p, q = (softmax(x[first:end, column]) for x in (student, teacher))
            distances.append(jensenshannon(p, q, base=2))
    assert window_probability_loyalty(student, teacher, starts) == pytest.approx(1 - np.mean(distances))
    assert window_probability_loyalty(student, student + 7, starts) == pytest.approx(1)
