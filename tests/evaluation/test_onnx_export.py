"""Exported models answer as the models themselves, on ragged padded batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import toy_families

from lad_dist.compression import compressed_module
from lad_dist.compression.low_rank import low_rank
from lad_dist.config.errors import Fault, UserError
from lad_dist.core.batch import Head
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import onnx_export
from lad_dist.models.frozen import INPUT_NAMES, InferenceModel

SMALL = {"num_hidden_layers": 1}


def served(family: str, head: Head, folder: Path, **settings: Any) -> InferenceModel:
    """Its linear maps as pairs."""
    words = load_tokenizer(toy_families.tokenizer(family, folder / family))
    labels = {"classification": toy.LABELS, "question_answering": ("start", "end")}.get(head, ())
    model = toy_families.made(family, head, words, labels, **settings)
    return InferenceModel(compressed_module.compact_all(low_rank(model, keep=0.5)))  # type: ignore[arg-type]


# The other families export alike: they are left out for the seconds that it takes.
@pytest.mark.parametrize(
    ("family", "head", "settings", "inputs", "outputs"),
    [
        ("bert", "question_answering", SMALL, 3, ("start_logits", "end_logits")),
        ("roberta", "classification", SMALL, 2, ("logits",)),
        ("distilbert", "none", {"n_layers": 1}, 2, ("last_hidden_state",)),
        ("modernbert", "classification", {**SMALL, "local_attention": 8}, 2, ("logits",)),
    ],
)
def test_onnx_is_the_model(
    family: str, head: Head, settings: dict[str, Any], inputs: int, outputs: tuple[str, ...], tmp_path: Path
) -> None:
    model, file = served(family, head, tmp_path, **settings), tmp_path / "onnx" / "model.onnx"
    assert (model.inputs, model.outputs) == (INPUT_NAMES[:inputs], outputs)
    assert onnx_export.export(model, file) < onnx_export.EXACT
    session = onnx_export.Session(file)
    for lengths in ([4], [1, 17], [40, 3, 22]):
        given = onnx_export.example_inputs(model, lengths, seed=7)
        expected = model(**given)
        if family != "roberta":  # which numbers positions by the padding token: elsewhere what pads changes nothing
            given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 9)
        for ours, its in zip(expected, session(given), strict=True):
            assert its.shape == ours.shape
            real = given["attention_mask"].bool() if ours.shape[:2] == given["input_ids"].shape else slice(None)
            torch.testing.assert_close(torch.from_numpy(its)[real], ours[real], rtol=0, atol=1e-4)
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    onnx_export.quantize(file, file.with_name("model.int8.onnx"))
    assert file.with_name("model.int8.onnx").stat().st_size < file.stat().st_size
    # Measured over all families: 0.03 to 0.13, of outputs around 1.
    assert onnx_export.distance(model, onnx_export.Session(file.with_name("model.int8.onnx"))) < 0.3


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*args: Any, **_: Any) -> None:
        Path(args[2]).write_bytes(b"onnx")

    model, file = served("bert", "classification", tmp_path, **SMALL), tmp_path / "model.onnx"
    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(onnx_export, "Session", lambda _: lambda given: [model(**given)[0].numpy() + 1e-3])
    with pytest.raises(Fault, match=r"model\.onnx: its outputs are 1\.0e-03 from the model's; it is not kept"):
        onnx_export.export(model, file)
    assert not list(tmp_path.glob("*.onnx*"))


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\noperator")

    model = served("bert", "classification", tmp_path, **SMALL)
    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(UserError, match=r"^.*m: the exporter cannot write a bert \(no such operator\)$"):
        onnx_export.export(model, tmp_path / "m")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_export.check()
    monkeypatch.setattr(onnx_export, "NEEDED", ("onnx", "none_such"))
    with pytest.raises(UserError, match="none_such is not installed, which ONNX needs; pip install onnx none_such"):
        onnx_export.check()
