"""Low rank: linear maps and word embeddings as products of two smaller matrices.

Without a sample, the smallest singular values of the weight W are dropped: no product of this rank is nearer to W
(Eckart and Young, 1936; LadaBERT, Mao et al., 2020, section 3.2). With a sample, those of W R are dropped, where
R Rᵀ = S is the second moment of the inputs x: no product of this rank makes E|W x - B A x|² smaller (DRONE, Chen et
al., 2021; the Cholesky factor as R: SVD-LLM, Wang et al., 2024). Embeddings are a linear map of words, each a
coordinate, so that S is diagonal: how often a word occurs.

DAMPING times the mean of the diagonal of S is added to it, so that directions which the sample does not show are
weighed as without one. This costs nothing: the product is the best by both together, and the one without a sample the
nearest to W, so on the sample itself it cannot be the worse of the two.

O rows and I columns of a weight, V words, D width.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lad_dist.compression.base import CompressionContext
from lad_dist.compression.compressed_module import MERGED, CompressedModule, as_plain, compressed_modules
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.models import activations
from lad_dist.models.loading import PreTrainedModel

DAMPING = 1e-3  # of the mean of the second moments' diagonal


class LowRankModule(CompressedModule):
    """x -> B (A x) + b.

    The singular values are shared evenly between A and B, so that both learn at one pace.
    """

    def __init__(self, inner: nn.Linear | nn.Embedding, outer: nn.Linear):
        super().__init__()
        self.inner = inner  # A
        self.outer = outer  # B and b

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def _merged_factors(self) -> tuple[Any, Any]:
        """Return A and B, without the masks or the rounding of other compressions."""
        return as_plain(self.inner, MERGED), as_plain(self.outer, MERGED)

    def to_compact(self) -> nn.Module | None:
        """Return the pair, where it has fewer weights than its product."""
        inner, outer = self.inner.weight, self.outer.weight
        size_of_product = (inner.numel() // outer.shape[1]) * len(outer)
        if inner.numel() + outer.numel() < size_of_product:
            return nn.Sequential(self.inner, self.outer)
        return self.merge()


class LowRankLinear(LowRankModule):
    """The product in a linear map's place: A [rank, I], B [O, rank]."""

    @classmethod
    def from_module(cls, linear: nn.Linear, rank: int, second_moment: Tensor | None = None) -> tuple[Self, Tensor]:
        """Return the nearest product and its relative error. `second_moment` [I, I] is that of the map's inputs."""
        a, b, error = factors(linear.weight, rank, second_moment)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(copy_linear(a, None), copy_linear(b, bias)), error

    def merge(self) -> nn.Module:
        inner, outer = self._merged_factors()
        bias = None if outer.bias is None else outer.bias.detach()
        return copy_linear(_product(outer, inner.weight), bias)


class LowRankEmbedding(LowRankModule):
    """The product in the word embeddings' place: A [V, rank], whose rows are looked up, B [D, rank]."""

    inner: nn.Embedding

    @classmethod
    def from_module(
        cls, embedding: nn.Embedding, rank: int, second_moment: Tensor | None = None
    ) -> tuple[Self, Tensor]:
        """Return the nearest product and its relative error. `second_moment` [V] is how often each word occurs."""
        a, b, error = factors(embedding.weight.T, rank, second_moment)
        return cls(copy_embedding(a.T, embedding.padding_idx), copy_linear(b, None)), error

    def merge(self) -> nn.Module:
        inner, outer = self._merged_factors()
        return copy_embedding(_product(outer, inner.weight.T).T, inner.padding_idx)


def _product(outer: nn.Linear, inner: Tensor) -> Tensor:
    """Return B A in the factors' precision, multiplied in fp32."""
    return (outer.weight.detach().float() @ inner.detach().float()).to(inner.dtype)


def copy_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear map with copies of these."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def copy_embedding(weight: Tensor, padding: int | None) -> nn.Embedding:
    """Return an embedding with a copy of the weight."""
    num_words, width = weight.shape
    embedding = nn.Embedding(num_words, width, padding_idx=padding, device=weight.device, dtype=weight.dtype)
    embedding.weight.data.copy_(weight)
    return embedding


def factors(weight: Tensor, rank: int, second_moment: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return A [rank, I] and B [O, rank] of the product nearest to the weight [O, I], in its precision, and the error.

    The error is the distance relative to the weight's norm. With `second_moment` [I, I], or [I] of its diagonal,
    distance and norm are those of the weight's outputs.
    """
    exact, root = weight.detach().double(), None if second_moment is None else _damped_root(second_moment)
    left, values, right = _svd(_weighted_by(exact, root))
    error = values[rank:].norm() / values.norm().clamp(min=torch.finfo(values.dtype).tiny)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    if root is not None:  # B A = U Uᵀ W, whose singular values these are not yet
        rotation, values, right = _svd(left.T @ exact)
        left = left @ rotation
    root_values = values.sqrt()
    return (root_values[:, None] * right).to(weight.dtype), (left * root_values).to(weight.dtype), error


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, the singular values and Vᵀ."""
    is_wide = matrix.shape[0] < matrix.shape[1]  # a tall matrix takes half the time of a wide one
    left, values, right = torch.linalg.svd(matrix.T if is_wide else matrix, full_matrices=False)
    return (right.T, values, left.T) if is_wide else (left, values, right)


def _damped_root(second_moment: Tensor) -> Tensor:
    """Return R with R Rᵀ = S, damped."""
    second_moment = second_moment.double()
    if second_moment.dim() == 1:
        return (second_moment + DAMPING * second_moment.mean()).sqrt()
    identity = torch.eye(len(second_moment)).to(second_moment)
    return torch.linalg.cholesky(second_moment + DAMPING * second_moment.diagonal().mean() * identity)


def _weighted_by(weight: Tensor, root: Tensor | None) -> Tensor:
    if root is None:
        return weight
    return weight * root if root.dim() == 1 else weight @ root


def second_moments(
    model: PreTrainedModel, modules: Mapping[str, nn.Linear | nn.Embedding], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return the second moments of what each module reads on the sample, up to a factor.

    For linear maps these are sums of x xᵀ [I, I]; for words [V] how often they occur and once more, as there are many
    that a sample does not have.
    """
    maps = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    moments = {name: module.weight.new_zeros(module.in_features, module.in_features) for name, module in maps.items()}
    totals, training = list(moments.values()), model.training
    model.eval()
    for batch in batches:

        def add_products(number: int, x: Tensor, _: Tensor, batch: Batch = batch) -> None:
            x = activations.token_rows(x, batch).to(totals[number].dtype)
            totals[number] += x.T @ x

        with activations.capture(list(maps.values()), add_products):
            activations.compute_logits(model, batch)
    model.train(training)
    words = torch.cat([activations.real_tokens(batch.input_ids, batch) for batch in batches])
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            moments[name] = (1.0 + torch.bincount(words, minlength=module.num_embeddings)).to(module.weight.device)
    return moments


def word_embeddings_of(model: PreTrainedModel, where: str) -> tuple[str, nn.Embedding]:
    """Return the name of the word embeddings, and these.

    Raise UserError where another module reads their weight, as MLM heads do, or they are a product already.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"{where}: the word embeddings are of low rank already; list it once")
    users = [module for module in model.modules() if getattr(module, "weight", None) is embedding.weight]
    if len(users) > 1:
        raise UserError(
            f"{where}: the MLM head reads the word embeddings, which cannot be a product then; leave embeddings at 1, "
            "or compress them on a task"
        )
    return next(name for name, module in model.named_modules() if module is embedding), embedding


def rank_of_share(matrix: Tensor, share: float) -> float:
    """Return the rank, not yet rounded, of the product that has this share of the matrix's weights."""
    rows, columns = matrix.shape
    return share * rows * columns / (rows + columns)


def linear_maps(model: PreTrainedModel, modules: str, where: str) -> dict[str, nn.Linear]:
    """Return linear maps by name, without those of products. Raise UserError where no name matches."""
    products = [module for module in compressed_modules(model) if isinstance(module, LowRankModule)]
    inside_products = {module for product in products for module in product.modules()}
    maps = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside_products and re.search(modules, name)
    }
    if not maps:
        raise UserError(f"{where}: no linear map's name matches {modules!r}")
    return maps


def insert_products(
    model: PreTrainedModel, ranks: Mapping[str, int], context: CompressionContext, activation_aware: bool
) -> None:
    """Replace linear maps and embeddings, by name, with products of these ranks, in place, and report their errors.

    An error is relative to the norm of the weight, or to that of its outputs on the calibration batches where the
    products are aware of activations. On the meta device there are no errors.
    """
    has_numbers = model.device.type != "meta"
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in ranks}
    batches = context.calibration_batches() if activation_aware and has_numbers else ()
    moments = second_moments(model, modules, batches) if batches else {}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, module in modules.items():
        kind = LowRankEmbedding if isinstance(module, nn.Embedding) else LowRankLinear
        product, error = kind.from_module(module, ranks[name], moments.pop(name, None))
        model.set_submodule(name, product)
        if has_numbers:
            context.report({f"initial_error/low_rank/{name.removeprefix(prefix)}": error.item()})
