"""Attention over flat tokens, and the two ways a forward runs: flat or padded.

Batches are flat, so attention alone must know where sequences end. transformers lets a model run with an attention
function of our own (`AttentionInterface`); ours takes the `FlatForward` that `compute_outputs` hands through the
forward as a keyword, records q, k and v where they are needed, and keeps sequences apart. On a GPU that is a
variable-length kernel; elsewhere it pads, inside attention only. Families with an attention of their own
(`families.py`) run padded as a whole (`PaddedForward`).

N tokens of all sequences, U spans of S places, D hidden size, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)

from lad_dist.core.batch import Batch, one_span_per_sequence, pad, unpad
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers

ATTENTION_NAME = "lad_dist_flat"
AMPERE, MULTIPLE = (8, 0), 8  # what the variable-length kernel asks of a GPU, and of a head's size


@dataclass
class FlatForward:
    """One forward over flat tokens: how the model sees them, what the attention function needs to know of the batch,
    and where it leaves q, k and v."""

    batch: Batch
    wanted: tuple[int, ...]
    layer: int = 0  # the one that runs, from 1: some families run one layer many times
    biases: dict[int | None, Tensor | None] = field(default_factory=dict)  # of attention's scores, by window
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, Any]:
        return {"flat": self}

    def lay_out(self, x: Tensor) -> Tensor:
        """[N] to [1, N and filler], which linear layers see and nothing else does."""
        return F.pad(x, (0, self.batch.computed_tokens - len(x)))[None]

    def flatten(self, x: Tensor) -> Tensor:
        """[1, N and filler, D] to [N, D]."""
        return x[0, : len(self.batch.input_ids)]

    def recording(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """The attention function records by itself."""
        return []

    def record(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """A Part in a layer's place may hold several: the last one's stay."""
        if self.layer in self.wanted:
            self.qkv[self.layer] = (q, k, v)

    def bias_like(self, q: Tensor, window: int | None) -> Tensor | None:
        """[U, 1, S or 1, S] in the type of q: 0 where a place attends to another, which is `window` places away at
        most; the least number elsewhere."""
        if window is not None and window >= self.batch.span_length - 1:
            window = None
        if window not in self.biases:
            self.biases[window] = self._bias_like(q, window)
        return self.biases[window]

    def _bias_like(self, q: Tensor, window: int | None) -> Tensor | None:
        if window is None and not (self.batch.has_padding or self.batch.packed):
            return None
        visible = self.batch.visible[:, None]
        if window is not None:
            places = torch.arange(self.batch.span_length, device=q.device)
            distance = (places[:, None] - places).abs()
            visible = visible & (distance <= window) | (distance == 0)  # a place without a token too sees something
        return q.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(q.dtype).min)


@dataclass
class PaddedForward:
    """One forward of a family with an attention of its own: [B, S], a sequence a span, and a mask of two dimensions."""

    batch: Batch
    wanted: tuple[int, ...]
    layer: int = 0
    found: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)  # by layer and attention in it
    heads: int = 0

    def __post_init__(self) -> None:
        self.batch = one_span_per_sequence(self.batch)

    @property
    def words(self) -> dict[str, Any]:
        return {"attention_mask": self.batch.is_token.long()}

    @property
    def qkv(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        last = {number: list(each.values())[-1] for number, each in self.found.items()}
        split = {n: [self.flatten(x).unflatten(-1, (self.heads, -1)) for x in each] for n, each in last.items()}
        return {number: (q, k, v) for number, (q, k, v) in split.items()}

    def lay_out(self, x: Tensor) -> Tensor:
        """[N] to [B, S]."""
        return pad(x, self.batch)

    def flatten(self, x: Tensor) -> Tensor:
        """[B, S, D] to [N, D]."""
        return unpad(x, self.batch)

    def recording(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hooks on the maps to q, k and v of the layers wanted."""
        names = families.family_of(model.config).projections
        assert names is not None
        self.heads = model.config.num_attention_heads
        handles = []
        for number in self.wanted:
            for path, module in encoder_layers(model)[number - 1].named_modules():
                attention, _, name = path.rpartition(".")
                if name in names:
                    handles.append(module.register_forward_hook(self._keep(number, attention, names.index(name))))
        return handles

    def _keep(self, number: int, attention: str, place: int) -> Callable[..., None]:
        """A Part in a layer's place may hold several attentions: that of the last one to run stays."""

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            kept = self.found.setdefault(number, {}).setdefault(attention, [])
            if len(kept) == place:  # DeBERTa sends its relative positions through the same maps afterwards
                kept.append(output)

        return keep


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flat: FlatForward,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1, H, N, D / H] -> [1, N, H, D / H]: every token attends to the tokens of its own sequence,
    those less than `sliding_window` away where it is given."""
    tokens = len(flat.batch.input_ids)
    q, k, v = (x[0].transpose(0, 1)[:tokens] for x in (query, key, value))
    flat.record(q, k, v)
    # The kernel knows neither fp32 nor dropout, nor keys inside a span that do not count; these go the padded way.
    kernel = _has_kernel(q.device, q.dtype) and not dropout and flat.batch.num_tokens == tokens
    attend = _kernel_attention if kernel else _padded_attention
    window = None if sliding_window is None else sliding_window - 1
    out = attend(q, k, v, flat, scaling, dropout, window)
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[2] - tokens))[None], None


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def _kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, flat: FlatForward, scaling: float | None, _: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (brings the compiler: seconds at every start)

    spans, longest, size = flat.batch.cu_seqlens, flat.batch.span_length, q.shape[-1]
    q, k, v = (F.pad(x, (0, -size % MULTIPLE)).contiguous() for x in (q, k, v))
    scale = size**-0.5 if scaling is None else scaling
    reach = (-1, -1) if window is None else (window, window)
    out = varlen_attn(q, k, v, spans, spans, longest, longest, scale=scale, window_size=reach)
    assert isinstance(out, Tensor)
    return out[..., :size]


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, flat: FlatForward, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    q, k, v = (pad(x, flat.batch).transpose(1, 2) for x in (q, k, v))
    # PyTorch's fused attention on a CPU has a backward slower than the products themselves, in bf16 by half again.
    explicit = q.device.type == "cpu" and q.requires_grad and (dropout or q.dtype == torch.bfloat16)
    attend = _explicit_attention if explicit else F.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=flat.bias_like(q, window), dropout_p=dropout, scale=scaling)
    return unpad(out.transpose(1, 2), flat.batch)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """F.scaled_dot_product_attention of [U, H, S, D / H], product by product."""
    heads, (length, size) = q.shape[:2], q.shape[2:]
    q, k, v = (x.reshape(-1, length, size) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1)
    if attn_mask is not None:
        bias = attn_mask.expand(*heads, -1, -1).reshape(-1, *attn_mask.shape[2:])
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=size**-0.5 if scale is None else scale)
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p, training=dropout_p > 0)
    return (weights @ v).view(*heads, length, size)


def _no_mask(*_: Any, **__: Any) -> None:
    """Flat attention keeps sequences apart by itself."""


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
