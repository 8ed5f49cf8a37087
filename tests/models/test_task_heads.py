"""Tagging, question answering and texts with several labels: learnt, distilled by every objective, exported, scored."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from conftest import World
from sklearn.metrics import f1_score
from toy_heads import LABELS, MAKE_FILES
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TaskDataConfig, TrainConfig
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.datasets import TaskDataset
from lad_dist.data.tasks.examples import QuestionExamples, TaskExamples
from lad_dist.data.tasks.task import load_task
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import latency
from lad_dist.evaluation.evaluate import evaluate, predict
from lad_dist.evaluation.prediction import predict as predict_texts
from lad_dist.models import loading
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import InferenceModel
from lad_dist.models.heads import label_order
from lad_dist.models.hf_config import load_hf_config
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.training import run_spec
from lad_dist.training.results import RunResult
from lad_dist.training.train import train

HEADS = list(LABELS)
AUTO = {
    "tagging": AutoModelForTokenClassification, "question_answering": AutoModelForQuestionAnswering,
    "multilabel": AutoModelForSequenceClassification,
}  # fmt: skip
METRICS = {
    "tagging": {"f1", "precision", "recall", "accuracy"},
    "question_answering": {"f1", "exact_match", "f1_answerable", "f1_unanswerable"},
    "multilabel": {name + end for name in ("f1_micro", "f1_macro", "subset_accuracy") for end in ("", "_tuned")},
}
LEARNT = {
    "tagging": ("f1", "accuracy"), "question_answering": ("f1", "exact_match"),
    "multilabel": ("f1_micro", "subset_accuracy"),
}  # fmt: skip
Files = dict[str, dict[str, Any]]
SIZES = {"max_length": 32, "micro_batch_size": 16, "micro_batches_per_step": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Some sentences and contexts are longer than a sequence may be, some questions have no answer."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "tagging": MAKE_FILES["tagging"](folder / "tagging", train=400, dev=40),
        "question_answering": MAKE_FILES["question_answering"](folder / "qa", 400, 40, unanswerable=True),
        "multilabel": MAKE_FILES["multilabel"](folder / "multilabel", train=400, dev=40),
    }


@pytest.fixture(scope="module")
def teachers(world: World, files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    """A fine-tuned teacher of each kind."""
    work = tmp_path_factory.mktemp("teachers")
    learning = {"run.steps": 250, "run.log_every": 250, "optim.lr": 5e-3, "student.num_hidden_layers": 2}
    without_teacher = {"teacher": None, "objective": {"name": "supervised"}, **learning}
    return {
        head: train(run(head, world, files, work, world.headless, {"run.name": head, **without_teacher}))
        for head in HEADS
    }


def run(head: str, world: World, files: Files, work: Path, teacher: Path, changes: dict[str, Any]) -> TrainConfig:
    tables = toy.task_config(work, files[head], teacher, world.headless)
    tables["data"] |= SIZES
    return toy.parsed(tables, changes)


def export(result: RunResult) -> Path:
    return result.folder / "export"


@pytest.mark.parametrize("head", HEADS)
def test_a_toy_task_is_learnt(head: str, teachers: dict[str, RunResult]) -> None:
    f1, other = (teachers[head].results["metrics"][name] for name in LEARNT[head])
    assert f1 > 0.95
    assert other > 0.9


TAUGHT = sorted(name for name, kind in OBJECTIVES.items() if kind.requires_teacher and "task" in kind.supported_data)


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("head", HEADS)
def test_every_objective_distils_it(
    head: str, name: str, world: World, files: Files, teachers: dict[str, RunResult], tmp_path: Path
) -> None:
    """Two steps: finite terms, metrics and loyalty, and an export that loads with its head."""
    rows: list[dict[str, Any]] = []
    changes = {"run.steps": 2, "student.num_hidden_layers": 2, "objective": {"name": name}, "run.name": "student"}
    result = train(run(head, world, files, tmp_path, export(teachers[head]), changes), rows.append)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert set(result.results["metrics"]) == METRICS[head] | {"loss", "label_loyalty", "probability_loyalty"}
    model = AUTO[head].from_pretrained(export(result))
    assert tuple(model.config.id2label.values()) == LABELS[head]


@pytest.mark.parametrize("head", HEADS)
def test_distilling_the_teachers_logits_makes_a_loyal_student(
    head: str, world: World, files: Files, teachers: dict[str, RunResult], tmp_path: Path
) -> None:
    """From the teacher's logits alone."""
    objective = {"name": "kd", "soft": 1.0, "hard": 0.0}
    changes = {
        "run.steps": 60,
        "optim.lr": 5e-3,
        "objective": objective,
        "student.num_hidden_layers": 2,
        "run.log_every": 60,
    }
    results = train(run(head, world, files, tmp_path, export(teachers[head]), changes)).results
    assert results["metrics"]["label_loyalty"] > 0.7
    assert results["metrics"]["probability_loyalty"] > 0.5


@pytest.mark.parametrize("head", HEADS)
def test_cached_teacher_outputs_belong_to_their_rows(
    head: str, world: World, files: Files, teachers: dict[str, RunResult], tmp_path: Path
) -> None:
    """Examples have different numbers of rows: a run with a teacher cache learns what one without learns."""
    losses = []
    for gigabytes in (20.0, 0.0):
        rows: list[dict[str, Any]] = []
        changes = {"run.steps": 3, "teacher.cache_gb": gigabytes, "run.name": f"{gigabytes}"}
        changes["teacher.cache"] = str(tmp_path / "cache")
        train(run(head, world, files, tmp_path, export(teachers[head]), changes), rows.append)
        losses.append([{key: row[key] for key in ("loss", "soft", "hard", "hidden")} for row in rows if "loss" in row])
    assert (tmp_path / "cache").is_dir()
    for cached, computed in zip(*losses, strict=True):
        assert cached == pytest.approx(computed, rel=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_an_export_scores_as_the_run_did(head: str, files: Files, teachers: dict[str, RunResult]) -> None:
    folder = str(export(teachers[head]))
    data = {**files[head], **SIZES}
    tables = {"model": {"path": folder}, "teacher": {"path": folder}, "data": data}
    scores = evaluate(parse_config(EvaluateConfig, tables, "toy"))
    results = teachers[head].results
    for name, value in results["metrics"].items():
        assert scores["model"][name] == pytest.approx(value, abs=1e-6)
    assert scores["model"]["label_loyalty"] == 1
    assert scores["model"]["probability_loyalty"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("head", HEADS)
def test_the_model_card_says_how_to_use_it(
    head: str, teachers: dict[str, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, Any] = {}
    folder = export(teachers[head])
    monkeypatch.chdir(folder.parent.parent)  # the card names no folder of this machine
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], used)
    name = {"multilabel": "classify", "tagging": "tag", "question_answering": "model"}[head]
    model = getattr(used[name], "model", used[name])
    weights = loading.load_model(str(folder), head, require_head=True).state_dict()  # type: ignore[arg-type]
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


def test_transformers_tags_as_the_run_did(files: Files, teachers: dict[str, RunResult]) -> None:
    """Its own pipeline on the dev set's text, word by word."""
    folder = export(teachers["tagging"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    pipeline = TokenClassificationPipeline(model=model, tokenizer=tokenizer, ignore_labels=[])
    rows = [json.loads(line) for line in Path(files["tagging"]["dev"]).read_text().splitlines()]
    right = count = 0
    for row in rows:
        text = " ".join(row["tokens"])
        starts = np.cumsum([0, *(len(word) + 1 for word in row["tokens"][:-1])]).tolist()
        tags = {token["start"]: token["entity"] for token in pipeline(text)}
        right += sum(tags[start] == tag for start, tag in zip(starts, row["tags"], strict=True))
        count += len(starts)
    results = teachers["tagging"].results
    assert right / count == pytest.approx(results["metrics"]["accuracy"])


def test_transformers_answers_as_the_run_did(files: Files, teachers: dict[str, RunResult]) -> None:
    """Its own padded forward over question and context: the logits of every row."""
    folder = export(teachers["question_answering"])
    tokenizer = load_tokenizer(folder)
    dev = dev_examples(files["question_answering"], folder)
    assert isinstance(dev, QuestionExamples)
    frozen = loading.load_model(str(folder), "question_answering", require_head=True).eval()
    with torch.no_grad():
        logits = predict(
            lambda batch: compute_outputs(frozen, batch, OutputSpec(logits=True)).logits, dev.in_order()
        ).logits
    examples = load_task(TaskDataConfig(**files["question_answering"], **SIZES)).dev["dev"]
    inputs = tokenizer(
        examples.questions, examples.contexts, padding=True, return_tensors="pt", return_offsets_mapping=True
    )
    assert dev.count == len(examples.questions)  # every context fits
    sides = [[n == 0 or side == 1 for n, side in enumerate(inputs.sequence_ids(i))] for i in range(dev.count)]
    inputs.pop("offset_mapping")
    model = AutoModelForQuestionAnswering.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        output = model(**inputs)
    expected = torch.stack([output.start_logits, output.end_logits], dim=-1)[torch.tensor(sides)]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


def dev_examples(files: dict[str, Any], folder: Path) -> TaskExamples:
    """Return the tokenized dev set."""
    data = TaskDataConfig(**files, **SIZES)
    return TaskDataset(data, load_task(data), load_tokenizer(folder), seed=0).dev["dev"]


def read_labelled(file: str) -> tuple[list[str], np.ndarray]:
    """Return the texts of a file and their labels as 0 and 1."""
    if file.endswith("csv"):
        rows = [line.split(",") for line in Path(file).read_text().splitlines()[1:]]
        pairs = [(text, [name for name in cell.split("|") if name]) for text, cell in rows]
    else:
        pairs = [tuple(json.loads(line).values()) for line in Path(file).read_text().splitlines()]
    return [text for text, _ in pairs], np.array([[x in names for x in LABELS["multilabel"]] for _, names in pairs])


def test_thresholds_of_labels_are_tuned_on_dev_stored_and_used(
    world: World, files: Files, teachers: dict[str, RunResult], tmp_path: Path
) -> None:
    """Scores are those of transformers' own pipeline, which applies a sigmoid, at 0.5 and at the stored thresholds."""
    teacher, other = export(teachers["multilabel"]), MAKE_FILES["multilabel"](tmp_path / "other", train=150)
    changes = {
        "run.steps": 12, "student.num_hidden_layers": 1, "objective": {"name": "kd"}, "data.test": other["train"],
        "data.class_weights": "balanced", "data.labels": list(LABELS["multilabel"]),
    }  # fmt: skip
    result = train(run("multilabel", world, files, tmp_path, teacher, changes))
    folder, results = export(result), result.results
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.label_thresholds == results["thresholds"]["student"]
    assert list(results["thresholds"]["teacher"]) == list(LABELS["multilabel"])
    thresholds = [model.config.label_thresholds[name] for name in LABELS["multilabel"]]
    assert thresholds != [0.5] * 3
    pipeline = TextClassificationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), top_k=None)
    for scores, file in (
        (results["metrics"], files["multilabel"]["dev"]),
        (results["test"]["student"], other["train"]),
    ):
        texts, gold = read_labelled(file)
        by_label = [{each["label"]: each["score"] for each in row} for row in pipeline(texts)]
        probabilities = np.array([[row[name] for name in LABELS["multilabel"]] for row in by_label])
        for end, limits in (("", 0.5), ("_tuned", np.array(thresholds))):
            for name, average in (("f1_micro", "micro"), ("f1_macro", "macro")):
                expected = f1_score(gold, probabilities >= limits, average=average)
                assert scores[name + end] == pytest.approx(expected, abs=1e-9)
        for row, predicted in zip(probabilities, predict_texts(folder, texts), strict=True):
            names = sorted(LABELS["multilabel"], key=lambda name: -predicted.probabilities[name])
            reached = {name for name, x, limit in zip(LABELS["multilabel"], row, thresholds, strict=True) if x >= limit}
            assert list(predicted.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
            assert predicted.labels == tuple(name for name in names if name in reached)
            assert predicted.label == (predicted.labels[0] if reached else None)
            assert predicted.score == max(predicted.probabilities.values())
    student, dev = InferenceModel(model), dev_examples(files["multilabel"], folder)
    forms = {"onnx": lambda inputs: [x.numpy() for x in student(**inputs)]}
    quality = latency._quality("student", student, forms, latency._DevSet(dev, None))["onnx"]  # type: ignore[arg-type]
    assert quality["metrics"] == pytest.approx({name: results["metrics"][name] for name in METRICS["multilabel"]})
    assert quality["loyalty"]["label_loyalty"] == 1
    tables = {"model": {"path": str(folder)}, "data": {**files["multilabel"], **SIZES, "labels": ["lu", "ba", "fi"]}}
    turned = evaluate(parse_config(EvaluateConfig, tables, "toy"))["model"]
    names = METRICS["multilabel"] | {"loss"}
    assert {name: turned[name] for name in names} == pytest.approx({name: results["metrics"][name] for name in names})


def test_one_label_and_several_are_not_mistaken_for_each_other(
    world: World, files: Files, teachers: dict[str, RunResult], tmp_path: Path
) -> None:
    labels, several = LABELS["multilabel"], export(teachers["multilabel"])
    one = toy.model(tmp_path / "one", world.tokenizer, "classification", labels)
    with pytest.raises(
        UserError, match="one: the model gives a text one label, the task gives it several labels at on"
    ):
        run_spec.resolve_run(run("multilabel", world, files, tmp_path, one, {}))
    single = load_hf_config(str(several))
    with pytest.raises(UserError, match="the model gives a text several labels at once, the task gives it one label"):
        label_order(single, str(several), "classification", labels)
    before = loading.load_model(str(several), "multilabel", labels=labels)
    after = loading.load_model(str(several), "classification", labels=labels)
    assert not torch.equal(before.classifier.weight, after.classifier.weight)
    assert (before.config.problem_type, hasattr(before.config, "label_thresholds")) == (
        "multi_label_classification",
        True,
    )
    assert (after.config.problem_type, hasattr(after.config, "label_thresholds")) == (
        "single_label_classification",
        False,
    )


@pytest.mark.parametrize("thresholds", [[0.5] * 3, {"ba": 0.5, "fi": 0.5}, {"ba": 0.5, "fi": 0.5, "lu": 50}])
def test_thresholds_that_do_not_fit_the_labels_are_refused(
    thresholds: Any, teachers: dict[str, RunResult], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(export(teachers["multilabel"]), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_thresholds": thresholds}))
    with pytest.raises(
        UserError, match=r"label_thresholds in config\.json is .*; give each of ba, fi, lu a number from"
    ):
        predict_texts(folder, ["ba"])
    del config["label_thresholds"]
    (folder / "config.json").write_text(json.dumps(config))
    assert [len(x.labels) for x in predict_texts(folder, ["ban", "fil lun ban"])] == [1, 3]


def test_a_head_of_another_kind_is_new_in_a_student_and_refused_in_a_teacher(
    world: World, files: Files, teachers: dict[str, RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head of the same kind is kept, whatever the outputs for questions are called, and new for other labels."""
    labels = LABELS["tagging"]
    classifier = toy.model(tmp_path / "classifier", world.tokenizer, "classification", labels)
    loaded = loading.load_model(str(classifier), "tagging", labels=labels)
    before = loading.load_model(str(classifier), "classification", labels=labels).classifier.weight
    assert not torch.equal(loaded.classifier.weight, before)
    config = run("tagging", world, files, tmp_path, classifier, {})
    with pytest.raises(UserError, match="is BertForSequenceClassification, which has no head for tagging"):
        run_spec.resolve_run(config)
    unnamed = toy.model(tmp_path / "unnamed", world.tokenizer, "question_answering")
    first, second = (loading.load_model(str(unnamed), "question_answering", labels=("start", "end")) for _ in range(2))
    assert torch.equal(first.qa_outputs.weight, second.qa_outputs.weight)
    run_spec.resolve_run(run("question_answering", world, files, tmp_path, unnamed, {}))
    others = toy.model(tmp_path / "others", world.tokenizer, "tagging", ("A", *labels[1:]))
    teacher = export(teachers["tagging"])
    for student in (teacher, others):
        assert not caplog.messages
        spec = run_spec.resolve_run(run("tagging", world, files, tmp_path, teacher, {"student.path": str(student)}))
        spec.distiller(spec.dataset())
    assert caplog.messages == [
        f"{others}: a new head replaces the one for other labels (A, {labels[1]}, {labels[2]}, …)"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.doc_stride": 16}, "doc_stride = 16 must be less than half of max_length = 32"),
        ({"data.kind": "tagging", "data.doc_stride": 8}, 'stride goes with kind = "question_answering" alone'),
        (
            {"data.kind": "classification", "data.null_score_diff_threshold": 1.0},
            "null_score_diff_threshold goes with kind",
        ),
        ({"data.kind": "tagging"}, r'train\.json: file type "\.json" is unknown'),
        (
            {"data.kind": "question_answring"},
            "data.kind: input should be 'classification', 'multilabel', 'regression', ",
        ),
        (
            {"data.task": "rte", "data.train": None, "data.dev": None},
            "is for train and dev files; a GLUE task names a kind already",
        ),
        ({"teacher.path": "{teacher}"}, "has no head for question answering"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, world: World, files: Files, tmp_path: Path) -> None:
    filled = {k: v.format_map(vars(world)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        run_spec.resolve_run(run("question_answering", world, files, tmp_path, world.headless, filled))
