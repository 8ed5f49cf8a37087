"""What `lad-dist latency` measures of a run, and where it writes the results."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from lad_dist.evaluation.latency import LatencyRequest
from lad_dist.evaluation.onnx_export import Session
from lad_dist.models import loading
from lad_dist.models.dims import count_parameters, encoder_layers
from lad_dist.models.loading import save_model
from lad_dist.runs.model_card import latency_remarks, model_card


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved_timing, "BATCHES", (1, 3))


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.usefixtures("quick")
def test_all_forms_of_a_run_and_the_teacher(world: World, tmp_path: Path, capsys: Any) -> None:
    folder = complete(world, tmp_path)
    before = results_in(folder)
    assert run_command("latency", str(folder), "--int8", "--rounds", "2") == 0
    after = results_in(folder)
    table = after.pop("latency")
    assert after == {**before, "student": after["student"]}
    forms, shapes = ["teacher", "student", "onnx", "onnx int8"], [(1, 64), (3, 64)]  # toy models have 64 positions
    assert [(x["form"], x["batch"], x["length"]) for x in table["timings"] if x["device"] == "cpu"] == [
        (form, *shape) for shape in shapes for form in forms
    ]
    assert all(x["seconds"] > 0 and x["rounds"] == 2 for x in table["timings"])
    assert table["threads"] == torch.get_num_threads()
    export = folder / "export"
    for sizes in (after["student"], table["student"]):
        assert sizes["bytes/onnx int8"] == (export / "onnx" / "model.int8.onnx").stat().st_size
        assert sizes["bytes/safetensors"] == (export / "model.safetensors").stat().st_size
    assert table["student"]["parameters"] == before["student"]["parameters"] < table["teacher"]["parameters"]
    assert table["teacher"]["bytes/safetensors"] == (world.teacher / "model.safetensors").stat().st_size
    fp32, int8 = table["quality"]["onnx"], table["quality"]["onnx int8"]
    assert fp32["loyalty"]["label_loyalty"] == 1.0
    assert fp32["loyalty"]["probability_loyalty"] > 0.999
    assert 0.5 <= int8["loyalty"]["label_loyalty"] <= 1.0
    assert set(fp32["metrics"]) == {"accuracy", "f1_macro", "matthews"}
    printed, text = capsys.readouterr().out, (export / "README.md").read_text()
    for form in forms:
        assert f"| {form} | cpu | " in text
        assert f"│ {form} " in printed
    assert "## How small" in text
    assert "## How fast" in text
    assert f"\nlad-dist latency {folder} --int8 --rounds 2\n" in text
    assert "onnx int8 on the dev set: accuracy " in text
    assert "onnx int8 on the dev set: accuracy " in printed
    assert not list(folder.rglob("*.draft"))
    inputs = Tokenizer.from_file(str(export / "tokenizer.json")).encode("ba " * 2000)
    ids = {"input_ids": inputs.ids, "attention_mask": inputs.attention_mask, "token_type_ids": inputs.type_ids}
    [logits] = Session(export / "onnx" / "model.onnx")({name: torch.tensor([x]) for name, x in ids.items()})
    assert logits.shape == (1, 2)
    without_onnx = latency.measure(LatencyRequest(folder, rounds=1))
    assert {x["form"] for x in without_onnx["timings"]} == {"teacher", "student"}
    assert results_in(folder)["student"] == after["student"]


@pytest.mark.usefixtures("quick")
def test_a_pair_is_measured_as_a_pair(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, real = [], interleaved_timing.time_interleaved

    def time_interleaved(forms: Any, *rest: Any) -> list[interleaved_timing.Timing]:
        parameters.extend(count_parameters(form.func) for form in forms.values())
        return real(forms, *rest)

    monkeypatch.setattr(interleaved_timing, "time_interleaved", time_interleaved)
    folder = complete(world, tmp_path, lambda student: toy.compress(student, "low_rank", keep=0.3))
    table = latency.measure(LatencyRequest(folder, rounds=1))
    assert table["student"]["stored"] == results_in(folder)["student"]["stored"] < table["student"]["parameters"]
    assert set(parameters) == {table["teacher"]["stored"], table["student"]["stored"]}
    text = (folder / "export" / "README.md").read_text()
    saved = 1 - table["student"]["stored"] / table["student"]["parameters"]
    assert f"* The compact form (compact.safetensors) has {saved:.0%} fewer weights, and fewer products" in text


@pytest.mark.usefixtures("quick")
def test_the_card_names_what_is_smaller_and_not_faster(world: World, tmp_path: Path) -> None:
    def halved(student: Any) -> Any:
        with torch.no_grad():
            for layer in encoder_layers(student):
                layer.intermediate.dense.weight[:32] = 0
        return student

    folder = complete(world, tmp_path, halved)
    assert "of the weights are zero" in model_card(results_in(folder))
    table = latency.measure(LatencyRequest(folder, rounds=1))
    new = 2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32 + 2 + 32  # biases and the padding's embedding are 0 in a new model
    assert table["student"]["stored"] - table["student"]["nonzero"] == 2 * 32 * 32 + new
    share = 1 - table["student"]["nonzero"] / table["student"]["stored"]
    (line,) = [line for line in latency_remarks(table["student"], table) if "zero" in line]
    assert line == (
        f"{share:.0%} of the weights are zero. That makes a file smaller and nothing faster: with zeros in it a "
        "product takes as long."
    )


def timing(form: str, seconds: float, batch: int = 1) -> dict[str, Any]:
    return {"form": form, "device": "cpu", "batch": batch, "length": 128, "seconds": seconds}


def test_the_promise_of_the_flops_is_compared_with_the_latency() -> None:
    plain = {"parameters": 100, "stored": 100, "nonzero": 100}
    table = {
        "teacher": {**plain, footprint.FLOPS: 4e6},
        "student": {**plain, footprint.FLOPS: 1e6},
        "timings": [
            *(timing(form, seconds) for form, seconds in (("teacher", 4.0), ("student", 1.0), ("onnx", 1.0))),
            timing("onnx int8", 0.5),
            *(timing(form, seconds, 32) for form, seconds in (("teacher", 6.0), ("student", 4.0), ("onnx", 3.0))),
            timing("onnx int8", 6.0, 32),
        ],
        "quality": {},
    }
    assert latency_remarks(table["student"], table) == [  # type: ignore[arg-type]
        "It has 1/4.00 of the teacher's FLOPs per token and runs 1.50 to 4.00 times as fast; not all that is saved on "
        "paper is saved in time.",
        "int8 is smaller than fp32 and not faster at 32 x 128 (0.50x).",
    ]


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
        (data_gone, ("--onnx",), "gone.csv"),
        (lambda _: None, ("--teacher", "gone"), "gone: "),
        (lambda _: None, ("--rounds", "0"), "latency: --rounds 0: at least 1"),
        (lambda _: None, ("--rounds", "x"), "latency: argument --rounds: invalid int value"),
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
