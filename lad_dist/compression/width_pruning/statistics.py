"""Statistics of a model on a sample, and the coordinates and regressions that follow from them.

N tokens, D old width, d new width, F intermediate units.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Literal, NamedTuple

import scipy.linalg
import torch
from torch import Tensor, nn

from lad_dist.compression.width_pruning.modules import ModuleMap, weight_and_bias
from lad_dist.core.batch import Batch
from lad_dist.models import activations

WidthBasis = Literal["principal", "random"]

RIDGE = 1e-2  # of the mean variance, where few rows speak for many units


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] of rows, in fp64."""

    num_rows: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> "Moments":
        """Return those of the rows [N, D] of each batch."""
        rows = [x.double().cpu() for x in batches]
        count = sum(map(len, rows))
        mean = reduce(torch.add, (x.sum(dim=0) for x in rows)) / count
        products = reduce(torch.add, (x.T @ x for x in rows))
        return cls(count, mean, products / count - torch.outer(mean, mean))


class Statistics(NamedTuple):
    """What the wide model computes on the sample."""

    states: list[list[Tensor]]  # hidden states at each place of the stream, [N, D] of each batch
    stream: list[Moments]  # of these
    unit_means: list[Tensor]  # of the intermediate units of each layer, [F]
    unit_variances: list[Tensor]
    head_states: list[Tensor]  # what the head's last map reads, [R, D] of each batch; none where it has one map
    head: Moments | None  # of these
    logits: list[Tensor]  # [R, V] of each batch; none without a head


def measure(wide: ModuleMap, batches: Sequence[Batch]) -> Statistics:
    """Return the statistics of the wide model on the batches."""
    states: list[list[Tensor]] = [[] for _ in wide.stream]
    units: list[list[Tensor]] = [[] for _ in wide.layers]
    head_states: list[Tensor] = []
    logits: list[Tensor] = []
    outputs = [layer["output"] for layer in wide.layers]
    head = wide.head[1:2] if wide.head_norm is None else [wide.head_norm]
    for batch in batches:

        def add_units(layer: int, x: Tensor, _: Tensor, batch: Batch = batch) -> None:
            x = activations.token_rows(x, batch).double()
            units[layer].append(torch.stack([x.sum(dim=0), x.square().sum(dim=0)]).cpu())

        def add_states(place: int, _: Tensor, y: Tensor, batch: Batch = batch) -> None:
            states[place].append(activations.token_rows(y, batch).float())

        def add_head_states(_: int, x: Tensor, y: Tensor) -> None:
            head_states.append((x if wide.head_norm is None else y).flatten(0, -2))

        with (
            activations.capture(wide.stream, add_states),
            activations.capture(outputs, add_units),
            activations.capture(head, add_head_states),
        ):
            z = activations.compute_logits(wide.model, batch)
        logits += [] if z is None else [z]
    stream = [Moments.of(x) for x in states]
    means, squares = zip(*(reduce(torch.add, x) / stream[0].num_rows for x in units), strict=True)
    variances = [(square - mean.square()).clamp(min=0.0) for mean, square in zip(means, squares, strict=True)]
    head_moments = Moments.of(head_states) if head_states else None
    return Statistics(states, stream, list(means), variances, head_states, head_moments, logits)


def choose_axes(stream: Sequence[Moments], width: int, width_basis: WidthBasis) -> Tensor:
    """Return A [D, d] for a stream with these moments."""
    total = sum(moments.covariance / moments.covariance.trace() for moments in stream)
    assert isinstance(total, Tensor)
    if width == len(total):
        return torch.eye(width, dtype=total.dtype)
    if width_basis == "random":
        span = torch.linalg.qr(torch.randn(len(total), width, dtype=total.dtype)).Q
    else:
        span = torch.linalg.eigh(total).eigenvectors[:, -width:]
    return nearest_to_coordinates(span)


def nearest_to_coordinates(span: Tensor) -> Tensor:
    """Return the basis of the span [D, d] that is nearest to d coordinates."""
    _, order = scipy.linalg.qr(span.T.numpy(), mode="r", pivoting=True)
    coordinates = torch.as_tensor(sorted(order[: span.shape[1]].tolist()))
    left, _, right = torch.linalg.svd(span[coordinates].T)
    return span @ (left @ right)


class Reconstruction(NamedTuple):
    """An estimate of the wide hidden states h from the narrow ones h' [d] at a place: h = lift h' + offset."""

    lift: Tensor  # [D, d]
    offset: Tensor  # [D]
    mean: Tensor  # [d], of h'
    covariance: Tensor  # [d, d], of h'

    @classmethod
    def fit(cls, narrow: Sequence[Tensor], wide: Sequence[Tensor], axes: Tensor) -> "Reconstruction":
        """Return the ridge regression that starts from A, of states [N, d] and [N, D] for each batch."""
        joint = Moments.of([torch.cat([x, y], dim=1) for x, y in zip(narrow, wide, strict=True)])
        width = axes.shape[1]
        narrow_mean, wide_mean = joint.mean.split([width, len(axes)])
        covariance, cross = joint.covariance[:width, :width], joint.covariance[width:, :width]
        lift = axes + torch.linalg.solve(with_ridge(covariance), (cross - axes @ covariance).T).T
        return cls(lift, wide_mean - lift @ narrow_mean, narrow_mean, covariance)

    def compose(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the map that reads h' as the linear one reads h."""
        weight, bias = weight_and_bias(linear)
        return weight @ self.lift, bias + weight @ self.offset


def with_ridge(covariance: Tensor) -> Tensor:
    """Return a covariance [d, d] that can be inverted."""
    return covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
