"""Exported models answer as the models themselves, on ragged padded batches."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
import toy
import toy_families
from conftest import World
from launching import ROOT, run_command
from onnx import TensorProto, helper, load, save
from transformers import AutoTokenizer

from lad_dist.compression import compressed_module
from lad_dist.compression.footprint import FP16, INT8
from lad_dist.config.errors import Fault, UserError
from lad_dist.core.batch import Head
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import onnx_export
from lad_dist.evaluation.onnx_export import Distance
from lad_dist.evaluation.prediction import predict
from lad_dist.models import loading
from lad_dist.models.frozen import INPUT_NAMES, InferenceModel
from lad_dist.runs.serving_example import serving_example

SMALL = {"num_hidden_layers": 1}


def low_rank_model(family: str, head: Head, folder: Path, **settings: Any) -> InferenceModel:
    """Create a model whose linear maps are pairs."""
    tokenizer = load_tokenizer(toy_families.tokenizer(family, folder / family))
    labels = {"classification": toy.LABELS, "question_answering": ("start", "end")}.get(head, ())
    model = toy_families.new_model(family, head, tokenizer, labels, **settings)
    return InferenceModel(
        compressed_module.replace_all(toy.compress(model, "low_rank", keep=0.5), compressed_module.COMPACT)
    )  # type: ignore[arg-type]


# The other families export alike: to leave them out saves time.
@pytest.mark.parametrize(
    ("family", "head", "settings", "inputs", "outputs"),
    [
        ("bert", "question_answering", SMALL, 3, ("start_logits", "end_logits")),
        ("roberta", "classification", SMALL, 2, ("logits",)),
        *([("distilbert", "none", {"n_layers": 1}, 2, ("last_hidden_state",))] if sweep.enabled else []),
        ("modernbert", "classification", {**SMALL, "local_attention": 8}, 2, ("logits",)),
    ],
)
def test_onnx_is_the_model(
    family: str, head: Head, settings: dict[str, Any], inputs: int, outputs: tuple[str, ...], tmp_path: Path
) -> None:
    model, file = low_rank_model(family, head, tmp_path, **settings), tmp_path / "onnx" / "model.onnx"
    assert (model.input_names, model.output_names) == (INPUT_NAMES[:inputs], outputs)
    assert onnx_export.export(model, file).largest < onnx_export.MAX_DISTANCE
    session = onnx_export.Session(file)
    for lengths in ([4], [1, 17], [40, 3, 22]):
        example = onnx_export.example_inputs(model, lengths, seed=7)
        expected = model(**example)
        if family != "roberta":  # which numbers positions by the padding token; elsewhere the padding changes nothing
            example["input_ids"] = example["input_ids"].masked_fill(example["attention_mask"] == 0, 9)
        for model_output, session_output in zip(expected, session(example), strict=True):
            assert session_output.shape == model_output.shape
            real = (
                example["attention_mask"].bool()
                if model_output.shape[:2] == example["input_ids"].shape
                else slice(None)
            )
            torch.testing.assert_close(torch.from_numpy(session_output)[real], model_output[real], rtol=0, atol=1e-4)
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    onnx_export.quantize(file, file.with_name("model.int8.onnx"))
    assert file.with_name("model.int8.onnx").stat().st_size < file.stat().st_size
    # Measured over all families: 0.03 to 0.13, of outputs around 1.
    assert onnx_export.distance(model, onnx_export.Session(file.with_name("model.int8.onnx"))).largest < 0.3


@pytest.mark.parametrize(("gap", "shown"), [(1e-3, r"1\.0e-03"), (math.nan, "nan")])
def test_a_file_with_other_outputs_is_discarded(
    gap: float, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*args: Any, **_: Any) -> None:
        Path(args[2]).write_bytes(b"onnx")

    model, file = low_rank_model("bert", "classification", tmp_path, **SMALL), tmp_path / "model.onnx"
    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(onnx_export, "Session", lambda _: lambda inputs: [model(**inputs)[0].numpy() + gap])
    with pytest.raises(Fault, match=rf"model\.onnx: the outputs are {shown} from the model's; the file is discarded"):
        onnx_export.export(model, file)
    assert not list(tmp_path.glob("*.onnx*"))


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\noperator")

    model = low_rank_model("bert", "classification", tmp_path, **SMALL)
    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(UserError, match=r"^.*m: the exporter cannot write a bert \(no such operator\)$"):
        onnx_export.export(model, tmp_path / "m")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_export.check()
    monkeypatch.setattr(onnx_export, "REQUIRED_PACKAGES", ("onnx", "none_such"))
    with pytest.raises(UserError, match="none_such is not installed, which ONNX needs; pip install onnx none_such"):
        onnx_export.check()


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher in all forms."""
    folder = tmp_path_factory.mktemp("served") / "teacher"
    assert run_command("export", str(world.teacher), "--fp16", "--int8", "--out", str(folder)) == 0
    return folder


def test_a_folder_in_all_forms_is_near_the_model(world: World, exported: Path) -> None:
    model = InferenceModel(loading.load_model(str(world.teacher), "classification", require_head=True))
    largest = {
        name: onnx_export.distance(model, onnx_export.Session(exported / name))
        for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx")
    }
    bounds = {"model.onnx": 1e-4, "model.fp16.onnx": onnx_export.MAX_FP16_DISTANCE, "model.int8.onnx": 0.3}
    shares = {name: gap.largest / gap.largest_output for name, gap in largest.items()}
    assert all(shares[name] < bound for name, bound in bounds.items()), shares
    assert shares["model.onnx"] < shares["model.fp16.onnx"] < shares["model.int8.onnx"]
    stored = [w.data_type for w in load(str(exported / "model.fp16.onnx")).graph.initializer if len(w.dims) == 2]
    assert TensorProto.FLOAT16 in stored
    assert TensorProto.FLOAT not in stored


def test_tokenizer_and_config_are_beside_the_files(world: World, exported: Path) -> None:
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {file.name for file in exported.iterdir()}
    text = toy.sentence(0)
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (exported, world.teacher)]
    assert ids[0] == ids[1]
    assert json.loads((exported / "tokenizer.json").read_text())["truncation"]["max_length"] == 64
    assert json.loads((exported / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    assert not list(exported.glob("*.draft"))


def test_the_example_serves_as_torch_decides_without_torch(world: World, exported: Path) -> None:
    texts = [toy.sentence(number) for number in range(12)]
    code = serving_example(str(exported), "model.onnx").replace('"Some text.", "And a longer one."', str(texts)[1:-1])
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'lad_dist')))\n"
    printed = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=True).stdout
    expected = [f"{text} {answer.label}" for text, answer in zip(texts, predict(world.teacher, texts), strict=True)]
    assert printed.splitlines() == expected
    assert len([line for line in code.splitlines() if line]) == 15
    assert serving_example("runs/small/export/onnx") in (ROOT / "lad_dist/evaluation/README.md").read_text()


def test_what_becomes_a_whole_number_stays_in_fp32(tmp_path: Path) -> None:
    """Buckets of positions are logarithms, rounded down: in fp16 some would be others."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["numbers"], "numbers", to=TensorProto.FLOAT),
        helper.make_node("Log", ["numbers"], ["logarithms"], "logarithms"),
        helper.make_node("Mul", ["logarithms", "factor"], ["scaled"], "scaled"),
        helper.make_node("Cast", ["scaled"], ["buckets"], "buckets", to=TensorProto.INT64),
        helper.make_node("Mul", ["numbers", "slope"], ["products"], "products"),
    ]
    graph = helper.make_graph(
        nodes,
        "buckets",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [
            helper.make_tensor_value_info("buckets", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("products", TensorProto.FLOAT, ["n"]),
        ],
        [helper.make_tensor(name, TensorProto.FLOAT, [], [100 / math.pi]) for name in ("factor", "slope")],
    )
    file, half = tmp_path / "model.onnx", tmp_path / "model.fp16.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(file))
    onnx_export.convert_to_fp16(file, half)
    inputs = {"ids": torch.arange(1, 2000)}
    (buckets, products), (half_buckets, half_products) = (onnx_export.Session(each)(inputs) for each in (file, half))
    assert half_buckets.tolist() == buckets.tolist()
    assert half_products.dtype == products.dtype
    assert half_products.tolist() != products.tolist()


@pytest.mark.parametrize(
    ("form", "gap", "refused"),
    [
        (FP16, Distance(0.05, 2.0), True),
        (FP16, Distance(0.03, 2.0), False),
        (FP16, Distance(0.03, 0.5), True),
        (INT8, Distance(5.0, 2.0), False),
        (INT8, Distance(math.nan, 2.0), True),
    ],
)
def test_a_form_that_is_too_far_from_the_model_is_refused(
    form: str, gap: Distance, refused: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InferenceModel(loading.load_model(str(world.teacher), "classification", require_head=True))
    for name in ("convert_to_fp16", "quantize"):
        monkeypatch.setattr(onnx_export, name, lambda _, out: out.write_bytes(b"onnx"))
    monkeypatch.setattr(onnx_export, "export", lambda *_: Distance(0.0, 1.0))
    monkeypatch.setattr(onnx_export, "Session", lambda _: None)
    monkeypatch.setattr(onnx_export, "distance", lambda *_: gap)
    file = tmp_path / {FP16: "model.fp16.onnx", INT8: "model.int8.onnx"}[form]
    if not refused:
        assert onnx_export.export_forms(model, str(world.teacher), tmp_path, [form])[file] == gap
        assert file.exists()
        return
    with pytest.raises(UserError, match=rf"{file}: outputs are {gap.largest:.1e} from the model's, which are up to"):
        onnx_export.export_forms(model, str(world.teacher), tmp_path, [form])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone/model",), "gone/model: no folder; name a folder for the files with --out DIR"),
        (("gone/model", "--out", "served"), "gone/model: cannot read a model"),
        (("TEACHER", "--out", "TEACHER/config.json"), "config.json is no folder that can be written; give another"),
        (("TEACHER", "--int4"), "export: unrecognized arguments: --int4; see lad-dist export --help"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], message: str, world: World, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command("export", *(argument.replace("TEACHER", str(world.teacher)) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []
