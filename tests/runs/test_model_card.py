"""The model card: a header that the hub reads, scores beside the teacher's, readable files, and the upload."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from huggingface_hub import EvalResult, ModelCard, RepoUrl
from huggingface_hub.repocard_data import model_index_to_eval_results
from launching import run_command
from toy_runs import lad

from lad_dist.runs import push
from lad_dist.runs.card_header import base_models, header
from lad_dist.runs.model_card import model_card
from lad_dist.runs.usage_code import usage_code
from lad_dist.training.train import train


def results(data: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """Return the results of a run on this data."""
    parts = ("embeddings", "attention", "feed_forward", "head")
    counts = {f"{kind}/{part}": 1000.0 for kind in ("stored", "nonzero", "forward_flops_per_token") for part in parts}
    totals = {"parameters": 4000, "stored": 4000, "nonzero": 4000, "forward_flops_per_token": 4000.0}
    config = {
        "run": {"name": "small", "dir": "runs", "seed": 0},
        "teacher": {"path": "runs/teacher-rte/export"},
        "data": data,
        "objective": {"name": "lad"},
        "compression": [{"name": "low_rank", "keep": 0.5}],
    }
    return {
        "command": "deepspeed --num_gpus 2 launch/task_distill.py configs/task/lad.toml",
        "config": config,
        "export": {"head": "classification", "labels": ["no", "yes"], "text_pairs": True, "base_model": ["org/base"]},
        "metrics": {"accuracy": 0.625, "loss": 0.5, "label_loyalty": 0.75},
        "test": {},
        "student": {**totals, **counts, "bytes/safetensors": 2_000_000},
        "teacher": {"parameters": 8000, "accuracy": 0.6875},
        "steps": 1200,
        "seconds": 90.0,
        "processes": 2,
        "device": "cpu",
        **tables,
    }


CARD = """\
---
base_model:
- org/base
datasets:
- nyu-mll/glue
library_name: transformers
metrics:
- accuracy
pipeline_tag: text-classification
tags:
- lad_dist
- lad
- low_rank
model-index:
- name: small
  results:
  - task:
      type: text-classification
    dataset:
      name: GLUE rte
      type: nyu-mll/glue
      config: rte
      split: validation
    metrics:
    - type: accuracy
      value: 0.625
      name: accuracy
---
# small

A student trained with objective `lad`, taught by `runs/teacher-rte/export`.

Labels, in the order of the outputs: `no`, `yes`.

## How to use

```python
from transformers import pipeline

classify = pipeline("text-classification", model="runs/small/export", truncation=True)
print(classify([{"text": "One text.", "text_pair": "Another one."}])[0]["label"])
```

## How good

| measured | student | teacher |
| --- | --- | --- |
| parameters | 4,000 | 8,000 |
| accuracy | 0.625 | 0.6875 |
| loss | 0.5 |  |
| label_loyalty | 0.75 |  |

Measured by
```
deepspeed --num_gpus 2 launch/task_distill.py configs/task/lad.toml
```
in 1.5 minutes and 1,200 steps on cpu, 2 processes; metrics are those of the dev set, also used for selection.

## How small

|  | weights | not zero | FLOPs per token |
| --- | --- | --- | --- |
| embeddings | 1,000 | 1,000 | 1,000 |
| attention | 1,000 | 1,000 | 1,000 |
| feed_forward | 1,000 | 1,000 | 1,000 |
| head | 1,000 | 1,000 | 1,000 |

Counted in the compact form: low-rank maps as pairs, layers without pruned heads and units. Weights that are zero count like the others.
On disk: safetensors 2.0 MB.
"""  # noqa: E501 (as it stands on the card)


def test_the_whole_card() -> None:
    assert model_card(results({"task": "rte", "kind": "classification"})) == CARD


def test_the_hub_reads_the_header() -> None:
    data = ModelCard(CARD).data
    assert (data.base_model, data.datasets, data.metrics) == (["org/base"], ["nyu-mll/glue"], ["accuracy"])
    name, scores = model_index_to_eval_results(data.to_dict()["model-index"])
    expected = {"dataset_config": "rte", "dataset_split": "validation", "metric_name": "accuracy"}
    assert name == "small"
    assert scores == [
        EvalResult("text-classification", "nyu-mll/glue", "GLUE rte", "accuracy", 0.625, **expected)  # type: ignore[arg-type]
    ]
    assert "license" not in data.to_dict()


def scores_of(data: dict[str, Any], **tables: Any) -> set[tuple[str, str, str | None, str | None, float]]:
    """Return (type, data set, configuration, split, value) of the scores in a header."""
    scores = ModelCard(f"---\n{header(results(data, **tables))}\n---\n").data.eval_results or []
    return {(x.metric_type, x.dataset_type, x.dataset_config, x.dataset_split, x.metric_value) for x in scores}


@pytest.mark.parametrize(
    ("data", "metrics", "test", "expected"),
    [
        (
            {"task": "mnli"},
            {"accuracy": 0.5, "accuracy_mismatched": 0.25},
            {},
            {
                ("accuracy", "nyu-mll/glue", "mnli", "validation_matched", 0.5),
                ("accuracy", "nyu-mll/glue", "mnli", "validation_mismatched", 0.25),
            },
        ),
        (
            {"hub": "org/texts", "hub_config": "en", "train": "train", "dev": "held", "test": "last"},
            {"matthews": 0.5},
            {"student": {"f1_macro": 0.25}},
            {("matthews_correlation", "org/texts", "en", "held", 0.5), ("f1", "org/texts", "en", "last", 0.25)},
        ),
        (
            {"train": "/home/me/train.csv", "dev": "/home/me/dev.csv"},
            {"pearson": 0.5, "spearman": math.nan},
            {},
            {("pearsonr", "csv", None, "validation", 0.5)},
        ),
        ({"shards": "corpora/files"}, {"loss": 2.0}, {}, set()),
    ],
    ids=["two dev sets", "hub", "own files", "corpus"],
)
def test_scores_carry_the_names_of_the_hub(data: Any, metrics: Any, test: Any, expected: Any) -> None:
    assert scores_of(data, metrics=metrics, test=test) == expected
    text = header(results(data, metrics=metrics, test=test))
    assert "/home" not in text
    assert ("datasets:" in text) == ("task" in data or "hub" in data)


def test_no_folder_of_this_machine_is_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, origin in (("downloaded", "org/base"), ("moved", "/home/me/base"), ("unnamed", None), ("named", "org/x")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        tables = {"model_type": "bert"} | ({"_name_or_path": origin} if origin else {})
        (folder / "config.json").write_text(json.dumps(tables))
    (tmp_path / "runs" / "named" / "README.md").write_text("---\nbase_model: org/carded\n---\n")
    (tmp_path / "runs" / "unnamed" / "README.md").write_text("---\nbase_model: [\n---\n")
    (tmp_path / "runs" / "empty").mkdir()
    names = ["downloaded", "moved", "unnamed", "named", "empty"]
    assert base_models([f"runs/{name}" for name in names]) == ["org/base", "org/carded"]
    assert base_models(["org/hub", None, "org/hub", str(tmp_path / "absent"), "runs/moved"]) == ["org/hub"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_an_export_is_as_readable_as_the_umask_allows(world: World, tmp_path: Path, umask: int, mode: int) -> None:
    """Of itself safetensors writes for the owner alone."""
    before = os.umask(umask)
    try:
        export = train(lad(world, tmp_path, {"run.steps": 1, "compression": [{"name": "low_rank", "keep": 0.3}]}))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in export.export_dir.iterdir()}
    assert {"model.safetensors", "compact.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(modes)
    assert set(modes.values()) == {mode}


def test_the_results_of_a_run_are_what_the_card_names(world: World, tmp_path: Path) -> None:
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nbase_model: org/base\n---\n")
    result = train(lad(world, tmp_path, {"run.steps": 1, "teacher.path": str(teacher)}))
    assert result.results is not None
    expected = {"head": "classification", "labels": ["no", "yes"], "text_pairs": False, "base_model": ["org/base"]}
    assert result.results["export"] == expected
    text = (result.export_dir / "README.md").read_text()
    assert text == model_card(result.results)
    assert "taught by `" in text
    assert str(tmp_path) not in text.partition("## How good")[0]


@pytest.mark.parametrize(
    ("head", "call"),
    [
        ("regression", '["score"]'),
        ("tagging", 'pipeline("token-classification", model="runs/small/export"'),
        ("question_answering", 'AutoModelForQuestionAnswering.from_pretrained("runs/small/export")'),
        ("mlm", 'pipeline("fill-mask", model="runs/small/export")'),
        ("none", 'pipeline("feature-extraction", model="runs/small/export", truncation=True)'),
    ],
)
def test_the_code_is_that_of_the_head(head: str, call: str) -> None:
    (code,) = usage_code(results({"task": "rte"}, export={"head": head}))
    compile(code, "card", "exec")
    assert call in code


class Recorder:
    """Stands for huggingface_hub.HfApi, and records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def create_repo(self, name: str, **options: Any) -> RepoUrl:
        self.calls.append(("create", name, options))
        return RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run with a card."""
    folder = tmp_path / "small"
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "model.safetensors").write_bytes(b"")
    student = results({"task": "rte"})["student"] | {"bytes/onnx": 5}
    (folder / "results.json").write_text(json.dumps(results({"task": "rte"}, student=student)))
    return folder


def test_an_export_is_uploaded_with_a_card_that_names_the_repository(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(push, "HfApi", lambda: recorder)
    assert run_command("push", str(run), "me/small") == 0
    assert capsys.readouterr().out == "uploaded to https://huggingface.co/me/small\n"
    assert recorder.calls == [
        ("create", "me/small", {"private": True, "exist_ok": True}),
        ("upload", "me/small", ["README.md", "model.safetensors"]),
    ]
    text = (run / "export" / "README.md").read_text()
    assert 'model="me/small"' in text
    assert 'Path(snapshot_download("me/small"), "onnx")' in text
    assert run_command("push", str(run), "me/small", "--public") == 0
    assert recorder.calls[2][2]["private"] is False


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/small", "error: me/small: cannot be uploaded to the hub ("),
        ("me/my/small", "error: me/my/small: no name of a repository on the hub; name it USER/MODEL"),
    ],
    ids=["offline", "name"],
)
def test_an_upload_that_fails_is_one_line_and_changes_nothing(
    name: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "results.json").read_bytes()
    assert run_command("push", str(run), name) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert len(error.splitlines()) == 1
    assert (run / "results.json").read_bytes() == before
    assert run_command("push", str(run / "export"), name) == 2
    assert "holds no complete run" in capsys.readouterr().err
