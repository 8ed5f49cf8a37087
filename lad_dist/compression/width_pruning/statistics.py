"""Statistics of a model on a sample, and the coordinates and regressions that follow from them.

    measure(wide, batches)     what the wide model computes on the sample
    choose_axes(stream, …)     the map from its coordinates to the narrow ones
    Reconstruction             the wide hidden states, estimated from the narrow ones

N tokens, D old width, d new width, F intermediate units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import scipy.linalg
import torch
from torch import Tensor, nn

from lad_dist.compression.width_pruning.modules import ModuleMap, weight_and_bias
from lad_dist.core.batch import Batch
from lad_dist.models import activations

WidthBasis = Literal["principal", "random"]

RIDGE = 1e-2  # of the mean variance, where few rows speak for many units


@dataclass
class Moments:
    """Sums over rows [N, D], in fp64."""

    count: int = 0
    total: Tensor | float = 0.0
    products: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double().cpu()
        self.count += len(x)
        self.total = self.total + x.sum(dim=0)
        self.products = self.products + x.T @ x

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    @property
    def covariance(self) -> Tensor:
        return torch.as_tensor(self.products) / self.count - torch.outer(self.mean, self.mean)


@dataclass
class UnitMoments:
    """Sums over rows [N, F], in fp64, without products of two units."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        self.count += len(x)
        self.total = self.total + x.sum(dim=0).cpu()
        self.squares = self.squares + x.square().sum(dim=0).cpu()

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    @property
    def variance(self) -> Tensor:
        return (torch.as_tensor(self.squares) / self.count - self.mean.square()).clamp(min=0.0)


@dataclass
class Statistics:
    """What the wide model computes on the sample."""

    states: list[list[Tensor]]  # hidden states at each place of the stream, [N, D] for each batch
    stream: list[Moments]  # of these
    intermediate: list[UnitMoments]  # of each layer
    head_units: Moments = field(default_factory=Moments)  # of the head's dense layer, where it has one


def measure(wide: ModuleMap, batches: Sequence[Batch]) -> Statistics:
    """Return the statistics of the wide model on the batches."""
    statistics = Statistics(
        [[] for _ in wide.stream], [Moments() for _ in wide.stream], [UnitMoments() for _ in wide.layers]
    )
    outputs = [layer["output"] for layer in wide.layers]
    dense = [wide.head_norm] if wide.is_tied and wide.head_norm is not None else wide.head[1:2]
    for batch in batches:
        # The hooks run in this iteration alone, while `batch` is this one (B023).
        with (
            activations.capture(
                wide.stream,
                lambda n, _, y: statistics.states[n].append(activations.token_rows(y, batch).float()),  # noqa: B023
            ),
            activations.capture(
                outputs,
                lambda n, x, _: statistics.intermediate[n].add(activations.token_rows(x, batch)),  # noqa: B023
            ),
            activations.capture(dense, lambda _, x, y: statistics.head_units.add(y if wide.is_tied else x)),
        ):
            activations.compute_logits(wide.model, batch)
    for moments, states in zip(statistics.stream, statistics.states, strict=True):
        for state in states:
            moments.add(state)
    return statistics


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


@dataclass
class Reconstruction:
    """An estimate of the wide hidden states h from the narrow ones h' [d] at a place: h = lift h' + offset."""

    lift: Tensor  # [D, d]
    offset: Tensor  # [D]
    mean: Tensor  # [d], of h'
    covariance: Tensor  # [d, d], of h'

    @classmethod
    def fit(cls, narrow: Sequence[Tensor], wide: Sequence[Tensor], axes: Tensor) -> "Reconstruction":
        """Return the ridge regression that starts from A, of states [N, d] and [N, D] for each batch."""
        joint = Moments()
        for x, y in zip(narrow, wide, strict=True):
            joint.add(torch.cat([x, y], dim=1))
        width = axes.shape[1]
        narrow_mean, wide_mean = joint.mean.split([width, len(axes)])
        covariance, cross = joint.covariance[:width, :width], joint.covariance[width:, :width]
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(width, dtype=axes.dtype)
        lift = axes + torch.linalg.solve(covariance + ridge, (cross - axes @ covariance).T).T
        return cls(lift, wide_mean - lift @ narrow_mean, narrow_mean, covariance)

    def compose(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the map that reads h' as the linear one reads h."""
        weight, bias = weight_and_bias(linear)
        return weight @ self.lift, bias + weight @ self.offset
