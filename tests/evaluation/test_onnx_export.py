"""Exported models answer as the models themselves, on ragged padded batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
import toy
import toy_families

from lad_dist.compression import compressed_module
from lad_dist.config.errors import Fault, UserError
from lad_dist.core.batch import Head
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import onnx_export
from lad_dist.models.frozen import INPUT_NAMES, InferenceModel

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
    assert onnx_export.export(model, file) < onnx_export.MAX_DISTANCE
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
    assert onnx_export.distance(model, onnx_export.Session(file.with_name("model.int8.onnx"))) < 0.3


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
