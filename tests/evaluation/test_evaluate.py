"""An evaluation sees every example once, in order, on any number of processes, and agrees with the run's scores."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy
from conftest import World
from hypothesis import given
from hypothesis import strategies as st
from launching import run_command
from safetensors.torch import load_file, save_file
from served_models import FORMS, GOLDS, TEXTS, served

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.data.tasks import multilabel
from lad_dist.data.tasks.examples import tokenize
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.task import Task
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.distributed import processes, ranks
from lad_dist.evaluation import evaluate
from lad_dist.evaluation.baseline import weakness
from lad_dist.evaluation.evaluate import Predictions
from lad_dist.evaluation.prediction import predict
from lad_dist.objectives.losses import mean_over_sequences
from lad_dist.training.train import train


def batches(count: int) -> list[Any]:
    """Batch n holds n + 1 examples."""
    return [lambda n=n: toy.batch([4] * (n + 1), labels=np.arange(n + 1) + 100 * n) for n in range(count)]


@given(st.integers(1, 7), st.integers(1, 5))
def test_every_batch_counts_once_and_all_processes_make_as_many(world_size: int, count: int) -> None:
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "world_size", lambda: world_size)
        for rank in range(world_size):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares.append([(len(batch.lengths), counts) for batch, counts in evaluate.rank_batches(batches(count))])
    assert len({len(share) for share in shares}) == 1
    counted = [size for share in shares for size, counts in share if counts]
    assert sorted(counted) == list(range(1, count + 1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_predictions_come_in_order(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the processes one after the other; the last one gathers what all have contributed."""

    def forward(batch: Batch) -> torch.Tensor:
        return batch.labels[:, None].double()

    contributions: list[Any] = []
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)

    def gather(value: Any) -> list[Any]:
        contributions.append(value)
        if len(contributions) < world_size:
            raise InterruptedError
        return contributions

    monkeypatch.setattr(processes, "all_gather", gather)
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        if rank < world_size - 1:
            with pytest.raises(InterruptedError):
                evaluate.predict(forward, batches(4))
    predictions = evaluate.predict(forward, batches(4))
    expected = [100 * n + k for n in range(4) for k in range(n + 1)]
    assert predictions.logits[:, 0].tolist() == expected


def test_mean_terms_is_the_mean_over_all_that_the_batches_hold() -> None:
    """A larger batch weighs more."""

    def terms(batch: Batch) -> dict[str, torch.Tensor]:
        return {"label": mean_over_sequences(batch.labels.float(), batch)}

    means = evaluate.mean_terms(terms, batches(4))
    assert means == {"label": pytest.approx(np.mean([100 * n + k for n in range(4) for k in range(n + 1)]))}
    assert evaluate.mean_terms(lambda batch: {}, []) == {}


def test_scores_of_a_second_dev_set_carry_the_name_of_the_set(world: World) -> None:
    texts = {
        name: Texts([toy.sentence(0), toy.sentence(1)], None, np.array(labels))
        for name, labels in (("dev", [0, 0]), ("dev_mismatched", [0, 1]))
    }
    task = Task("mnli", "classification", ("a", "b"), ("accuracy",), texts["dev"], texts)
    tokenizer, data = load_tokenizer(world.tokenizer), TaskDataConfig(task="mnli")
    dev = {name: tokenize(task, raw, tokenizer, data, name) for name, raw in texts.items()}
    predictions = dict.fromkeys(dev, Predictions(np.array([[1.0, 0.0], [1.0, 0.0]]), 1.0))
    assert evaluate.task_scores(dev, predictions) == {"accuracy": 1.0, "accuracy_mismatched": 0.5}


def evaluate_config(world: World, model: Path, **options: Any) -> EvaluateConfig:
    data = {**world.files, "max_length": 32}
    return parse_config(EvaluateConfig, {"model": {"path": str(model)}, "data": data, **options}, "toy")


def test_an_export_scores_what_the_run_reported(world: World, tmp_path: Path) -> None:
    config = toy.parsed(toy.task_config(tmp_path, world.files, world.teacher, world.pretrained), {"run.steps": 3})
    run = train(config)
    out = tmp_path / "deep" / "result.json"
    options = {"teacher": {"path": str(world.teacher)}, "out": str(out)}
    scores = evaluate.evaluate(evaluate_config(world, run.folder / "export", **options))
    assert json.loads(out.read_text()) == scores
    for name in ("accuracy", "f1_macro", "matthews", "label_loyalty", "probability_loyalty"):
        assert scores["model"][name] == pytest.approx(run.results["metrics"][name], abs=1e-6)
    assert scores["model"]["parameters"] == run.results["student"]["parameters"]
    assert scores["teacher"]["accuracy"] == run.results["teacher"]["accuracy"]
    assert scores["teacher"]["path"] == str(world.teacher)
    assert scores["model"]["speedup"] > 0


def test_a_model_is_loyal_to_itself(world: World) -> None:
    scores = evaluate.evaluate(evaluate_config(world, world.teacher, teacher={"path": str(world.teacher)}))
    assert scores["model"]["label_loyalty"] == 1
    assert scores["model"]["probability_loyalty"] == pytest.approx(1, abs=1e-3)
    assert scores["model"]["accuracy"] == scores["teacher"]["accuracy"]


def test_without_a_teacher_no_loyalty_is_measured(world: World) -> None:
    scores = evaluate.evaluate(evaluate_config(world, world.teacher))
    assert set(scores) == {"model"}
    numbers = {"path", "parameters", "accuracy", "f1_macro", "matthews", "loss"}
    assert set(scores["model"]) == numbers | {"classes", "confusion", "calibration"}


def test_without_a_training_set_the_model_names_the_labels(world: World, tmp_path: Path) -> None:
    """The scores are the same; of a model without names of labels, the user gives them."""
    expected = evaluate.evaluate(evaluate_config(world, world.teacher))
    dev = {"dev": world.files["dev"], "max_length": 32}
    out = tmp_path / "result.json"
    tables = {"model": {"path": str(world.teacher)}, "data": dev, "out": str(out), "fit_temperature": True}
    result = evaluate.evaluate(parse_config(EvaluateConfig, tables, "toy"))
    assert json.loads(out.read_text()) == result
    temperature = result["model"].pop("temperature")
    assert result == expected
    assert set(temperature) == {"value", *expected["model"]["calibration"]}
    pictures = {"result.confusion.png", "result.reliability.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", *pictures}
    unnamed = toy.model(tmp_path / "unnamed", world.tokenizer, "classification", ("LABEL_0", "LABEL_1"))
    tables = {"model": {"path": str(unnamed)}, "data": dev}
    message = (
        rf'{world.files["dev"]}:1: label "\w+" is unknown: the outputs of the model are LABEL_0, LABEL_1; '
        "give data.labels, the labels in their order"
    )
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(parse_config(EvaluateConfig, tables, "toy"))
    tables["data"] = {**dev, "labels": ["no", "yes"]}
    named = evaluate.evaluate(parse_config(EvaluateConfig, tables, "toy"))["model"]
    assert list(named["classes"]) == ["no", "yes"]


def test_an_evaluation_needs_a_dev_set() -> None:
    with pytest.raises(UserError, match="toy: data: give a GLUE task, or a dev file"):
        parse_config(EvaluateConfig, {"model": {"path": "x"}, "data": {"train": "x"}}, "toy")


def test_a_temperature_is_for_classifications_alone(world: World, tmp_path: Path) -> None:
    model = toy.model(tmp_path / "model", world.tokenizer, "regression", ("score",))
    (tmp_path / "dev.csv").write_text("text,label\nba,1\nde,2\n")
    data = {"dev": str(tmp_path / "dev.csv"), "kind": "regression", "max_length": 32}
    tables = {"model": {"path": str(model)}, "data": data, "fit_temperature": True}
    with pytest.raises(UserError, match="calibrates the probabilities of a classification; dev is regression"):
        evaluate.evaluate(parse_config(EvaluateConfig, tables, "toy"))


def test_what_int8_costs_is_evaluated_by_class(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The int8 file as the model, its folder as the teacher."""
    export = served(tmp_path / "run", world.tokenizer)
    rows = "".join(f"{text},{gold}\n" for text, gold in zip(TEXTS, GOLDS, strict=True))
    (tmp_path / "dev.csv").write_text(f"text,label\n{rows}")
    words = [f"model.path={export / FORMS['int8']}", f"data.dev={tmp_path / 'dev.csv'}", "data.max_length=32"]
    (tmp_path / "teacher.toml").write_text(f'[teacher]\npath = "{tmp_path / "run"}"\n[model]\n[data]\n')
    assert run_command("evaluate", str(tmp_path / "teacher.toml"), *words, f"out={tmp_path / 'out.json'}") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["model"]["label_loyalty"] >= 0.99
    assert "parameters" in result["teacher"]
    assert "parameters" not in result["model"]
    supports = {name: scores["support"] for name, scores in result["model"]["classes"].items()}
    assert supports == {label: GOLDS.count(label) for label in toy.LABELS}
    assert np.trace(result["model"]["confusion"]) == pytest.approx(200 * result["model"]["accuracy"])
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("by class", "teacher's F1", "(columns)", "calibration", "ECE"))
    assert "out.teacher.confusion.png" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("outputs", "has_names", "expected"),
    [
        ([0, 1, 2, 3], False, None),
        (
            [3, 0, 1, 2],
            False,
            r"0\.2, .* constant answer 0\.25, .* order 0\.8: set data\.labels = \['b', 'c', 'd', 'a'\]",
        ),
        ([0, 1, 3, 2], False, r"0\.45, .* 0\.25, .* order 0\.8: set data\.labels = \['a', 'b', 'd', 'c'\]"),
        ([3, 0, 1, 2], True, r"0\.2, .* 0\.25; is it fine-tuned for this task\?"),
        ([0, 1, 3, 2], True, None),
        ([0, 0, 0, 0], False, r"0\.25, .* 0\.25; the outputs have no names .* \['a', .*\]; no other order"),
    ],
)
def test_a_model_is_compared_with_a_constant_answer(
    outputs: list[int], has_names: bool, expected: str | None, world: World
) -> None:
    """A model that is right in 80 % of the examples; the text of class n is taken for that of outputs[n]."""
    labels = np.arange(200) % 4
    decided = np.where(np.arange(200) // 4 % 5 > 0, labels, (labels + 1) % 4)
    texts = Texts([toy.sentence(n) for n in range(200)], None, labels)
    task = Task("t", "classification", ("a", "b", "c", "d"), ("accuracy",), texts, {})
    examples = tokenize(task, texts, load_tokenizer(world.tokenizer), TaskDataConfig(task="rte"), "t")
    model: Any = SimpleNamespace(has_label_names=has_names)
    reason = weakness(model, examples, np.eye(4)[np.array(outputs)[decided]])
    assert (reason is None) if expected is None else re.search(expected, (reason or "").replace('"', "'"))


def test_several_labels_are_compared_with_the_best_constant_ones_and_their_shares(world: World) -> None:
    """Rare labels may all stay below 0.5 in a model that knows much of them: then its loss counts."""
    labels = (np.arange(200)[:, None] % np.array([5, 10, 20]) == 0).astype(np.float32)
    texts = Texts([toy.sentence(n) for n in range(200)], None, labels)
    task = Task("t", "multilabel", ("a", "b", "c"), multilabel.METRICS, texts, {})
    examples = tokenize(task, texts, load_tokenizer(world.tokenizer), TaskDataConfig(task="rte"), "t")
    named, unnamed = (SimpleNamespace(has_label_names=known) for known in (True, False))
    right = np.where(labels > 0, 3.0, -3.0)
    assert examples.baseline() == pytest.approx(2 * 40 / (200 + 70))
    for logits in (right, np.where(labels > 0, -0.5, -5.0)):
        assert weakness(named, examples, logits) is None  # type: ignore[arg-type]
    chance = "f1_micro on the dev set is 0, that of one constant answer 0.2963; is it fine-tuned for this task?"
    assert weakness(named, examples, np.full_like(right, -1.0)) == chance  # type: ignore[arg-type]
    assert 'set data.labels = ["b", "c", "a"]' in str(weakness(unnamed, examples, right[:, [1, 2, 0]]))  # type: ignore[arg-type]


def test_numbers_are_compared_with_the_mean(world: World) -> None:
    labels = np.arange(200, dtype=np.float32) / 40
    texts = Texts([toy.sentence(n) for n in range(200)], None, labels)
    task = Task("t", "regression", (), ("pearson", "spearman"), texts, {})
    examples = tokenize(task, texts, load_tokenizer(world.tokenizer), TaskDataConfig(task="stsb"), "t")
    model: Any = SimpleNamespace(has_label_names=False)
    assert weakness(model, examples, labels[:, None] + 1) is None
    for outputs, reason in ((5 - labels, "pearson on the dev set is -1"), (labels / 50, "outputs are 0 to 0.0995 and")):
        assert reason in str(weakness(model, examples, outputs[:, None]))


def test_a_broken_or_weak_model_is_refused(world: World, tmp_path: Path) -> None:
    """Weights that are not finite: no score, no label, no run. A score of chance: no run."""
    for name in ("teacher", "headless"):
        shutil.copytree(getattr(world, name), tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        next(x for key, x in weights.items() if key.endswith("LayerNorm.weight")).fill_(math.nan)
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    broken = "teacher: broken, as logits in 24 of 24 rows of the dev set are not finite"
    weak = "accuracy on the dev set is .*is it fine-tuned for this task.*; teacher.baseline_check = false trains"
    tables = toy.task_config(tmp_path, world.files, tmp_path / "teacher", world.pretrained)
    corpus = toy.corpus_config(tmp_path, world.corpus, tmp_path / "headless", world.pretrained)
    checked = {"teacher.path": str(world.teacher), "teacher.baseline_check": True}
    for message, action in {
        broken: lambda: evaluate.evaluate(evaluate_config(world, tmp_path / "teacher")),
        "teacher: broken, as logits": lambda: predict(tmp_path / "teacher", ["ba"]),
        f"^.*{broken}": lambda: train(toy.parsed(tables)),
        "headless: broken, as outputs are": lambda: train(toy.parsed(corpus, {"objective": {"name": "minilm2"}})),
        weak: lambda: train(toy.parsed(tables, checked)),
    }.items():
        with pytest.raises(UserError, match=message):
            action()
    assert not (tmp_path / "toy" / "metrics.jsonl").exists()
    assert not (tmp_path / "toy" / "teacher_cache").exists()
