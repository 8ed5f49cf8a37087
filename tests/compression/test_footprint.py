"""Counts of weights and arithmetic, against counts by hand. PyTorch's counter on all families: test_families.py."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
import toy_families
from conftest import World
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lad_dist.compression import compressed_module, footprint
from lad_dist.compression.products import LowRankLinear
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.models.attention import _explicit_attention
from lad_dist.models.dims import count_parameters, encoder_layers
from lad_dist.models.forward import compute_outputs

VOCABULARY = 50
# Weights of toy.SIZES, by hand: words, positions, segments, norm; four maps and a norm; two maps and a norm.
EMBEDDINGS = (VOCABULARY + 64 + 2 + 2) * 32
ATTENTION = 4 * (32 * 32 + 32) + 2 * 32
FEED_FORWARD = 2 * 32 * 64 + 64 + 32 + 2 * 32
POOLER, CLASSIFIER = 32 * 32 + 32, 32 * 2 + 2
new_model = partial(toy.new_model, vocab_size=VOCABULARY)


def by_component(embeddings: int, attention: int, feed_forward: int, head: int) -> dict[str, int]:
    return dict(zip(footprint.COMPONENTS, (embeddings, attention, feed_forward, head), strict=True))


def test_weights_by_hand() -> None:
    weights, _ = footprint.stored_weights(new_model())
    expected = by_component(EMBEDDINGS, 4 * ATTENTION, 4 * FEED_FORWARD, POOLER + CLASSIFIER)
    assert weights == expected
    tied, _ = footprint.stored_weights(new_model("mlm"))
    transform = 32 * 32 + 32 + 2 * 32
    assert tied == {**expected, "head": transform + VOCABULARY}  # its map is the words' embeddings


def test_arithmetic_by_hand() -> None:
    batch = toy.batch([3, 5])
    attention = 2 * 8 * 4 * 32 * 32 + 2 * 2 * 32 * (3 * 3 + 5 * 5)
    feed_forward = 2 * 8 * 2 * 32 * 64
    expected = by_component(0, 4 * attention, 4 * feed_forward, 2 * 2 * 32 * (32 + 2))
    assert footprint.flops(new_model(), batch) == expected
    assert footprint.flops(new_model(), batch, batch) == {name: 2 * count for name, count in expected.items()}
    assert footprint.flops(new_model("mlm"), batch) == {**expected, "head": 2 * 2 * 32 * (32 + VOCABULARY)}
    # An encoder's pooler is read by nobody.
    assert footprint.flops(new_model("none"), batch) == {**expected, "head": 0}


def test_padding_is_no_arithmetic() -> None:
    assert footprint.flops(new_model(), toy.batch([5, 3], pad_to=9)) == footprint.flops(new_model(), toy.batch([5, 3]))


def test_zeros_are_stored_and_computed() -> None:
    model, batch = new_model(), toy.batch([3, 5])
    before = footprint.footprint(model, batch)
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[:32] = 0
    after = footprint.footprint(model, batch)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"nonzero", "nonzero/feed_forward"}
    assert before["nonzero"] - after["nonzero"] == 32 * 32


@pytest.mark.parametrize(("rank", "less"), [(8, 4 * (32 * 32 - 8 * 64)), (16, 0)])
def test_a_pair_counts_as_a_pair_where_that_is_less(rank: int, less: int) -> None:
    """Of [32, 32] in each of four layers: rank 16 takes no less than the product."""
    model, batch = new_model(), toy.batch([3, 5])
    plain = footprint.footprint(model, batch)
    for layer in encoder_layers(model):
        layer.attention.self.query, _ = LowRankLinear.from_module(layer.attention.self.query, rank)
    product = footprint.footprint(model, batch)
    assert product["parameters"] == plain["parameters"]
    assert plain["stored"] - product["stored"] == plain["stored/attention"] - product["stored/attention"] == less
    assert plain[footprint.FLOPS] - product[footprint.FLOPS] == pytest.approx(2 * less)
    assert len(compressed_module.compressed_modules(model)) == 4


def test_pairs_are_what_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.compress(new_model(), "low_rank", keep=0.5).eval().requires_grad_(False)
    batch = toy.batch([16, 16, 16, 16])
    counted = footprint.flops(model, batch)
    with torch.device("meta"):
        meta_model = toy.compress(new_model(), "low_rank", keep=0.5)
    assert footprint.flops(meta_model, batch) == counted
    compact = compressed_module.replace_all(model, compressed_module.COMPACT)
    assert footprint.flops(compact, batch) == counted
    assert sum(footprint.stored_weights(compact)[0].values()) == count_parameters(compact)
    # Before 2.15, torch counts no fused attention of a CPU.
    monkeypatch.setattr(F, "scaled_dot_product_attention", _explicit_attention)
    with FlopCounterMode(display=False) as counter:
        compute_outputs(compact, batch, OutputSpec(logits=True))
    assert sum(counted.values()) == counter.get_total_flops()


class Scores(compressed_module.CompressedModule):
    """Takes part in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(7))

    def merge(self) -> None:
        return None


def test_what_only_trains_is_not_counted() -> None:
    model, batch = new_model(), toy.batch([3])
    before = footprint.footprint(model, batch)
    model.bert.scores = Scores()
    assert footprint.footprint(model, batch) == before


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    return {family: load_tokenizer(toy_families.tokenizer(family, folder / family)) for family in toy_families.SIZES}


@pytest.mark.parametrize("family", toy_families.SIZES)
def test_components_of_each_family(family: str, tokenizers: Any) -> None:
    """All weights are of one component each; those of layers are of two, and nearly nothing else is."""
    model = toy_families.new_model(family, "classification", tokenizers[family], toy.LABELS)
    weights, _ = footprint.stored_weights(model)
    assert sum(weights.values()) == count_parameters(model)
    beside = weights["attention"] + weights["feed_forward"] - count_parameters(encoder_layers(model))
    extra = {"mpnet": 32 * 4, "deberta-v2": 32 * 32 * 3 + 3 * 32}  # biases by position; a convolution and its norm
    assert beside == extra.get(family, 0)
    inner = 3 if family == "modernbert" else 2
    assert weights["feed_forward"] // (1 if family == "albert" else 4) == pytest.approx(inner * 32 * 64, rel=0.06)
    assert weights["embeddings"] >= model.get_input_embeddings().weight.numel()
    assert 32 * 2 <= weights["head"] <= 32 * 32 + 32 * 2 + 4 * 32


def test_narrower_and_shallower_students_count_less(world: World, tmp_path: Path) -> None:
    from lad_dist.training import cost_model, run_spec

    def student(**changes: Any) -> dict[str, float]:
        tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher, objective={"name": "kd"})
        spec = run_spec.resolve_run(toy.parsed(tables, {f"student.{key}": value for key, value in changes.items()}))
        model = cost_model.meta_distiller(spec).student
        return {"parameters": count_parameters(model), **footprint.flops(model, toy.batch([16]))}

    whole, shallow, narrow = (
        student(num_hidden_layers=4),
        student(num_hidden_layers=1),
        student(num_hidden_layers=4, hidden_size=16),
    )
    assert shallow["parameters"] == whole["parameters"] - 3 * (ATTENTION + FEED_FORWARD)
    assert shallow["attention"] == whole["attention"] / 4
    assert narrow["feed_forward"] == whole["feed_forward"] / 4


def test_bytes_are_those_of_the_weights(world: World, tmp_path: Path) -> None:
    size = (world.teacher / "model.safetensors").stat().st_size
    assert footprint.bytes_table(world.teacher) == {"bytes/safetensors": size}
    (tmp_path / "onnx").mkdir()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"123")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"4567")
    (tmp_path / "onnx" / "model.int8.onnx").write_bytes(b"1")
    assert footprint.bytes_table(tmp_path) == {"bytes/safetensors": 7, "bytes/onnx int8": 1}
