"""Cuts: the weights of a narrow model, from those of the wide one and statistics of its inputs.

D old width, d new width, E old size of a head, F intermediate units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lad_dist.compression.width_pruning.modules import Layer, ModuleMap, assign, weight_and_bias
from lad_dist.compression.width_pruning.statistics import RIDGE, Reconstruction, Statistics, UnitMoments

FLOOR = 1e-10  # of the largest eigenvalue: less than that is rounding


def cut_embeddings(wide: ModuleMap, narrow: ModuleMap, axes: Tensor) -> None:
    """Project the embeddings; where a map follows them, project its outputs instead."""
    if wide.projection is not None:
        assert narrow.projection is not None
        narrow.embeddings.load_state_dict(wide.embeddings.state_dict())
        weight, bias = weight_and_bias(wide.projection)
        assign(narrow.projection, axes.T @ weight, axes.T @ bias)
        return
    for wide_module, narrow_module in zip(wide.embeddings.modules(), narrow.embeddings.modules(), strict=True):
        if isinstance(wide_module, nn.Embedding):
            narrow_module.weight.copy_(wide_module.weight.double().cpu() @ axes)


def cut_attention(
    wide: Layer, narrow: Layer, axes: Tensor, inputs: Reconstruction, num_heads: int, num_narrow_heads: int
) -> None:
    """Set the narrow layer's attention: its heads are those whose output varies most, each cut to its new size."""
    covariance, mean = inputs.covariance, inputs.mean
    size = axes.shape[1] // num_narrow_heads
    maps = [_by_heads(inputs.compose(wide[role]), num_heads) for role in ("query", "key", "value")]
    weight, bias = weight_and_bias(wide["attention_output"])
    bias = axes.T @ bias
    outs = (axes.T @ weight).unflatten(1, (num_heads, -1)).unbind(1)
    heads = list(zip(*maps, outs, strict=True))
    spread = [(out @ _root(value.covariance(covariance))[0]).square().sum().item() for _, _, value, out in heads]
    numbers = sorted(sorted(range(num_heads), key=lambda n: -spread[n])[:num_narrow_heads])
    narrow_heads: list[tuple[HeadMap, HeadMap, HeadMap, Tensor]] = []
    for number, (query, key, value, out) in enumerate(heads):
        lost_mean = out @ value(mean)
        if number in numbers:
            query, key = cut_scores(query, key, covariance, mean, size)
            value, out = cut_values(value, out, covariance, size)
            narrow_heads.append((query, key, value, out))
            lost_mean = lost_mean - out @ value(mean)
        bias = bias + lost_mean  # attention's shares sum to one, so what is lost of the mean is lost at every token
    for role, place in (("query", 0), ("key", 1), ("value", 2)):
        role_maps = [head[place] for head in narrow_heads]
        assign(narrow[role], torch.cat([x.weight for x in role_maps]), torch.cat([x.bias for x in role_maps]))  # type: ignore[union-attr]
    assign(narrow["attention_output"], torch.cat([head[3] for head in narrow_heads], dim=1), bias)


@dataclass
class HeadMap:
    """The map to one head's q, k or v: weight [E, d], bias [E]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.bias

    def covariance(self, covariance: Tensor) -> Tensor:
        """Return the covariance [E, E] of the outputs, from that of the inputs."""
        return self.weight @ covariance @ self.weight.T

    def then(self, matrix: Tensor) -> "HeadMap":
        """Return the map followed by a matrix."""
        return HeadMap(matrix @ self.weight, matrix @ self.bias)


def _by_heads(linear: tuple[Tensor, Tensor], num_heads: int) -> list[HeadMap]:
    weights, biases = (x.unflatten(0, (num_heads, -1)) for x in linear)
    return [HeadMap(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with R Rᵀ = covariance [E, E], and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    nonzero = values > FLOOR * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    root = values.clamp(min=0.0).sqrt()
    return vectors * root, torch.where(nonzero, 1 / root, 0.0)[:, None] * vectors.T


def cut_scores(query: HeadMap, key: HeadMap, covariance: Tensor, mean: Tensor, size: int) -> tuple[HeadMap, HeadMap]:
    """Return maps cut to the largest singular values of the scores q kᵀ of any two tokens.

    What all keys share is the same for all scores of a query, and does not change their softmax.
    """
    old_size = len(query.weight)
    if size == old_size:
        return query, key
    mean_query = query(mean)
    (query_root, query_inverse), (key_root, key_inverse) = (
        _root(query.covariance(covariance) + torch.outer(mean_query, mean_query)),
        _root(key.covariance(covariance)),
    )
    left, values, right = torch.linalg.svd(query_root.T @ key_root)
    half = values[:size].sqrt()[:, None]
    rescaled = (size / old_size) ** 0.5  # attention divides by the root of the new size
    return query.then(rescaled * half * (left[:, :size].T @ query_inverse)), key.then(
        half * (right[:size] @ key_inverse)
    )


def cut_values(value: HeadMap, out: Tensor, covariance: Tensor, size: int) -> tuple[HeadMap, Tensor]:
    """Return maps cut to the largest singular values of what the head's values add to the stream: out [d, E]."""
    if size == len(value.weight):
        return value, out
    root, inverse = _root(value.covariance(covariance))
    left, values, right = torch.linalg.svd(out @ root, full_matrices=False)
    half = values[:size].sqrt()
    return value.then(half[:, None] * (right[:size] @ inverse)), left[:, :size] * half


def cut_feed_forward(wide: Layer, narrow: Layer, axes: Tensor, inputs: Reconstruction, units: UnitMoments) -> None:
    """Set the narrow layer's feed-forward block: the units whose output varies most, the means of the others a bias."""
    weight, bias = inputs.compose(wide["intermediate"])
    out, out_bias = (axes.T @ x for x in weight_and_bias(wide["output"]))
    numbers = _numbers_of_largest(units.variance * out.square().sum(dim=0), len(narrow["intermediate"].weight))
    dropped = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, numbers, False)
    assign(narrow["intermediate"], weight[numbers], bias[numbers])
    assign(narrow["output"], out[:, numbers], out_bias + out[:, dropped] @ units.mean[dropped])


def _numbers_of_largest(importance: Tensor, count: int) -> Tensor:
    """Return the numbers of the `count` largest, rising."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def cut_head(wide: ModuleMap, narrow: ModuleMap, axes: Tensor, inputs: Reconstruction, statistics: Statistics) -> None:
    """Set what reads the last hidden states.

    After its dense layer, where it has one, come units (a classifier's) or states in the space of the embeddings (a
    masked language model's).
    """
    equally_large = {name: x for name, x in wide.outside.items() if x.shape == narrow.outside[name].shape}
    for name, wide_weight in equally_large.items():
        narrow.outside[name].copy_(wide_weight)
    if not wide.head:
        return
    weight, bias = inputs.compose(wide.head[0])
    unit_axes = head_axes(wide, narrow, axes, statistics)
    if unit_axes is None:
        assign(narrow.head[0], weight, bias)
        return
    assign(narrow.head[0], unit_axes.T @ weight, unit_axes.T @ bias)
    units = statistics.head_units
    for wide_map, narrow_map in zip(wide.head[1:], narrow.head[1:], strict=True):
        lift = _lift(units.covariance, unit_axes)
        weight, bias = weight_and_bias(wide_map)
        assign(narrow_map, weight @ lift, bias + weight @ (units.mean - lift @ (unit_axes.T @ units.mean)))
    if wide.is_tied and narrow.decoder_bias is not None:
        lost_mean = units.mean - axes @ (axes.T @ units.mean)
        narrow.decoder_bias.add_((wide.word_embeddings @ lost_mean).to(narrow.decoder_bias))


def head_axes(wide: ModuleMap, narrow: ModuleMap, axes: Tensor, statistics: Statistics) -> Tensor | None:
    """Return [D, d] from the outputs of the head's dense layer to the narrow one's; None where these are as many."""
    if len(wide.head[0].weight) == len(narrow.head[0].weight):
        return None
    if wide.is_tied or len(wide.head) == 1:
        return axes
    weight, _ = weight_and_bias(wide.head[1])
    importance = statistics.head_units.covariance.diagonal() * weight.square().sum(dim=0)
    return torch.eye(len(axes), dtype=axes.dtype)[:, _numbers_of_largest(importance, axes.shape[1])]


def _lift(covariance: Tensor, unit_axes: Tensor) -> Tensor:
    """Return [D, d]: from the units that remain, what all of them are likely to be."""
    remaining = unit_axes.T @ covariance @ unit_axes
    ridge = RIDGE * remaining.diagonal().mean() * torch.eye(len(remaining), dtype=remaining.dtype)
    return torch.linalg.solve(remaining + ridge, unit_axes.T @ covariance).T
