"""What `lad-dist latency` measures of a run, and where it writes the results."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from conftest import World
from launching import run_command
from tokenizers import Tokenizer

from lad_dist.compression import compact, footprint
from lad_dist.compression.compressed_module import merge_all
from lad_dist.compression.layers import keep_layers
from lad_dist.data.tokenization.loading import load_tokenizer, save_beside_model
from lad_dist.evaluation import interleaved_timing, latency
from lad_dist.evaluation.interleaved_timing import Timing
from lad_dist.evaluation.latency import LatencyRequest
from lad_dist.evaluation.onnx_export import Session
from lad_dist.evaluation.prediction import predict
from lad_dist.models import loading
from lad_dist.models.dims import count_parameters, encoder_layers
from lad_dist.models.loading import save_model
from lad_dist.runs.latency_table import latency_remarks
from lad_dist.runs.model_card import model_card


def complete(world: World, folder: Path, change: Callable[[Any], Any] = lambda student: student) -> Path:
    """Write a run folder as train() does: two of the teacher's layers after `change`, nothing learnt."""
    options = toy.task_config(folder, world.files, world.teacher, world.teacher, objective={"name": "kd"})
    config = toy.parsed(options, {"data.micro_batches_per_step": 1})
    student = change(keep_layers(loading.load_model(str(world.teacher), "classification", require_head=True), [2, 4]))
    batch = toy.batch([16] * 4)
    size, packed = footprint.footprint(student, batch), compact.pack(student)
    export = config.run.folder / "export"
    save_model(merge_all(student), export)  # type: ignore[arg-type]
    packed.save(export, None, None)
    save_beside_model(load_tokenizer(world.tokenizer), export, segments=True, positions=64)
    results = {
        "command": "python train.py",
        "config": config.model_dump(mode="json", exclude_none=True),
        "metrics": {"accuracy": 0.5},
        "student": {**size, **footprint.bytes_table(export)},
        "teacher": {},
        "steps": 8,
        "seconds": 1.0,
        "processes": 1,
        "device": "cpu",
    }
    (config.run.folder / "results.json").write_text(json.dumps(results))
    return config.run.folder


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_student_and_teacher_in_all_forms(
    world: World, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = complete(world, tmp_path)
    before = results_in(folder)
    options = ("--fp16", "--int8", "--rounds", "2", "--batch", "3,1")
    assert run_command("latency", str(folder), *options) == 0
    after = results_in(folder)
    table = after.pop("latency")
    assert after == {**before, "student": after["student"]}
    models, forms = ("teacher", "student"), ("torch", "onnx", "onnx fp16", "onnx int8")
    tokens = [len(load_tokenizer(world.tokenizer)(row["text"])["input_ids"]) for row in dev_rows(world)]
    shapes = [(b, s) for s in (int(np.median(tokens)), max(tokens)) for b in (1, 3)]
    assert table["lengths"] == "median and maximum of the dev set"
    timings = [x for x in table["timings"] if x["device"] == "cpu"]
    order = [(x["model"], x["form"], x["batch"], x["length"]) for x in timings]
    assert sorted(order) == sorted((model, form, *shape) for shape in shapes for model in models for form in forms)
    assert [(x["batch"], x["length"]) for x in timings[:: len(models) * len(forms)]] == shapes
    assert all(x.keys() == {field.name for field in fields(Timing)} for x in timings)
    assert all(x["seconds"] > 0 and x["rounds"] == 2 for x in timings)
    assert table["threads"] == torch.get_num_threads()
    assert table["versions"].keys() == {"torch", "transformers", "onnxruntime"}
    export = folder / "export"
    for sizes in (after["student"], table["student"]):
        assert sizes["bytes/onnx int8"] == (export / "onnx" / "model.int8.onnx").stat().st_size
        assert sizes["bytes/safetensors"] == (export / "model.safetensors").stat().st_size
    assert table["student"]["parameters"] == before["student"]["parameters"] < table["teacher"]["parameters"]
    assert table["teacher"]["bytes/safetensors"] == (world.teacher / "model.safetensors").stat().st_size
    assert table["teacher"]["bytes/onnx int8"] < table["teacher"]["bytes/onnx"]
    check_quality(table, world, export)
    printed, text = capsys.readouterr().out, (export / "README.md").read_text()
    for model, form in itertools.product(models, forms):
        assert f"| {model} | {form} | cpu | " in text
        assert re.search(rf"│ {model} +│ {form} +│ cpu +│", printed)
    assert "## How small" in text
    assert "## How fast" in text
    assert f"\nlad-dist latency {folder} {' '.join(options)}\n" in text
    assert "Quantize first, then distil: at 1 x " in text
    assert "Quantize first, then distil: at 1 x " in printed
    assert not list(folder.rglob("*.draft"))
    assert not list(folder.glob("teacher-*"))
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= {x.name for x in (export / "onnx").iterdir()}
    without_onnx = latency.measure(LatencyRequest(folder, rounds=1, batches=[1], lengths=[9]))
    assert [(x["model"], x["form"], x["length"]) for x in without_onnx["timings"] if x["device"] == "cpu"] == [
        (model, "torch", 9) for model in models
    ]
    assert without_onnx["lengths"] == "as asked for"
    assert without_onnx["quality"] == {}
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for code in codes:
        exec(code, {})
    assert len(codes) == 2
    label, *served = capsys.readouterr().out.splitlines()
    assert label in toy.LABELS
    assert [line.split()[-1] in toy.LABELS for line in served] == [True, True]
    inputs = Tokenizer.from_file(str(export / "tokenizer.json")).encode("ba " * 2000)
    ids = {"input_ids": inputs.ids, "attention_mask": inputs.attention_mask, "token_type_ids": inputs.type_ids}
    [logits] = Session(export / "onnx" / "model.onnx")({name: torch.tensor([x]) for name, x in ids.items()})
    assert logits.shape == (1, 2)
    assert results_in(folder)["student"] == after["student"]


def dev_rows(world: World) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(world.files["dev"]).read_text().splitlines()]


def check_quality(table: dict[str, Any], world: World, export: Path) -> None:
    """Compare each form's scores with those of the predictions of the model's folder."""
    rows = dev_rows(world)
    for model, path in (("teacher", world.teacher), ("student", export)):
        quality = table["quality"][model]
        assert list(quality) == ["torch", "onnx", "onnx fp16", "onnx int8"]
        labels = [answer.label for answer in predict(path, [row["text"] for row in rows])]
        equal = [label == row["label"] for label, row in zip(labels, rows, strict=True)]
        assert quality["torch"].keys() == {"metrics"}
        for form in ("torch", "onnx"):
            assert quality[form]["metrics"]["accuracy"] == pytest.approx(np.mean(equal))
        assert quality["onnx"]["loyalty"]["label_loyalty"] == 1.0
        assert quality["onnx"]["loyalty"]["probability_loyalty"] > 0.999
        assert quality["onnx fp16"]["loyalty"]["probability_loyalty"] > 0.99
        assert 0.5 <= quality["onnx int8"]["loyalty"]["label_loyalty"] <= 1.0
        assert set(quality["onnx int8"]["metrics"]) == {"accuracy", "f1_macro", "matthews"}


def test_a_pair_is_measured_as_a_pair(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, real = [], interleaved_timing.time_interleaved

    def time_interleaved(forms: Any, *rest: Any) -> list[interleaved_timing.Timing]:
        parameters.extend(count_parameters(form.func) for form in forms.values())
        return real(forms, *rest)

    monkeypatch.setattr(interleaved_timing, "time_interleaved", time_interleaved)
    folder = complete(world, tmp_path, lambda student: toy.compress(student, "low_rank", keep=0.3))
    table = latency.measure(LatencyRequest(folder, rounds=1, batches=[1], lengths=[16]))
    assert table["student"]["stored"] == results_in(folder)["student"]["stored"] < table["student"]["parameters"]
    assert set(parameters) == {table["teacher"]["stored"], table["student"]["stored"]}
    text = (folder / "export" / "README.md").read_text()
    saved = 1 - table["student"]["stored"] / table["student"]["parameters"]
    assert f"* The compact form (compact.safetensors) has {saved:.0%} fewer weights, and fewer products" in text


def test_the_card_names_what_is_smaller_and_not_faster(world: World, tmp_path: Path) -> None:
    def halved(student: Any) -> Any:
        with torch.no_grad():
            for layer in encoder_layers(student):
                layer.intermediate.dense.weight[:32] = 0
        return student

    folder = complete(world, tmp_path, halved)
    assert "of the weights are zero" in model_card(results_in(folder))
    table = latency.measure(LatencyRequest(folder, rounds=1, batches=[1], lengths=[16]))
    new = 2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32 + 2 + 32  # biases and the padding's embedding are 0 in a new model
    assert table["student"]["stored"] - table["student"]["nonzero"] == 2 * 32 * 32 + new
    share = 1 - table["student"]["nonzero"] / table["student"]["stored"]
    (line,) = [line for line in latency_remarks(table["student"], table) if "zero" in line]
    assert line == (
        f"{share:.0%} of the weights are zero. That makes a file smaller and nothing faster: with zeros in it a "
        "product takes as long."
    )


def data_gone(folder: Path) -> None:
    results = results_in(folder)
    results["config"]["data"]["dev"] = str(folder / "gone.csv")
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda run: (run / "results.json").unlink(), (), "holds no complete run: it lacks results.json"),
        (
            lambda run: (run / "results.json").write_text('{"trials": []}'),
            (),
            "results.json: of no run, or damaged (no config in it); name the folder of one run",
        ),
        (lambda run: os.truncate(run / "results.json", 40), (), "results.json: damaged ("),
        (
            lambda run: shutil.rmtree(run / "export"),
            (),
            "export: no such folder; a complete run exports the student to it",
        ),
        (lambda run: os.truncate(run / "export/model.safetensors", 1000), (), "model.safetensors: cannot read weights"),
        (
            lambda run: (run / "export/config.json").write_text('{"model_type": "t5"}'),
            (),
            "export: the family t5 is not supported",
        ),
        (data_gone, ("--onnx", "--length", "9"), "gone.csv"),
        (data_gone, (), "gone.csv"),
        (lambda _: None, ("--teacher", "gone"), "gone: "),
        (lambda _: None, ("--rounds", "0"), "latency: --rounds 0: at least 1"),
        (lambda _: None, ("--rounds", "x"), "latency: argument --rounds: invalid int value"),
        (
            lambda _: None,
            ("--batch", "0"),
            "latency: argument --batch: '0': whole numbers from 1 on, with commas between them; see lad-dist latency",
        ),
        (lambda _: None, ("--batch", "1,"), "latency: argument --batch: '1,': whole numbers from 1 on"),
        (lambda _: None, ("--length", "1,9"), "latency: argument --length: '1,9': whole numbers from 2 on"),
        (lambda _: None, ("--length", "16,9999"), "teacher has positions for 64 tokens"),
        (lambda _: None, ("--int4",), "latency: unrecognized arguments: --int4; see lad-dist latency --help"),
    ],
)
def test_mistakes(
    damage: Callable[[Path], None],
    arguments: tuple[str, ...],
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run_command("latency", str(folder), *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(world, tmp_path_factory.mktemp("runs"))
