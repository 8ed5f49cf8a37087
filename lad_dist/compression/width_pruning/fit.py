"""Fits: a narrow model, layer by layer, to what its earlier layers compute on the sample.

N tokens, D old width, d new width.
"""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.compression.width_pruning.cut import FLOOR, cut_attention, cut_feed_forward, head_axes
from lad_dist.compression.width_pruning.modules import ModuleMap
from lad_dist.compression.width_pruning.statistics import Reconstruction, Statistics
from lad_dist.core.batch import Batch
from lad_dist.models import activations


def fit_layers(
    wide: ModuleMap, narrow: ModuleMap, axes: Tensor, batches: Sequence[Batch], statistics: Statistics
) -> Reconstruction:
    """Set the weights of all layers. Return how to reconstruct the wide model's last hidden states."""
    inputs = _fit_place(0, narrow, axes, batches, statistics)
    num_heads, num_narrow_heads = (side.model.config.num_attention_heads for side in (wide, narrow))
    for number, (wide_layer, narrow_layer) in enumerate(zip(wide.layers, narrow.layers, strict=True)):
        cut_attention(wide_layer, narrow_layer, axes, inputs, num_heads, num_narrow_heads)
        inputs = _fit_place(2 * number + 1, narrow, axes, batches, statistics)
        cut_feed_forward(wide_layer, narrow_layer, axes, inputs, statistics.intermediate[number])
        inputs = _fit_place(2 * number + 2, narrow, axes, batches, statistics)
    return inputs


def _fit_place(
    place: int, narrow: ModuleMap, axes: Tensor, batches: Sequence[Batch], statistics: Statistics
) -> Reconstruction:
    """Fit the norm at a place of the stream. Return how to reconstruct the wide hidden states from its outputs."""
    module, states = narrow.stream[place], statistics.states[place]
    projection = axes.float().to(states[0].device)
    targets = [x @ projection for x in states]
    pairs = zip(_inputs_of(narrow, module, batches), batches, strict=True)
    inputs = [activations.token_rows(x, batch).float() for x, batch in pairs]
    if isinstance(module, nn.LayerNorm):
        _fit_norm(module, inputs, targets)
    outputs = [module(x.to(next(module.parameters()))).float() for x in inputs]
    return Reconstruction.fit(outputs, states, axes)


class _StopForward(Exception):
    """The module whose input is captured has run."""


def _inputs_of(modules: ModuleMap, module: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the module's input for each batch; nothing after it runs."""
    inputs: list[Tensor] = []

    def capture_input(_: int, x: Tensor, __: Tensor) -> None:
        inputs.append(x)
        raise _StopForward

    for batch in batches:
        with activations.capture([module], capture_input), contextlib.suppress(_StopForward):
            activations.compute_logits(modules.model, batch)
    return inputs


def _fit_norm(norm: nn.LayerNorm, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Set scale and offset by least squares: from inputs [N, d] to targets [N, d], of each batch."""
    sums: Tensor | float = 0.0
    for batch_inputs, batch_targets in zip(inputs, targets, strict=True):
        x = F.layer_norm(batch_inputs.float(), batch_inputs.shape[-1:], eps=norm.eps).double()
        y = batch_targets.double()
        sums = sums + torch.stack([x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])
    mean_x, mean_y, mean_square, mean_product = torch.as_tensor(sums) / sum(map(len, inputs))
    scale = (mean_product - mean_x * mean_y) / (mean_square - mean_x * mean_x).clamp(min=FLOOR)
    norm.weight.copy_(scale)
    norm.bias.copy_(mean_y - scale * mean_x)


def fit_head_norm(
    wide: ModuleMap, narrow: ModuleMap, axes: Tensor, batches: Sequence[Batch], statistics: Statistics
) -> None:
    """Fit the norm of a head whose dense layer is narrower than it was."""
    if wide.head_norm is None or narrow.head_norm is None:
        return
    unit_axes = head_axes(wide, narrow, axes, statistics)
    if unit_axes is None:
        return
    targets: list[Tensor] = []
    projection = unit_axes.float().to(wide.model.device)
    for batch in batches:
        with activations.capture(
            [wide.head_norm], lambda _, __, y: targets.append(y.flatten(0, -2).float() @ projection)
        ):
            activations.compute_logits(wide.model, batch)
    inputs = [x.flatten(0, -2) for x in _inputs_of(narrow, narrow.head_norm, batches)]
    _fit_norm(narrow.head_norm, inputs, targets)
