"""Cuts: the attention heads of a narrow model, from those of the wide one and statistics of their inputs.

D old width, d new width, E old size of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist.compression.width_pruning.modules import Layer, assign, weight_and_bias
from lad_dist.compression.width_pruning.statistics import Reconstruction

FLOOR = 1e-10  # of the largest eigenvalue: less than that is rounding


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
