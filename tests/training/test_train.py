"""Training, through `train`."""

import gc
import itertools
import json
import math
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweep
import tomli_w
import torch
import toy
from checkpoint_damage import Bomb
from conftest import World
from launching import ROOT, ForkedScript, run_command, wait_until
from safetensors.torch import load_file
from toy_runs import curve, digest, lad, metrics_file, stopped_at
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from lad_dist.checkpointing.store import CheckpointStore, read_metadata
from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.schema import TrainConfig
from lad_dist.evaluation import evaluate
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.loading import PreTrainedModel
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.training import engine, run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.metrics import MetricAccumulator
from lad_dist.training.train import train
from lad_dist.utils import atomic_io

DROPOUT = {"student.dropout": 0.1, "student.attention_dropout": 0.1}
HALF = {"deepspeed.bf16.enabled": True, "deepspeed.zero_optimization.stage": 1}


def on_corpus(world: World, work: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    return toy.parsed(toy.corpus_config(work, world.corpus, world.pretrained, world.pretrained), changes)


def test_lad_learns(world: World, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result = train(lad(world, tmp_path, {"run.steps": 30}), rows.append)
    assert result.results is not None
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_means_of_many_half_precision_numbers() -> None:
    """In bf16 a sum of halves stands still at 128."""
    averages, batch = MetricAccumulator(), toy.batch([3])
    for _ in range(600):
        averages.add(batch, {"gate/2": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert averages.sums["gate/2"].item() == 300


@pytest.mark.parametrize(("stage", "size"), [(0, None), (1, None), (2, 1000)])
def test_a_trained_engine_is_freed_and_no_bucket_is_larger_than_the_gradients(
    stage: int, size: int | None, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise several runs, or returns to a checkpoint, exhaust the memory; DeepSpeed's default is 2 GB in fp32."""
    built: list[weakref.ref[Any]] = []

    def build(distiller: Distiller, config: TrainConfig) -> Any:
        new_engine = original(distiller, config)
        built.extend((weakref.ref(distiller), weakref.ref(new_engine)))
        if stage:
            num_weights = sum(x.numel() for x in distiller.parameters())
            assert new_engine.optimizer.reduce_bucket_size == (size or num_weights)
        return new_engine

    original = engine.build_engine
    monkeypatch.setattr(engine, "build_engine", build)
    zero = {"stage": stage} | ({} if size is None else {"reduce_bucket_size": size})
    train(lad(world, tmp_path, {"run.steps": 2, "deepspeed.zero_optimization": zero}))
    gc.collect()
    assert [reference() for reference in built] == [None, None]


NO_TEACHER: dict[str, Any] = {"teacher": None}
WITH_TEACHER = [name for name, kind in OBJECTIVES.items() if kind.requires_teacher]  # all take both kinds of data
ON_TASKS: list[dict[str, Any]] = [
    NO_TEACHER | {"objective": {"name": "supervised"}},
    *[{"objective": {"name": name}} for name in WITH_TEACHER],
    {"student.path": "{narrow}", "objective": {"name": "emd"}},
    {"student.path": "{narrow}", "objective": {"name": "tinybert"}},
    {"compression": [{"name": "low_rank", "keep": 0.5, "embeddings": 0.5, "activation_aware": True}]},
    {
        "compression": [{"name": "ladabert", "reduction": 2.0, "embedding": 3.0, "svd": 1.5}],
        "objective": {"name": "kd"},
    },
    {"compression": [{"name": "heads", "heads": 0.5, "units": 0.5, "update_every": 1}]},
    {"compression": [{"name": "quantize"}], **HALF},
    {"student.embeddings": "random", "data.pad_to": 32, "objective.variant": "paper"},
    {"teacher.dtype": "bfloat16", **HALF},
]
ON_CORPORA: list[dict[str, Any]] = [
    NO_TEACHER | {"objective": {"name": "mlm"}},
    *[{"objective": {"name": name}} for name in WITH_TEACHER if OBJECTIVES[name].uses_mlm_head],
    *[
        {"teacher.path": "{headless}", "objective": {"name": name, "soft": 0.0}}
        for name in ("distilbert", "pkd", "alp", "lad")
    ],
    {"teacher.path": "{headless}", "objective": {"name": "emd", "soft": 0.0, "hard": 1.0}},
    *[{"teacher.path": "{headless}", "objective": {"name": name}} for name in ("tinybert", "minilm", "minilm2")],
    {"teacher.path": "{headless}", "student.path": "{headless}", "objective": {"name": "minilm2", "heads": 8}},
    *[
        {"student": {"architecture": {**toy.SIZES, "hidden_size": 16}}, "objective": {"name": name}}
        for name in ("emd", "tinybert", "minilm", "minilm2")
    ],
    {"compression": [{"name": "low_rank", "keep": 0.5}], "objective": {"name": "kd"}},
]


def filled(changes: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """Return the changes with paths in place of {teacher} and the like."""
    return {k: v.format_map(places) if isinstance(v, str) else v for k, v in changes.items()}


@pytest.mark.parametrize(
    ("corpus", "changes"), [(False, changes) for changes in ON_TASKS] + [(True, changes) for changes in ON_CORPORA]
)
def test_it_trains(corpus: bool, changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    """Finite losses that are the sum of their terms, student weights that move, and an export that loads."""
    narrow = tmp_path / "narrow"
    if "{narrow}" in changes.values():
        toy.model(narrow, world.tokenizer, "none", hidden_size=16)
    changes = filled(changes, {**vars(world), "narrow": narrow})
    config = (on_corpus if corpus else lad)(world, tmp_path, changes | {"run.steps": 2})
    rows: list[dict[str, Any]] = []
    result = train(config, rows.append)
    assert result.results is not None
    rows = [row for row in rows if row["step"] > 0]  # from the first step; the row of step 0 holds initial values
    for row in rows[:2]:
        assert math.isfinite(row["loss"])
        terms = {name for name in row if "/" not in name} - {"step", "steps", "loss", "tokens_per_second", "grad_norm"}
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms), rel=2e-2)
    assert [row["step"] for row in rows] == [1, 2, 2]
    exported = AutoModel.from_pretrained(result.folder / "export")
    assert exported.config.num_hidden_layers == (config.student.num_hidden_layers or 4)
    if config.student.path is not None and config.student.embeddings == "copy":
        start = AutoModel.from_pretrained(config.student.path).embeddings.word_embeddings.weight
        now = exported.embeddings.word_embeddings.weight
        assert 0 < (start - now).abs().max() < 0.1
    assert result.results["metrics"]
    assert all(math.isfinite(value) for value in result.results["metrics"].values())


def test_tinybert_continues_with_the_logits(world: World, tmp_path: Path) -> None:
    """Two phases, two runs: the second begins with the weights of the first, the untrained head among them."""
    first = train(lad(world, tmp_path, {"run.name": "first", "run.steps": 2, "objective": {"name": "tinybert"}}))
    student = {"path": str(first.folder / "export")}
    prediction = {"name": "kd", "soft": 1.0, "hard": 0.0, "temperature": 1.0}
    changes = {"run.steps": 1, "student": student, "objective": prediction, "optim.lr": 1e-9}
    second = train(lad(world, tmp_path, changes))
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(run.folder / "export").state_dict()
        for run in (first, second)
    )
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


def test_regression(world: World, tmp_path: Path) -> None:
    """Own .jsonl and .tsv with numbers; the teacher is a regression's own export."""
    rows = [(toy.sentence(n), n % 7 / 2) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    (tmp_path / "dev.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows[:20]))
    files = {"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.tsv"), "kind": "regression"}
    tables = toy.task_config(tmp_path, files, world.teacher, world.pretrained)
    alone = {"run.name": "teacher", "run.steps": 2, "teacher": None, "objective": {"name": "supervised"}}
    teacher = train(toy.parsed(tables, alone))
    result = train(toy.parsed(tables, {"run.steps": 2, "teacher.path": str(teacher.folder / "export")}))
    assert set(result.results["metrics"]) == {"pearson", "spearman", "loss", "teacher_pearson"}
    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "export")
    assert model.config.problem_type == "regression"
    assert model.classifier.out_features == 1


def test_results_say_how_good_small_fast_and_faithful(world: World, tmp_path: Path) -> None:
    config = lad(world, tmp_path, {"run.steps": 2})
    result = train(config)
    results = json.loads((result.folder / "results.json").read_text())
    assert results == json.loads(json.dumps(result.results))
    assert set(results) >= {
        "command", "config", "metrics", "student", "teacher", "steps", "seconds", "tokens_per_second", "processes",
        "device", "versions",
    }  # fmt: skip
    assert set(results["metrics"]) >= {"accuracy", "f1_macro", "matthews", "label_loyalty", "probability_loyalty"}
    assert results["teacher"]["parameters"] > results["student"]["parameters"]
    assert results["teacher"]["forward_flops_per_token"] > results["student"]["forward_flops_per_token"]
    assert results["config"]["objective"]["temperature"] == 2.0  # defaults are written out
    assert results["steps"] == 2
    assert results["seconds"] > 0
    assert (result.folder / "config.toml").read_text().count("temperature") == 1


def test_a_test_set_is_scored_once_at_the_end(world: World, tmp_path: Path) -> None:
    changes = {"run.steps": 4, "run.eval_every": 2, "data.test": world.files["train"]}
    rows: list[dict[str, Any]] = []
    results = train(lad(world, tmp_path, changes), rows.append).results
    model, teacher = ({"path": str(path)} for path in (tmp_path / "toy" / "export", world.teacher))
    data = {"train": world.files["dev"], "dev": world.files["train"], "max_length": 32}
    tables = {"model": model, "teacher": teacher, "data": data}
    alone = evaluate.evaluate(EvaluateConfig.model_validate(tables), speedup=False)
    for role, name in (("student", "model"), ("teacher", "teacher")):
        scores = results["test"][role]
        assert scores == {key: pytest.approx(alone[name][key], abs=1e-4) for key in scores}
        assert {"accuracy"} <= scores.keys()
    without = train(lad(world, tmp_path / "without", {"run.steps": 4, "run.eval_every": 2})).results
    assert (without["test"], without["metrics"]) == ({}, results["metrics"])
    assert {key.partition("/")[0] for row in rows for key in row if "accuracy" in key} == {"dev", "teacher"}


def padded(tokenizer_folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return dict(tokenizer([toy.sentence(n) for n in range(5)], padding=True, return_tensors="pt"))


@pytest.mark.parametrize(
    ("kind", "compression"),
    [("classification", False), ("classification", True), ("mlm", False), ("mlm", True), ("none", False)],
)
def test_the_export_is_the_trained_model(
    kind: str, compression: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are equal bit for bit, logits by transformers' own forward.

    Compressed modules are merged, nothing of the objective is exported; tokenizer and model card lie beside.
    """
    trained: dict[str, Any] = {}
    export = Distiller.export

    def watched(distiller: Distiller) -> PreTrainedModel:
        trained["before"] = dev_logits(distiller)
        student = export(distiller)
        trained["weights"] = {name: weight.clone() for name, weight in student.state_dict().items()}
        return student

    def dev_logits(distiller: Distiller) -> torch.Tensor:
        from lad_dist.core.collate import collate, span_starts
        from lad_dist.core.outputs import OutputSpec

        distiller.eval()
        inputs = padded(world.tokenizer)
        ids = [
            row[mask.bool()].numpy() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        starts = span_starts(ids)
        rows = np.arange(starts[-1]) if kind == "mlm" else starts[:-1]
        output_spec = OutputSpec(hidden=(2,)) if kind == "none" else OutputSpec(logits=True)
        segments = [np.zeros(len(row), dtype=np.uint8) for row in ids]
        with torch.no_grad():
            outputs = compute_outputs(distiller.student, collate(ids, segments, rows, rows), output_spec)
        return outputs.hidden[2] if outputs.logits is None else outputs.logits

    monkeypatch.setattr(Distiller, "export", watched)
    changes: dict[str, Any] = {"run.steps": 3}
    embeddings = 0.5 if kind == "classification" else 1.0  # an MLM head reads them
    changes |= {"compression": [{"name": "low_rank", "keep": 0.5, "embeddings": embeddings}]} if compression else {}
    changes |= {"objective": {"name": "minilm2"}} if kind == "none" else {}
    folder = train((lad if kind == "classification" else on_corpus)(world, tmp_path, changes)).folder / "export"
    auto = {"classification": AutoModelForSequenceClassification, "mlm": AutoModelForMaskedLM, "none": AutoModel}[kind]
    model = auto.from_pretrained(folder, attn_implementation="sdpa").eval()
    weights = model.state_dict()
    assert set(weights) == set(trained["weights"])
    assert all(torch.equal(weights[name], weight) for name, weight in trained["weights"].items())
    assert not any("gate" in name or "objective" in name or "inner" in name for name in weights)
    inputs = padded(folder)
    with torch.no_grad():
        output = model(**inputs)
    logits = output.last_hidden_state if kind == "none" else output.logits
    if kind != "classification":
        logits = logits[inputs["attention_mask"].bool()]
    limit = 1e-5 if compression else 2e-6
    torch.testing.assert_close(logits, trained["before"], rtol=limit, atol=limit)
    card = (folder / "README.md").read_text()
    assert "\nlibrary_name: transformers\n" in card
    assert "| parameters |" in card
    namespace: dict[str, Any] = {}
    monkeypatch.chdir(folder.parent.parent)  # the card names no folder of this machine
    exec(card.split("```python\n")[1].split("```")[0], namespace)
    pipeline = namespace[{"classification": "classify", "mlm": "fill", "none": "encode"}[kind]]
    encoder = pipeline.model.base_model.state_dict()
    assert all(torch.equal(encoder[name], weight) for name, weight in model.base_model.state_dict().items())
    assert sorted(path.name for path in folder.iterdir() if "token" not in path.name) == [
        "README.md", *["compact.safetensors"] * compression, "config.json", "model.safetensors"
    ]  # fmt: skip


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32-zero0": {},
    "fp32-zero1": {"deepspeed.zero_optimization.stage": 1},
    "bf16-zero1": HALF,
    "fp32-zero3": {"deepspeed.zero_optimization.stage": 3},
}
COVERING = [(False, "fp32-zero0"), (False, "bf16-zero1"), (True, "fp32-zero1")]


@pytest.mark.parametrize(
    ("corpus", "precision"), itertools.product([False, True], [*PRECISIONS][:3]) if sweep.enabled else COVERING
)
def test_a_run_that_stopped_half_way_ends_as_one_that_did_not(
    corpus: bool, precision: str, world: World, tmp_path: Path
) -> None:
    """Bit for bit, with dropout on: weights, and every row."""
    assert_it_goes_on(on_corpus if corpus else lad, PRECISIONS[precision], world, tmp_path)


STATES: dict[str, dict[str, Any]] = {
    "emd": {"objective": {"name": "emd", "hidden": 1.0, "attention": 1.0}},
    "heads": {"compression": [{"name": "heads", "heads": 0.5, "units": 0.3, "end": 0.7, "update_every": 2}]},
    "quantize": {"compression": [{"name": "quantize", "begin": 0.6}]},
    "theseus": {"student.path": "{teacher}", "compression": [{"name": "theseus", "end": 1.0}]},  # not under ZeRO-3
}
COVERING_STATES = [
    ("emd", "bf16-zero1"),
    ("emd", "fp32-zero3"),
    ("heads", "fp32-zero0"),
    ("heads", "fp32-zero3"),
    ("quantize", "fp32-zero3"),
    ("theseus", "fp32-zero1"),
]
ALL_STATES = [pair for pair in itertools.product(STATES, PRECISIONS) if pair != ("theseus", "fp32-zero3")]


@pytest.mark.parametrize(("kind", "precision"), ALL_STATES if sweep.enabled else COVERING_STATES)
def test_so_does_one_whose_objective_or_compression_has_a_state(
    kind: str, precision: str, world: World, tmp_path: Path
) -> None:
    assert_it_goes_on(lad, {**PRECISIONS[precision], **filled(STATES[kind], vars(world))}, world, tmp_path)


def assert_it_goes_on(make: Callable[..., TrainConfig], changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    changes = {**changes, **DROPOUT, "run.steps": 6, "run.eval_every": 2}
    whole: list[dict[str, Any]] = []
    straight = train(make(world, tmp_path / "a", changes), whole.append)
    config, rows = make(world, tmp_path / "b", changes), list[dict[str, Any]]()
    stopped = stopped_at(config, 3, rows)
    assert stopped.results is None
    assert not (stopped.folder / "results.json").exists()
    resumed = train(config, rows.append)
    assert resumed.results is not None
    assert curve(rows) == curve(whole)
    assert digest(resumed.folder / "export") == digest(straight.folder / "export")
    written = metrics_file(resumed.folder)
    assert curve(written) == curve(metrics_file(straight.folder))
    keys = [(row["step"], "loss" in row) for row in written]
    assert len(keys) == len(set(keys))


def test_a_run_goes_on_under_another_zero_stage(world: World, tmp_path: Path) -> None:
    """Through the same folder; ZeRO 3 is refused in one line."""
    changes = {**DROPOUT, "run.steps": 6}
    straight = train(lad(world, tmp_path / "a", changes))
    for step, stage in enumerate((0, 2, 1), start=1):
        stopped = stopped_at(lad(world, tmp_path / "b", changes | {"deepspeed.zero_optimization.stage": stage}), step)
        assert stopped.results is None
    with pytest.raises(UserError, match="now has 1 under ZeRO 3; resume ZeRO 3 with the layout that it was saved with"):
        train(lad(world, tmp_path / "b", changes | {"deepspeed.zero_optimization.stage": 3}))
    ended = train(lad(world, tmp_path / "b", changes))
    resumed, expected = (load_file(result.folder / "export" / "model.safetensors") for result in (ended, straight))
    assert max((resumed[name] - expected[name]).abs().max() for name in expected) <= 1e-6
    assert len(metrics_file(ended.folder)) == len(metrics_file(straight.folder))


def test_dropout_is_on_in_that_comparison(world: World, tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
    train(lad(world, tmp_path / "a", {"run.steps": 1, **DROPOUT}), rows["with"].append)
    train(lad(world, tmp_path / "b", {"run.steps": 1}), rows["without"].append)
    assert rows["with"][1]["loss"] != rows["without"][1]["loss"]


def test_rows_of_a_repeated_stretch_are_written_once(world: World, tmp_path: Path) -> None:
    """A run that dies after its checkpoint reports the steps in between again."""
    config = lad(world, tmp_path, {"run.save_every": 2, "run.steps": 6})

    def die(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, die)
    folder = config.run.folder
    assert [row["step"] for row in metrics_file(folder)] == [1, 2, 3, 4, 5]
    rows: list[dict[str, Any]] = []
    train(config, rows.append)
    first = rows[0]["step"]
    assert first in (4, 5)  # of the five steps made, no more than save_every are lost
    assert [row["step"] for row in rows] == [*range(first, 7), 6]
    assert [row["step"] for row in metrics_file(folder)] == [1, 2, 3, 4, 5, 6, 6]


def test_a_complete_run_is_not_run_twice(world: World, tmp_path: Path) -> None:
    config = lad(world, tmp_path, {"run.steps": 2})
    first = train(config)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    rows: list[dict[str, Any]] = []
    again = train(config, rows.append)
    assert again.results == json.loads(json.dumps(first.results))
    assert rows == []
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_sigterm_saves_and_the_same_command_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process ends with exit code 75 and one line; run again it ends with the weights of a run that was let be."""
    changes = {**DROPOUT, "run.steps": 24, "data.micro_batch_size": 2, "data.num_workers": 1}
    tables = lad(world, tmp_path / "a", changes).model_dump(exclude_none=True)
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tables))
    first = ForkedScript(ROOT / "launch" / "task_distill.py", file, folder=tmp_path / "output")
    metrics = tmp_path / "a" / "toy" / "metrics.jsonl"
    # Before it trains, SIGTERM just ends it; a loaded machine takes minutes to get there.
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, seconds=600)
    os.kill(first.pid, signal.SIGTERM)
    out, error = first.communicate(120)
    assert first.returncode == 75, error
    assert out == f"{tmp_path / 'a' / 'toy'}: stopped early and saved; run the same command again to go on\n"
    assert all(line.startswith(("toy: ", "toy step ")) for line in error.splitlines()), error
    assert len(list((tmp_path / "a" / "toy" / "checkpoints").glob("step-*"))) == 1
    steps = len(metrics_file(tmp_path / "a" / "toy"))
    assert steps < 24
    capsys.readouterr()
    assert run_command("distill", str(file)) == 0  # as the script does
    lines = capsys.readouterr().err.splitlines()
    assert f"toy: resumed from step {steps} of 24" in lines
    assert next(line for line in lines if line.startswith("toy step ")).startswith(f"toy step {steps + 1}/24")
    straight = train(lad(world, tmp_path / "b", changes))
    assert digest(tmp_path / "a" / "toy" / "export") == digest(straight.folder / "export")


@pytest.mark.parametrize("corpus", [False, True])
def test_the_teacher_is_scored_once_before_the_first_step(
    corpus: bool, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, rows = (on_corpus if corpus else lad)(world, tmp_path, {"run.steps": 2}), list[dict[str, Any]]()
    stopped_at(config, 1, rows)
    scores = {name.removeprefix("teacher/"): x for name, x in rows[0].items() if name.startswith("teacher/")}
    assert rows[0] == {"step": 0, "steps": 2, **{f"teacher/{name}": value for name, value in scores.items()}}
    printed = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("toy step 0/2  teacher ") for line in printed) == 1
    results = train(config, rows.append).results
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert "step 0/2  teacher" not in capsys.readouterr().err
    if corpus:
        assert set(scores) == {"mlm_loss"}
        assert 0 < scores["mlm_loss"] < 100
    else:
        assert scores.items() <= results["teacher"].items()


def test_the_teacher_predicts_the_dev_set_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[FrozenModel] = []
    logits_of = evaluate.logits_of
    monkeypatch.setattr(evaluate, "logits_of", lambda model, batch: forwards.append(model) or logits_of(model, batch))
    config = lad(world, tmp_path, {"run.steps": 2, "run.eval_every": 1})
    train(config)
    assert len(forwards) == len(run_spec.resolve_run(config).dataset().dev["dev"].in_order())


def test_a_checkpoint_cannot_execute_anything(world: World, tmp_path: Path) -> None:
    """Also where its manifest vouches for it."""
    config = lad(world, tmp_path, {"deepspeed.zero_optimization.stage": 1})
    folder = stopped_at(config, 2).folder
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    metadata = read_metadata(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*.pt"))
    assert len(files) == 2  # the module's and the optimizer's
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    for number, file in enumerate(files):
        shutil.rmtree(checkpoint)
        shutil.copytree(copy, checkpoint)
        torch.save({"module": Bomb(tmp_path / f"exploded{number}")}, file)
        store = CheckpointStore(folder / "checkpoints")
        draft = checkpoint.rename(checkpoint.with_suffix(".draft"))
        (draft / "manifest.json").unlink()
        store.commit(
            draft,
            metadata,
            {str(path.relative_to(draft)): atomic_io.file_digest(path) for path in atomic_io.list_files(draft)},
        )
        with pytest.raises(UserError, match="holds more than tensors, and none of it was executed"):
            train(config)
        assert not (tmp_path / f"exploded{number}").exists()


def test_vocabularies_may_be_padded_to_different_sizes(world: World, tmp_path: Path) -> None:
    padded = toy.model(tmp_path / "padded", world.tokenizer, "mlm", vocab_size=128)
    tables = toy.corpus_config(tmp_path, world.corpus, padded, padded, objective={"name": "kd"})
    tables["student"] = {"architecture": toy.SIZES}
    assert train(toy.parsed(tables, {"run.steps": 1, "data.num_workers": 0})).results["metrics"]["soft"] > 0


@pytest.mark.parametrize(
    ("precision", "has_bf16", "warns"), [(HALF, False, True), (HALF, True, False), ({}, False, False)]
)
def test_a_cpu_without_bf16_is_reported(
    precision: dict[str, Any],
    has_bf16: bool,
    warns: bool,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lad_dist.training.train._cpu_has_bf16", lambda: has_bf16)
    train(lad(world, tmp_path, {"run.steps": 1, **precision}))
    assert ("far faster with deepspeed.bf16.enabled=false" in capsys.readouterr().err) == warns
