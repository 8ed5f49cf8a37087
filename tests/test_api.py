"""The Python API, as the README shows it."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from conftest import World
from launching import ROOT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lad_dist
from lad_dist import load_config, predict
from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.schema import PretrainConfig, TaskConfig
from lad_dist.models import loading


def write_rows(file: Path, teacher: Path, first: int, count: int) -> None:
    """Texts with the labels that the teacher predicts, of each label as many."""
    texts = [toy.sentence(first + n, most=6) for n in range(4 * count)]
    by_label: dict[Any, list[str]] = {label: [] for label in toy.LABELS}
    for text, prediction in zip(texts, predict(teacher, texts), strict=True):
        by_label[prediction.label].append(text)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("text", "label"), *((text, label) for label in toy.LABELS for text in by_label[label][: count // 2])]
        )


def undecided(folder: Path) -> Path:
    """Move the bias of a classifier so that it predicts either label for half of all texts."""
    texts = [toy.sentence(n, most=6) for n in range(200)]
    odds = [np.log(x.probabilities["yes"] / x.probabilities["no"]) for x in predict(folder, texts)]
    model = loading.load_model(str(folder), "classification", labels=toy.LABELS)
    with torch.no_grad():
        model.classifier.bias[toy.LABELS.index("yes")] -= float(np.median(odds))
    loading.save_model(model, folder)
    return folder


def test_the_example_of_the_readme_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    sizes = {"max_position_embeddings": 128}
    teacher = undecided(toy.model(tmp_path / "my-model", world.tokenizer, "classification", toy.LABELS, **sizes))
    write_rows(tmp_path / "train.csv", teacher, 0, 32)
    write_rows(tmp_path / "dev.csv", teacher, 1000, 8)
    exec(compile(example, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[-1] in toy.LABELS
    assert "'label_loyalty': " in second
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"student", "kd"}


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
def test_predictions_are_those_of_transformers(world: World, pairs: bool) -> None:
    first, second = ([toy.sentence(begin + n) for n in range(70)] for begin in (0, 500))
    predictions = predict(world.teacher, list(zip(first, second, strict=True)) if pairs else first)
    model = AutoModelForSequenceClassification.from_pretrained(world.teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    inputs = tokenizer(
        first,
        second if pairs else None,
        padding=True,
        truncation=True,
        max_length=64,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(dim=1).numpy()
    predicted = np.array([[each.probabilities[label] for label in toy.LABELS] for each in predictions])
    np.testing.assert_allclose(predicted, expected, atol=1e-6)
    assert [each.label for each in predictions] == [toy.LABELS[n] for n in expected.argmax(axis=1)]
    assert all(each.score == max(each.probabilities.values()) for each in predictions)


def test_a_regression_predicts_numbers(world: World, tmp_path: Path) -> None:
    model = toy.model(tmp_path / "model", world.tokenizer, "regression", ("score",))
    [prediction] = predict(model, ["ba"])
    assert prediction.label is None
    assert np.isfinite(prediction.score)


def test_a_model_without_a_classifier_predicts_nothing(world: World) -> None:
    with pytest.raises(UserError, match=r"max_length: 65 tokens, but .* has 64 positions"):
        predict(world.teacher, ["ba"], max_length=65)
    with pytest.raises(UserError, match="BertForMaskedLM has no head for a task"):
        predict(world.pretrained, ["ba"])


def test_texts_and_pairs_do_not_mix(world: World) -> None:
    with pytest.raises(UserError, match="some are pairs"):
        predict(world.teacher, ["ba", ("ba", "be")])


def test_a_config_has_the_schema_by_the_tables() -> None:
    assert isinstance(load_config("configs:pretrain/minilm2.toml"), PretrainConfig)
    assert isinstance(load_config("configs:task/evaluate.toml"), EvaluateConfig)
    config = load_config("configs:task/lad.toml", {"data.task": "mrpc", "run.label": None})
    assert isinstance(config, TaskConfig)
    assert config.data.task == "mrpc"


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        lad_dist.destill  # noqa: B018
