"""The small forms of a student lose nothing, and are as small as they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from conftest import World
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import pipeline

from lad_dist.compression import compact
from lad_dist.config.errors import UserError
from lad_dist.core.outputs import OutputSpec
from lad_dist.models import loading
from lad_dist.models.forward import compute_outputs
from lad_dist.training.train import train

PRUNE: dict[str, Any] = {"name": "prune", "sparsity": 0.75, "end": 0.0}
LOW_RANK: dict[str, Any] = {"name": "low_rank", "keep": 0.5}
ADAPT = PRUNE | {"criterion": "adapting", "modules": r"(embeddings|layer)\."}


def run(world: World, work: Path, compressions: list[dict[str, Any]], **changes: Any) -> Path:
    """Return the export of a short run."""
    tables = toy.task_config(work, world.files, world.teacher, world.pretrained, compression=compressions)
    result = train(toy.parsed(tables, {"run.steps": 2, **changes}))
    assert result.results is not None
    return result.folder / "export"


def size(path: Path) -> int:
    return sum(value.nbytes for value in load_file(path).values())


@pytest.mark.parametrize("compressions", [[PRUNE], [LOW_RANK], [LOW_RANK, PRUNE]], ids=["sparse", "pairs", "both"])
def test_the_compact_form_is_the_export(compressions: list[dict[str, Any]], world: World, tmp_path: Path) -> None:
    export = run(world, tmp_path, compressions)
    small = compact.load_compact(export)
    whole = loading.load_model(str(export), "classification", require_head=True)
    torch.testing.assert_close(toy.logits(small), toy.logits(whole), rtol=1e-5, atol=1e-5)
    assert size(export / compact.COMPACT_FILE) < size(export / "model.safetensors")
    has_pairs = LOW_RANK in compressions
    assert any(isinstance(module, torch.nn.Sequential) for module in small.modules()) is has_pairs


def test_an_encoder_loads_from_below_the_head_of_a_pre_training(world: World, tmp_path: Path) -> None:
    compressions = [{**LOW_RANK, "modules": "layer"}, PRUNE]
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained, compression=compressions)
    result = train(toy.parsed(tables, {"run.steps": 2, "objective": {"name": "mlm"}, "teacher": None}))
    export = result.folder / "export"
    small, whole = compact.load_compact(export), loading.load_model(str(export), "none", require_head=True)
    assert any(isinstance(module, torch.nn.Sequential) for module in small.modules())
    batch, output_spec = toy.batch([5, 3, 9]), OutputSpec(hidden=(2,))
    actual, expected = (compute_outputs(model.eval(), batch, output_spec).hidden[2] for model in (small, whole))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_plain_student_has_no_smaller_form(world: World, tmp_path: Path) -> None:
    export = run(world, tmp_path, [])
    assert not list(export.glob("compact*"))
    assert not list(export.glob("mask*"))
    assert torch.equal(
        toy.logits(compact.load_compact(export)),
        toy.logits(loading.load_model(str(export), "classification", require_head=True)),
    )


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_masks_over_a_base_are_the_export(half: bool, world: World, tmp_path: Path) -> None:
    """Also without its weights, and with the base elsewhere; they are a bit for each weight, and the head."""
    precision = {"deepspeed.bf16.enabled": True, "deepspeed.zero_optimization.stage": 1} if half else {}
    export = run(world, tmp_path, [ADAPT], **{"student.layers": [2, 1]}, **precision)
    whole = loading.load_model(str(export), "classification", require_head=True)
    expected = toy.logits(whole)
    for model in (str(export), *(load(export) for load in (compact.load_compact, compact.load_masked))):
        if not isinstance(model, str):
            model.set_attn_implementation("sdpa")
        assert pipeline("text-classification", model, tokenizer=str(export))("ba " * 2000, truncation=True)
    (export / "model.safetensors").unlink()
    (export / compact.COMPACT_FILE).unlink()
    masked = compact.load_masked(export)
    assert torch.equal(toy.logits(masked), expected)
    moved = tmp_path / "moved"
    Path(world.pretrained).rename(moved)
    try:
        with pytest.raises(UserError):
            compact.load_masked(export)
        assert torch.equal(toy.logits(compact.load_masked(export, str(moved))), expected)
    finally:
        moved.rename(world.pretrained)
    values = load_file(export / compact.MASK_FILE)
    bits = sum(value.nbytes for name, value in values.items() if name.endswith(".bits"))
    weights = [m.weight for m in whole.base_model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    pooler = whole.base_model.pooler.dense.weight.numel()
    assert bits == sum(-(-weight.numel() // 8) for weight in weights) - -(-pooler // 8)
    trained = {name for name in values if not name.endswith(".bits")}
    assert trained == {name for name, _ in whole.named_parameters() if name.startswith(("classifier", "bert.pooler"))}


def test_masks_know_their_base(world: World, tmp_path: Path) -> None:
    export = run(world, tmp_path, [ADAPT])
    with pytest.raises(UserError, match=r"is not the base of .*mask\.safetensors, whose masks were learnt over other"):
        compact.load_masked(export, str(world.teacher))


@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.5, -2.0, 1e-30]), min_size=1, max_size=70), st.booleans())
def test_zeros_are_bits(values: list[float], tall: bool) -> None:
    weight = torch.tensor(values).view(*((-1, 1) if tall else (1, -1)))
    packed = dict(compact._pack_weight("w", weight))
    assert torch.equal(compact._unpack_weights(packed, {"w": list(weight.shape)})["w"], weight)
    assert sum(value.nbytes for value in packed.values()) <= weight.nbytes


def damaged(path: Path, change: Any) -> None:
    values = load_file(path)
    with compact.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(values)
    save_file(values, path, metadata)


@pytest.mark.parametrize("loader", [compact.load_compact, compact.load_masked])
def test_files_of_another_model(loader: Any, world: World, tmp_path: Path) -> None:
    export = run(world, tmp_path, [ADAPT])
    path = export / (compact.COMPACT_FILE if loader is compact.load_compact else compact.MASK_FILE)
    damaged(path, lambda values: values.pop("classifier.bias"))
    with pytest.raises(UserError) as caught:
        loader(export)
    assert "classifier.bias" in str(caught.value) or "is not the base of" in str(caught.value)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        loader(export)
