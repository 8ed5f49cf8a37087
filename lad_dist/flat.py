"""What passes between data, models and objectives: flat batches in, traces out.

    Batch   sequences laid end to end, without padding between embedding and loss
    Shape   the sizes of a model that an objective needs to know
    Needs   which parts of a forward an objective wants to see
    Trace   what one forward left behind, and only what was needed
    pad, unpad   flat [N, ...] to [B, S, ...] and back, for what must know where sequences end

B sequences, N tokens of all of them, S tokens of the longest, R rows that the head reads, D width, H heads, V outputs
of the head.
"""

from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

Head = Literal["none", "mlm", "classification", "regression"]


class Batch(NamedTuple):
    """Sequences end to end. `lengths` are the attended tokens of each: shorter than its span only where `pad_to`
    pads."""

    input_ids: Tensor  # [N]
    token_type_ids: Tensor  # [N]
    position_ids: Tensor  # [N], from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1], where the sequences' spans begin and end
    lengths: Tensor  # [B]
    padded_index: Tensor  # [N], place of each token in [B * S]
    rows: Tensor  # [R], tokens that the head reads: first tokens for tasks, masked ones for MLM
    labels: Tensor  # [R], what the head should say there
    longest: int  # S: of the longest sequence, or a little more where that lets shapes recur
    ragged: bool  # whether any sequence attends to fewer than S tokens
    tokens: int  # sum of lengths: real tokens

    def to(self, device: torch.device | str) -> Self:
        tensors = {name: x.to(device, non_blocking=True) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)  # type: ignore[arg-type]

    @property
    def attended(self) -> Tensor:
        """Boolean [B, S]: which places of the padded layout are real tokens."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]


def pad(x: Tensor, batch: Batch) -> Tensor:
    """[N, ...] to [B, S, ...], zeros in the gaps."""
    count = batch.lengths.shape[0]
    if x.shape[0] == count * batch.longest:
        return x.view(count, batch.longest, *x.shape[1:])
    padded = x.new_zeros(count * batch.longest, *x.shape[1:])
    return padded.index_copy(0, batch.padded_index, x).view(count, batch.longest, *x.shape[1:])


def unpad(x: Tensor, batch: Batch) -> Tensor:
    """[B, S, ...] to [N, ...]: the inverse of `pad`."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat if len(flat) == len(batch.padded_index) else flat.index_select(0, batch.padded_index)


class Shape(NamedTuple):
    """The sizes of a model, as an objective sees them."""

    layers: int
    width: int
    heads: int
    head: Head
    outputs: int
    span: int | None = None  # tokens of every sequence, where data.pad_to makes them equal


class Needs(NamedTuple):
    """What an objective wants to see of a forward. Layer 0 is the embedding output, layer l the output of layer l."""

    logits: bool = False
    hidden: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()


class Trace(NamedTuple):
    """What a forward left behind."""

    logits: Tensor | None = None  # [R, V]
    hidden: dict[int, Tensor] = {}  # noqa: RUF012 (never mutated)  layer -> [N, D]
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # noqa: RUF012  layer -> three of [N, H, D / H]


def trace_map(function: Any, trace: Trace) -> Trace:
    """The trace with `function` applied to each of its tensors."""
    return Trace(
        None if trace.logits is None else function(trace.logits),
        {layer: function(x) for layer, x in trace.hidden.items()},
        {layer: (function(q), function(k), function(v)) for layer, (q, k, v) in trace.qkv.items()},
    )
