"""Texts with several labels: files, metrics and thresholds against scikit-learn and naive loops."""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import binary_cross_entropy_with_logits

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateDataConfig
from lad_dist.config.schema import TaskDataConfig
from lad_dist.data.tasks import multilabel
from lad_dist.data.tasks.metrics import best_output_order
from lad_dist.data.tasks.task import Task, load_task

LISTS = [["rude", "spam"], [], ["spam"], ["ad"]]
HOT = [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]]  # of ad, rude and spam
COLUMNS = ["ad", "rude", "spam"]


def write(folder: Path, name: str) -> Path:
    """Write the same four rows, with lists of names or with columns of 0 and 1."""
    file, (kind, _, ending) = folder / name, name.partition(".")
    frame = pd.DataFrame({"text": ["a", "b, c", "d", "e"]})
    if kind == "columns":
        frame = frame.join(pd.DataFrame(HOT, columns=COLUMNS))
    else:
        frame["label"] = ["|".join(names) for names in LISTS] if ending in ("csv", "tsv") else LISTS
    if ending == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif ending == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if ending == "tsv" else ",")
    return file


def load(file: Path, **keys: Any) -> Task:
    return load_task(TaskDataConfig(train=str(file), dev=str(file), kind="multilabel", **keys))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["lists", "columns"])
def test_lists_of_names_and_columns_are_the_same_labels(kind: str, ending: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"{kind}.{ending}")
    label: dict[str, Any] = {"label": COLUMNS} if kind == "columns" else {}
    task = load(file, **label)
    assert (task.kind, task.label_names, task.outputs) == ("multilabel", tuple(COLUMNS), tuple(COLUMNS))
    assert (task.metrics[0], task.fixed_order) == ("f1_micro", False)
    assert (task.train.texts, task.train.labels.dtype) == (["a", "b, c", "d", "e"], np.float32)
    assert task.train.labels.tolist() == task.dev["dev"].labels.tolist() == HOT
    turned = load(file, labels=["spam", "ad", "rude"], **label)
    assert (turned.label_names, turned.fixed_order) == (("spam", "ad", "rude"), True)
    assert turned.train.labels.tolist() == np.array(HOT)[:, [2, 0, 1]].tolist()


def test_a_data_set_of_the_hub_has_lists_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    ids = [[COLUMNS.index(name) for name in names] for names in LISTS]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Sequence(datasets.ClassLabel(names=COLUMNS))}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": ids}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split, streaming: rows)
    task = load_task(TaskDataConfig(hub="me/mails", train="train", dev="dev", kind="multilabel"))
    assert (task.name, task.label_names, task.train.labels.tolist()) == ("mails", tuple(COLUMNS), HOT)


def jsonl(*labels: Any) -> str:
    return "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels)


GOOD = jsonl(["a"], ["b"])


@pytest.mark.parametrize(
    ("name", "content", "keys", "message"),
    [
        ("x.jsonl", jsonl(["a", "b"], ["a", "a"]), {}, 'x.jsonl:2: label "a" is given twice'),
        ("x.jsonl", jsonl(["a", "b"], 3), {}, "x.jsonl:2: label 3 is neither a list of names nor a text with | betw"),
        ("x.jsonl", jsonl(["a", "b"], None), {}, "x.jsonl:2: label None is neither a list of names nor a text"),
        ("x.jsonl", jsonl(["a", "b"], [1.5]), {}, "x.jsonl:2: label 1.5 is neither a word nor a whole number"),
        ("x.jsonl", jsonl(["a", "b"], ["bb"]), {"labels": ["a", "b"]}, 'x.jsonl:2: label "bb" is unknown: did you'),
        ("x.jsonl", jsonl(["a"], ["a"]), {}, "x.jsonl: labels are a; multilabel needs at least two, data.labels may"),
        ("x.jsonl", jsonl([], []), {}, "x.jsonl: labels are none; multilabel needs at least two"),
        ("x.jsonl", jsonl([], []), {"labels": ["a", "b"]}, "x.jsonl: no example has a label"),
        ("x.jsonl", jsonl(["a", "b"], ["b", "a"]), {}, "x.jsonl: all examples have the same labels"),
        ("x.csv", "text,label\nt,a|b\nt,a||b\n", {}, "x.csv:3: label '' is neither a word nor a whole number"),
        ("x.csv", "text,label\nt,a|b\nt,a;b\n", {}, 'x.csv:3: label "a;b": in a text, names have | and no blank betw'),
        ("x.csv", "text,label\nt,a|b\nt,a | b\n", {}, 'x.csv:3: label "a ": in a text, names have | and no blank'),
        ("x.csv", 'text,label\nt,a|b\nt,"[\'a\', \'b\']"\n', {}, "data.labels"),
        ("x.csv", "text,a,b\nt,1,0\nt,2,0\n", {"label": ["a", "b"]}, "x.csv:3: a is '2', neither 0 nor 1"),
        ("x.csv", "text,a,b\nt,1,0\nt,,0\n", {"label": ["a", "b"]}, "x.csv:3: a is '', neither 0 nor 1"),
        ("x.csv", "text,a,b\nt,1,0\n", {"label": ["a", "c"]}, 'x.csv: no column "c" among text, a, b'),
    ],
)  # fmt: skip
def test_mistakes_in_files(name: str, content: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / name, **keys)
    assert message in str(error.value)


def test_the_dev_set_has_the_labels_of_the_training_set(tmp_path: Path) -> None:
    for name, content in {"train": GOOD, "unknown": jsonl(["a"], ["c"]), "bare": jsonl([], [])}.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    files = {"train": str(tmp_path / "train.jsonl"), "kind": "multilabel"}
    for dev, message in {
        "unknown": 'unknown.jsonl:2: label "c" is unknown',
        "bare": "bare.jsonl: no example has",
    }.items():
        with pytest.raises(UserError, match=message):
            load_task(TaskDataConfig(dev=str(tmp_path / f"{dev}.jsonl"), **files))


def test_a_label_with_the_sign_of_a_separator_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,label\nt,"food, drink|b"\nt,b\n')
    task = load(tmp_path / "x.csv", labels=["food, drink", "b"])
    assert task.train.labels.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label": ["a", "b"]}, 'label is a list of columns, which goes with kind = "multilabel" alone'),
        ({"label": ["a", "a"], "kind": "multilabel"}, 'label has "a" twice'),
        ({"label": ["a"], "kind": "multilabel"}, "label is a list of columns of 0 and 1: name at least two"),
        ({"label": ["a", "b"], "labels": ["a", "c"], "kind": "multilabel"}, "labels: the columns of label are a, b"),
        ({"positive": "a", "kind": "multilabel"}, 'positive does not go with kind = "multilabel"'),
        ({"kind": "multilabel", "train": None, "dev": None, "task": "rte"}, "is for train and dev files; a GLUE task"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskDataConfig(**({"train": "t.csv", "dev": "d.csv"} | keys))


@st.composite
def answers(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits, some of them equal, and labels; in some draws a label occurs nowhere or everywhere."""
    examples, labels = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    cells = examples * labels
    logits = draw(st.lists(st.sampled_from([-40.0, -2.0, -1e-3, 0.0, 0.5, 3.0]), min_size=cells, max_size=cells))
    gold = draw(st.lists(st.integers(0, 1), min_size=cells, max_size=cells))
    return tuple(np.array(x, dtype=np.float32).reshape(examples, labels) for x in (logits, gold))  # type: ignore[return-value]


@given(answers())
@settings(max_examples=60)
def test_metrics_are_those_of_scikit_learn(pair: tuple[np.ndarray, np.ndarray]) -> None:
    logits, gold = pair
    predicted, occurring = logits >= 0, np.flatnonzero(gold.any(axis=0))
    scores = multilabel.score(logits, gold)
    assert tuple(scores) == multilabel.METRICS
    assert scores["f1_micro"] == f1_score(gold, predicted, average="micro", zero_division=0)
    assert scores["subset_accuracy"] == accuracy_score(gold, predicted)
    by_label = [f1_score(gold[:, n], predicted[:, n], zero_division=0) for n in occurring]
    assert scores["f1_macro"] == pytest.approx(np.mean(by_label) if by_label else 0)


@given(answers())
@settings(max_examples=60)
def test_thresholds_are_those_of_a_naive_search(pair: tuple[np.ndarray, np.ndarray]) -> None:
    logits, gold = pair
    thresholds = multilabel.tuned_thresholds(logits, gold)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for column, labels, threshold in zip(probabilities.T, gold.T, thresholds, strict=True):
        levels = sorted({0.0, *column.tolist()})
        middles = [(a + b) / 2 for a, b in pairwise(levels)]
        scores = {t: f1_score(labels, column >= t, zero_division=0) for t in [0.5, *middles]}
        best = [t for t, value in scores.items() if value > max(scores.values()) - 1e-12]
        assert threshold == pytest.approx(min(best, key=lambda t: (abs(t - 0.5), t)), rel=1e-12)
    tuned, plain = multilabel.score(logits, gold, thresholds), multilabel.score(logits, gold)
    assert tuned["f1_macro"] >= plain["f1_macro"] - 1e-12


def test_of_equally_good_thresholds_the_nearest_to_a_half_is_taken() -> None:
    logits = np.log(np.array([[0.2], [0.4], [0.8]]) / np.array([[0.8], [0.6], [0.2]]))
    assert multilabel.tuned_thresholds(logits, np.array([[0], [0], [1]])) == (0.5,)
    assert multilabel.tuned_thresholds(logits, np.array([[0], [1], [1]])) == pytest.approx((0.3,))
    assert multilabel.tuned_thresholds(logits, np.array([[1], [1], [1]])) == pytest.approx((0.1,))
    assert multilabel.tuned_thresholds(logits, np.array([[0], [0], [0]])) == (0.5,)


@given(answers(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_labels_changes_nothing_else(pair: tuple[np.ndarray, np.ndarray], random: Any) -> None:
    logits, gold = pair
    order = random.sample(range(gold.shape[1]), gold.shape[1])
    turned = logits[:, order], gold[:, order]
    assert multilabel.score(*turned) == pytest.approx(multilabel.score(*pair))
    assert multilabel.tuned_thresholds(*turned) == tuple(multilabel.tuned_thresholds(*pair)[n] for n in order)
    assert multilabel.mean_loss(*turned) == pytest.approx(multilabel.mean_loss(*pair))
    teacher = logits[::-1]
    assert multilabel.loyalty(turned[0], teacher[:, order]) == pytest.approx(multilabel.loyalty(logits, teacher))


@given(answers())
@settings(max_examples=40)
def test_loss_constant_answer_and_loyalty_are_those_of_naive_loops(pair: tuple[np.ndarray, np.ndarray]) -> None:
    logits, gold = pair
    expected = binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), torch.from_numpy(gold).double())
    assert multilabel.mean_loss(logits, gold) == pytest.approx(expected.item())
    answer = multilabel.constant_answer(gold)
    subsets = [np.array(bits, dtype=bool) for bits in product([0, 1], repeat=gold.shape[1]) if any(bits)]

    def f1(given: np.ndarray) -> float:
        return float(f1_score(gold, np.broadcast_to(given, gold.shape), average="micro", zero_division=0))

    assert f1(answer) == pytest.approx(max(map(f1, subsets)))
    best = min(
        multilabel.mean_loss(np.tile(z, (len(gold), 1)), gold) for z in product([-3.0, 0.0, 3.0], repeat=gold.shape[1])
    )
    assert multilabel.constant_loss(gold) <= best + 1e-9
    teacher = np.roll(logits, 1)
    p, q = (1 / (1 + np.exp(-x.astype(float))) for x in (logits, teacher))
    distances = [
        np.nan_to_num(jensenshannon([a, 1 - a], [b, 1 - b], base=2)) for a, b in zip(p.flat, q.flat, strict=True)
    ]
    loyalty = multilabel.loyalty(logits, teacher)
    assert loyalty["label_loyalty"] == np.mean((logits >= 0) == (teacher >= 0))
    assert loyalty["probability_loyalty"] == pytest.approx(1 - np.mean(distances), abs=1e-6)


def test_another_order_of_outputs_is_seen() -> None:
    random = np.random.default_rng(0)
    gold = (random.random((200, 4)) < [0.1, 0.3, 0.5, 0.2]).astype(np.float32)
    right = np.where(random.random(gold.shape) < 0.9, 2 * gold - 1, 1 - 2 * gold)
    order = np.array([2, 0, 3, 1])  # output n stands for label order[n]
    assert best_output_order(right[:, order], gold).tolist() == order.tolist()
    assert best_output_order(right, gold).tolist() == [0, 1, 2, 3]
    assert best_output_order(np.full_like(gold, -1), gold).tolist() == [0, 1, 2, 3]


def test_an_evaluation_may_have_the_same_labels_in_all_rows(tmp_path: Path) -> None:
    file = tmp_path / "dev.jsonl"
    file.write_text('{"text": "a", "label": ["spam"]}\n')
    data = {"dev": str(file), "kind": "multilabel", "labels": COLUMNS}
    task = load_task(EvaluateDataConfig.model_validate(data))
    assert task.dev["dev"].labels.tolist() == [[0, 0, 1]]  # type: ignore[union-attr]
