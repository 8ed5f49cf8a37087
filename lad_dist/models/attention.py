"""Attention over flat tokens, and the two ways in which a forward runs: flat or padded.

Batches are flat, so attention alone must know where sequences end. transformers lets a model run with an attention
function of our own (`AttentionInterface`). The function here takes a `FlatForward`, which `compute_outputs` hands
through the model as a keyword. It records q, k and v where they are needed, and keeps sequences apart. On a GPU it
calls a variable-length kernel; elsewhere it pads, inside attention only. Families with an attention of their own
(`families.py`) run padded as a whole (`PaddedForward`).

N tokens of all sequences, U spans of S places, D hidden size, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lad_dist.core.batch import Batch, one_span_per_sequence, pad, unpad
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.kernel import has_kernel

ATTENTION_NAME = "lad_dist_flat"
KERNEL_HEAD_SIZE_MULTIPLE = 8  # what the variable-length kernel requires of the size of a head


@dataclass
class FlatForward:
    """One forward over flat tokens: its inputs, what attention must know of the batch, and the q, k and v it leaves."""

    batch: Batch
    qkv_layers: tuple[int, ...]
    # The layer that runs, from 1. The hooks count it, for some families run one module as many layers.
    current_layer: int = 0
    biases: dict[int | None, Tensor | None] = field(default_factory=dict)  # of attention's scores, by window
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What the model takes beside token ids, positions and segments."""
        return {"flat_forward": self}

    def prepare_input(self, x: Tensor) -> Tensor:
        """Lay out [N] as [1, N and filler]. Linear layers see the filler and nothing else does."""
        return _fill(x, self.batch.computed_tokens)[None]

    def flatten(self, x: Tensor) -> Tensor:
        """Return the [N, D] of [1, N and filler, D]."""
        return x[0, : len(self.batch.input_ids)]

    def register_hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Return no hooks: the attention function records by itself."""
        return []

    def record(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Record the q, k and v of the layer that runs.

        A CompressedModule in a layer's place may hold several attentions. Those of the last one to run stay.
        """
        if self.current_layer in self.qkv_layers:
            self.qkv[self.current_layer] = (q, k, v)

    def score_bias(self, q: Tensor, window: int | None) -> Tensor | None:
        """Return what to add to the scores: [U, 1, S or 1, S] in the type of q.

        It is 0 where a place attends to another, at most `window` places away, and the least number elsewhere.
        """
        if window is not None and window >= self.batch.span_length - 1:
            window = None
        if window not in self.biases:
            self.biases[window] = self._score_bias(q, window)
        return self.biases[window]

    def _score_bias(self, q: Tensor, window: int | None) -> Tensor | None:
        if window is None and not (self.batch.has_padding or self.batch.packed):
            return None
        visible = self.batch.visible[:, None]
        if window is not None:
            places = torch.arange(self.batch.span_length, device=q.device)
            distance = (places[:, None] - places).abs()
            # A place without a token sees itself too, so that no softmax is over nothing.
            visible = visible & (distance <= window) | (distance == 0)
        return q.new_zeros(visible.shape).masked_fill(~visible, torch.finfo(q.dtype).min)


@dataclass
class PaddedForward:
    """One forward of a family with its own attention, over [B, S], a sequence a span, and a mask of two dimensions."""

    batch: Batch
    qkv_layers: tuple[int, ...]
    current_layer: int = 0
    projections: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)  # by layer and attention in it
    num_heads: int = 0

    def __post_init__(self) -> None:
        self.batch = one_span_per_sequence(self.batch)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What the model takes beside token ids, positions and segments."""
        return {"attention_mask": self.batch.is_token.long()}

    @property
    def qkv(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """The q, k and v of each layer, [N, H, D / H]: those of the last of its attentions to run."""
        qkv = {}
        for layer, attentions in self.projections.items():
            *_, last = attentions.values()
            q, k, v = (self.flatten(x).unflatten(-1, (self.num_heads, -1)) for x in last)
            qkv[layer] = q, k, v
        return qkv

    def prepare_input(self, x: Tensor) -> Tensor:
        """Pad [N] to [B, S]."""
        return pad(x, self.batch)

    def flatten(self, x: Tensor) -> Tensor:
        """Return the [N, D] of [B, S, D]."""
        return unpad(x, self.batch)

    def register_hooks(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Register hooks that record the outputs of the maps to q, k and v in `qkv_layers`."""
        modules = families.family_of(model.config).modules.by_role()
        paths = [modules[role] for role in ("query", "key", "value")]
        self.num_heads = model.config.num_attention_heads
        handles = []
        for layer in self.qkv_layers:
            for name, module in encoder_layers(model)[layer - 1].named_modules():
                for index, path in enumerate(paths):
                    if f".{name}".endswith(f".{path}"):
                        attention = name.rpartition(".")[0]
                        handles.append(module.register_forward_hook(self._recorder(layer, attention, index)))
        return handles

    def _recorder(self, layer: int, attention: str, index: int) -> Callable[..., None]:
        """Return a hook on the map to q, k or v: index 0, 1 or 2."""

        def record(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs = self.projections.setdefault(layer, {}).setdefault(attention, [])
            if len(outputs) == index:  # DeBERTa sends its relative positions through the same maps afterwards
                outputs.append(output)

        return record


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flat_forward: FlatForward,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Let every token attend to its own sequence: query, key, value [1, H, N, D / H] -> [1, N, H, D / H].

    With a `sliding_window` it attends to tokens less than that far away.
    """
    tokens = len(flat_forward.batch.input_ids)
    q, k, v = (x[0].transpose(0, 1)[:tokens] for x in (query, key, value))
    flat_forward.record(q, k, v)
    # The kernel knows neither fp32 nor dropout, nor keys inside a span that do not count; these go the padded way.
    use_kernel = has_kernel(q.device, q.dtype) and not dropout and flat_forward.batch.num_tokens == tokens
    attend = _kernel_attention if use_kernel else _padded_attention
    window = None if sliding_window is None else sliding_window - 1
    out = attend(q, k, v, flat_forward, scaling, dropout, window)
    return _fill(out, query.shape[2])[None], None


def _fill(x: Tensor, length: int) -> Tensor:
    """Return [N, ...] as [length, ...]: the filler repeats the last token, so that it widens no range of numbers."""
    return torch.cat([x, x[-1:].expand(length - len(x), *x.shape[1:])])


def _kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, forward: FlatForward, scaling: float | None, _: float, window: int | None
) -> Tensor:
    # Imported here, for it brings the compiler: seconds at every start.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    cu_seqlens, longest, size = forward.batch.cu_seqlens, forward.batch.span_length, q.shape[-1]
    q, k, v = (F.pad(x, (0, -size % KERNEL_HEAD_SIZE_MULTIPLE)).contiguous() for x in (q, k, v))
    scale = size**-0.5 if scaling is None else scaling
    window_size = (-1, -1) if window is None else (window, window)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window_size)
    assert isinstance(out, Tensor)
    return out[..., :size]


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, forward: FlatForward, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    q, k, v = (pad(x, forward.batch).transpose(1, 2) for x in (q, k, v))
    # PyTorch's fused attention on a CPU has a backward slower than the products themselves, in bf16 by half again.
    explicit = q.device.type == "cpu" and q.requires_grad and (dropout or q.dtype == torch.bfloat16)
    attend = _explicit_attention if explicit else F.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=forward.score_bias(q, window), dropout_p=dropout, scale=scaling)
    return unpad(out.transpose(1, 2), forward.batch)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """Compute F.scaled_dot_product_attention of [U, H, S, D / H] product by product."""
    heads, (length, size) = q.shape[:2], q.shape[2:]
    q, k, v = (x.reshape(-1, length, size) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1)
    if attn_mask is not None:
        bias = attn_mask.expand(*heads, -1, -1).reshape(-1, *attn_mask.shape[2:])
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=size**-0.5 if scale is None else scale)
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p, training=dropout_p > 0)
    return (weights @ v).view(*heads, length, size)


AttentionInterface.register(ATTENTION_NAME, _attention)
# No mask: flat attention keeps sequences apart by itself.
AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)
