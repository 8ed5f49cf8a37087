"""A flat forward is the padded forward of transformers itself, and returns the tensors of its OutputSpec alone."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
import toy_families
from conftest import World
from torch import Tensor
from torch.nn.attention import varlen
from toy_families import real

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch, Head
from lad_dist.core.outputs import OutputSpec
from lad_dist.models import attention, loading
from lad_dist.models.attention import _kernel_attention
from lad_dist.models.dims import encoder_layers
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import FrozenModel, model_digest
from lad_dist.models.loading import save_model

VOCABULARY = 90
LENGTHS = [7, 3, 12, 1, 12]
WINDOWS = toy_families.architecture("modernbert", pad_token_id=0)
EVERY_LAYER = OutputSpec(logits=True, hidden=(0, 1, 2, 3, 4))


def save_toy_model(folder: Path, head: Head, architecture: dict[str, Any] = toy.SIZES) -> Path:
    """A folder with a BERT, its weights far from the tiny ones of a new model. Other families: test_families.py."""
    torch.manual_seed(1)
    labels = ("a", "b", "c") if head == "classification" else ()
    model = loading.create_model(architecture, head, vocab_size=VOCABULARY, labels=labels)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    save_model(model, folder)
    return folder


def batch_of(lengths: list[int], head: Head, *, pad_to: int | None = None) -> Batch:
    return toy_families.batch_of_pairs(lengths, head, VOCABULARY, pad_to)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_through_shared_spans(dropout: float, tmp_path: Path) -> None:
    """In bf16 and with dropout attention is computed product by product: it keeps the same sequences apart."""
    model = loading.load_model(str(save_toy_model(tmp_path, "mlm")), "mlm", dtype=torch.bfloat16).train()
    for layer in encoder_layers(model):
        layer.attention.self.dropout.p = dropout
    batch = batch_of([12, 9, 3], "mlm")
    packed = toy.packed(batch._replace(token_type_ids=torch.zeros_like(batch.token_type_ids)), 12)
    model.get_input_embeddings().weight.grad = None
    hidden = compute_outputs(model, packed, OutputSpec(hidden=(4,))).hidden[4]
    span_tokens = packed.input_ids[:12].unique()
    other_tokens = set(range(VOCABULARY)) - set(span_tokens.tolist())
    hidden[:12].float().pow(2).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert (gradient[span_tokens].abs().sum(dim=1) > 0).all()
    assert gradient[list(other_tokens)].abs().max() == 0


@pytest.mark.parametrize(
    "spec",
    [
        OutputSpec(),
        OutputSpec(logits=True),
        OutputSpec(hidden=(0, 3)),
        OutputSpec(qkv=(2,)),
        OutputSpec(True, (4,), (1, 4)),
    ],
)
def test_outputs_are_those_of_the_spec(spec: OutputSpec, tmp_path: Path) -> None:
    model = loading.load_model(str(save_toy_model(tmp_path, "mlm")), "mlm").eval()
    batch = batch_of(LENGTHS, "mlm")
    outputs = compute_outputs(model, batch, spec)
    assert (outputs.logits is not None) is spec.logits
    assert tuple(outputs.hidden) == spec.hidden
    assert tuple(outputs.qkv) == spec.qkv
    assert all(x.shape == (35, 32) for x in outputs.hidden.values())
    assert all(x.shape == (35, 4, 8) for qkv in outputs.qkv.values() for x in qkv)


def test_the_mlm_head_runs_on_masked_rows_alone_unless_all_are_asked_for(tmp_path: Path) -> None:
    model = loading.load_model(str(save_toy_model(tmp_path, "mlm")), "mlm").eval()
    head_rows: list[int] = []
    model.cls.register_forward_hook(lambda _, args, __: head_rows.append(args[0].numel() // 32))
    batch = batch_of(LENGTHS, "mlm")
    masked = compute_outputs(model, batch, OutputSpec(logits=True)).logits
    everywhere = compute_outputs(model, batch, OutputSpec(logits=True, all_tokens=True)).logits
    compute_outputs(model, batch, OutputSpec(hidden=(1,)))  # and not at all where no logits are needed
    assert head_rows == [len(batch.head_positions), len(batch.input_ids)]
    torch.testing.assert_close(everywhere[batch.head_positions], masked)


def test_a_forward_removes_the_hooks(tmp_path: Path) -> None:
    model = loading.load_model(str(save_toy_model(tmp_path, "mlm")), "mlm").eval()
    before = compute_outputs(model, batch_of(LENGTHS, "mlm"), EVERY_LAYER)
    after = compute_outputs(model, batch_of([4], "mlm"), EVERY_LAYER)
    assert before.hidden[1].shape == (35, 32)
    assert after.hidden[1].shape == (4, 32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def varlen_by_hand(*args: Any, **kwargs: Any) -> Tensor:
    """Attention with varlen_attn's signature, sequence by sequence. The kernel's own demands are asserted."""
    call = inspect.signature(VARLEN).bind(*args, **kwargs).arguments
    q, k, v, begin, begin_k = (call[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
    assert "seqused_k" not in call  # for inference alone
    spans = begin.diff().tolist()
    assert begin.dtype == begin_k.dtype == torch.int32
    assert begin.tolist() == begin_k.tolist()
    assert all(x.is_contiguous() and x.shape == (int(begin[-1]), 4, 8) for x in (q, k, v))  # 8: a multiple of 8
    assert call["max_q"] == call["max_k"] >= max(spans)
    out = torch.empty_like(q)
    for start, span in zip(begin.tolist(), spans, strict=False):
        rows = slice(start, start + span)
        sequence = [x[rows].transpose(0, 1) for x in (q, k, v)]
        places = torch.arange(span)
        before, after = (span if size < 0 else size for size in call["window_size"])
        near = (places[:, None] - places <= before) & (places - places[:, None] <= after)
        out[rows] = F.scaled_dot_product_attention(*sequence, attn_mask=near, scale=call["scale"]).transpose(0, 1)
    return out


VARLEN = varlen.varlen_attn


@pytest.mark.parametrize(("lengths", "pad_to"), [(LENGTHS, None), ([6, 6], None), ([8, 8], 8), ([9, 2, 3, 12], -1)])
@pytest.mark.parametrize("architecture", [toy.SIZES, WINDOWS, toy.SIZES | {"hidden_size": 24}])
def test_the_kernel_is_called_for_the_same_attention(
    lengths: list[int],
    pad_to: int | None,
    architecture: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel needs a GPU; on a CPU its arguments and layout are held against the padded way. -1: packed spans."""
    model = loading.load_model(str(save_toy_model(tmp_path, "mlm", architecture)), "mlm").eval()
    batch = batch_of(lengths, "mlm", pad_to=pad_to) if pad_to != -1 else toy.packed(batch_of(lengths, "mlm"), 12)
    with torch.no_grad():
        padded = compute_outputs(model, batch, EVERY_LAYER)
        monkeypatch.setattr(varlen, "varlen_attn", varlen_by_hand)
        monkeypatch.setattr(attention, "_padded_attention", _kernel_attention)
        by_kernel = compute_outputs(model, batch, EVERY_LAYER)
    torch.testing.assert_close(by_kernel.logits, padded.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(real(by_kernel.hidden[4], batch), real(padded.hidden[4], batch), rtol=1e-5, atol=1e-5)


def test_save_and_load_keep_every_bit(world: World, tmp_path: Path) -> None:
    model = loading.load_model(str(world.pretrained), "mlm")
    save_model(model, tmp_path)
    assert model_digest(loading.load_model(str(tmp_path), "mlm")) == model_digest(model)


def test_digest_sees_one_bit(world: World) -> None:
    model = loading.load_model(str(world.headless), "none")
    before = model_digest(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert model_digest(model) != before


def test_a_new_head_on_pretrained_layers(world: World) -> None:
    """Layers are those of the folder, the head is the seed's."""
    torch.manual_seed(5)
    model = loading.load_model(str(world.pretrained), "classification", labels=("x", "y", "z"))
    source = loading.load_model(str(world.pretrained), "mlm")
    assert model_digest(encoder_layers(model)) == model_digest(encoder_layers(source))
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    torch.manual_seed(5)
    same_seed = loading.load_model(str(world.pretrained), "classification", labels=("x", "y", "z"))
    assert model_digest(same_seed) == model_digest(model)
    assert model.classifier.weight.abs().max() > 0


def test_logits_of_a_frozen_model_have_the_tasks_order_of_labels(world: World) -> None:
    device = torch.device("cpu")
    model = FrozenModel(str(world.teacher), "classification", device=device, labels=("no", "yes"))
    reversed_model = FrozenModel(str(world.teacher), "classification", device=device, labels=("yes", "no"))
    batch = toy.batch(LENGTHS)
    logits, reversed_logits = (m(batch, OutputSpec(logits=True)).logits for m in (model, reversed_model))
    assert logits is not None
    assert reversed_logits is not None
    assert torch.equal(logits, reversed_logits.flip(1))
    assert not torch.equal(logits, reversed_logits)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert not model.model.training


def test_labels_that_a_folder_counts_from_one_are_counted_from_zero(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.teacher, tmp_path / "counted")
    tables = json.loads((folder / "config.json").read_text()) | {"id2label": {"2": "yes", "1": "no"}, "label2id": {}}
    (folder / "config.json").write_text(json.dumps(tables))
    counted, usual = (loading.load_model(str(x), "classification", labels=toy.LABELS) for x in (folder, world.teacher))
    assert counted.config.id2label == usual.config.id2label
    assert model_digest(counted) == model_digest(usual)


def test_a_frozen_model_without_the_head_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="this model has no mlm head"):
        FrozenModel(str(world.headless), "mlm", device=torch.device("cpu"))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match=r'student\.architecture\.model_type "t5" is unknown; choose from albert, bert'):
        loading.create_model({"model_type": "t5", **toy.SIZES}, "none", vocab_size=VOCABULARY)
