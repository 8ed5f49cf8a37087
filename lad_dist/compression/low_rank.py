"""Low rank: linear maps and word embeddings as products of two thin matrices.

    LowRank            the Part in a linear map's place
    LowRankEmbedding   the Part in the word embeddings' place
    factors(…)         the product that is nearest to a weight, and how far it is
    second_moments(…)  what a weight reads on a sample of the data, for errors to be weighed by
    put(…)             puts the Parts in
    words_of(model)    the word embeddings, refused where an MLM head reads them too
    rank(…)            for a share of a matrix's weights

Without a sample, what is dropped are the smallest singular values of the weight W: no product of this rank is nearer to
it (Eckart and Young, 1936; LadaBERT, Mao et al., 2020, section 3.2). With one it is those of W R, where R Rᵀ = S is the
second moment of the inputs x: no product of this rank makes E|W x - B A x|² smaller (DRONE, Chen et al., 2021; the
Cholesky factor as R: SVD-LLM, Wang et al., 2024). Embeddings are a linear map of words, each a coordinate, so that S is
diagonal: how often a word occurs. S gets DAMPING times the mean of its diagonal on it, so that directions which the
sample does not show are weighed as without one. That costs nothing: the product is the best by both together, and the
one without a sample the nearest to W, so on the sample itself it cannot be the worse of the two.

O rows and I columns of a weight, V words, D width.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from lad_dist.compression import compressed_module
from lad_dist.compression.compressed_module import CompressedModule
from lad_dist.compression.options import (
    LAYER_MODULES,
    ActivationAware,
    CalibrationBatches,
    Modules,
    ReportValues,
    no_calibration_batches,
    silent,
)
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.models import activations
from lad_dist.models.loading import PreTrainedModel

DAMPING = 1e-3  # of the mean of the second moments' diagonal


class LowRank(CompressedModule):
    """x -> B (A x) + b with A [rank, I], B [O, rank]. The singular values are shared evenly between A and B, so that
    both learn at one pace."""

    def __init__(self, inner: nn.Linear, outer: nn.Linear):
        super().__init__()
        self.inner = inner
        self.outer = outer

    @classmethod
    def of(cls, linear: nn.Linear, rank: int, moment: Tensor | None = None) -> tuple[Self, Tensor]:
        """And the relative error. `moment` [I, I]: of its inputs."""
        a, b, error = factors(linear.weight, rank, moment)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(_linear(a, None), _linear(b, bias)), error

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def merge(self) -> nn.Module:
        bias = None if self.outer.bias is None else self.outer.bias.detach()
        return _linear(_product(self.outer, self.inner.weight), bias)

    def to_compact(self) -> nn.Module:
        """The pair, where it has fewer weights than its product."""
        rows, columns, rank = self.outer.out_features, self.inner.in_features, self.inner.out_features
        return nn.Sequential(self.inner, self.outer) if rank * (rows + columns) < rows * columns else self.merge()


class LowRankEmbedding(CompressedModule):
    """word v -> B A_v with A [V, rank], B [D, rank]."""

    def __init__(self, inner: nn.Embedding, outer: nn.Linear):
        super().__init__()
        self.inner = inner
        self.outer = outer

    @classmethod
    def of(cls, words: nn.Embedding, rank: int, moment: Tensor | None = None) -> tuple[Self, Tensor]:
        """And the relative error. `moment` [V]: how often each word occurs."""
        a, b, error = factors(words.weight.T, rank, moment)
        return cls(_embedding(a.T, words.padding_idx), _linear(b, None)), error

    def forward(self, words: Tensor) -> Tensor:
        return self.outer(self.inner(words))

    def merge(self) -> nn.Module:
        return _embedding(_product(self.outer, self.inner.weight.T).T, self.inner.padding_idx)

    def to_compact(self) -> nn.Module:
        """The pair, where it has fewer weights than its product."""
        words, rank, width = *self.inner.weight.shape, self.outer.out_features
        return nn.Sequential(self.inner, self.outer) if rank * (words + width) < words * width else self.merge()


def _product(outer: nn.Linear, inner: Tensor) -> Tensor:
    """B A in their precision, multiplied in fp32."""
    return (outer.weight.detach().float() @ inner.detach().float()).to(inner.dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With copies of these."""
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def _embedding(weight: Tensor, padding: int | None) -> nn.Embedding:
    words, width = weight.shape
    made = nn.Embedding(words, width, padding_idx=padding, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def factors(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A [rank, I] and B [O, rank] of the product nearest to the weight [O, I], in its precision, and its distance
    relative to the weight's norm. `moment` [I, I], or [I] of its diagonal, makes both those of its outputs."""
    wanted, root = weight.detach().double(), None if moment is None else _root(moment)
    left, values, right = _svd(_weighted_by(wanted, root))
    error = values[rank:].norm() / values.norm().clamp(min=torch.finfo(values.dtype).tiny)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    if root is not None:  # B A = U Uᵀ W, whose singular values these are not yet
        inside, values, right = _svd(left.T @ wanted)
        left = left @ inside
    share = values.sqrt()
    return (share[:, None] * right).to(weight.dtype), (left * share).to(weight.dtype), error


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and Vᵀ. Of a tall matrix they take half the time of a wide one's."""
    wide = matrix.shape[0] < matrix.shape[1]
    left, values, right = torch.linalg.svd(matrix.T if wide else matrix, full_matrices=False)
    return (right.T, values, left.T) if wide else (left, values, right)


def _root(moment: Tensor) -> Tensor:
    """R with R Rᵀ = S, damped."""
    moment = moment.double()
    if moment.dim() == 1:
        return (moment + DAMPING * moment.mean()).sqrt()
    return torch.linalg.cholesky(moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).to(moment))


def _weighted_by(weight: Tensor, root: Tensor | None) -> Tensor:
    if root is None:
        return weight
    return weight * root if root.dim() == 1 else weight @ root


def second_moments(
    model: PreTrainedModel, modules: Mapping[str, nn.Linear | nn.Embedding], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Of what each reads on the sample, up to a factor: sums of x xᵀ [I, I] for linear maps; for words [V] how often
    they occur and once more, as there are many that a sample does not have."""
    maps = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    found = {name: module.weight.new_zeros(module.in_features, module.in_features) for name, module in maps.items()}
    names, training = list(maps), model.training
    model.eval()
    for batch in batches:
        with activations.capture(
            list(maps.values()),
            lambda n, x, _: _add(found[names[n]], activations.token_rows(x, batch)),  # noqa: B023
        ):
            activations.run_logits(model, batch)
    model.train(training)
    counted = {name: _counts(module, batches) for name, module in modules.items() if isinstance(module, nn.Embedding)}
    return found | counted


def _add(total: Tensor, x: Tensor) -> None:
    x = x.to(total.dtype)
    total += x.T @ x


def _counts(words: nn.Embedding, batches: Sequence[Batch]) -> Tensor:
    total = torch.ones(words.num_embeddings)
    for batch in batches:
        total += torch.bincount(activations.real_tokens(batch.input_ids, batch), minlength=words.num_embeddings)
    return total.to(words.weight.device)


def replace_with_products(
    model: PreTrainedModel, ranks: Mapping[str, int], batches: Sequence[Batch] = ()
) -> dict[str, float]:
    """Replaces linear maps and embeddings, by name, with Parts of these ranks, in place, and says how far each is from
    what it replaced: relative to its weight's norm; with batches, the same on every process, to that of its outputs on
    them. On the meta device it has nothing to say."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in ranks}
    moments = second_moments(model, modules, batches) if batches else {}
    errors = {}
    for name, module in modules.items():
        kind = LowRankEmbedding if isinstance(module, nn.Embedding) else LowRank
        part, error = kind.of(module, ranks[name], moments.pop(name, None))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part)
        if not error.is_meta:
            errors[name] = error.item()
    return errors


def word_embeddings_of(model: PreTrainedModel, where: str) -> tuple[str, nn.Embedding]:
    """The word embeddings and their name. Raises UserError where another module reads their weight, as MLM heads do, or
    they are a product already."""
    words = model.get_input_embeddings()
    if not isinstance(words, nn.Embedding):
        raise UserError(f"{where}: the word embeddings are of low rank already; list it once")
    others = [module for module in model.modules() if getattr(module, "weight", None) is words.weight]
    if len(others) > 1:
        raise UserError(
            f"{where}: the MLM head reads the word embeddings, which cannot be a product then; leave embeddings at 1, "
            "or compress them on a task"
        )
    return next(name for name, module in model.named_modules() if module is words), words


def rank_of_share(matrix: Tensor, share: float) -> float:
    """Of the product of two that has this share of the matrix's weights; it has yet to be rounded."""
    rows, columns = matrix.shape
    return share * rows * columns / (rows + columns)


def low_rank(
    model: PreTrainedModel,
    sample: CalibrationBatches = no_calibration_batches,
    report: ReportValues = silent,
    *,
    keep: Annotated[
        float, Field(gt=0, le=1, description="share of the linear maps' weights that stays; 1: they stay as they are")
    ],
    embeddings: Annotated[
        float, Field(gt=0, le=1, description="share of the word embeddings' weights that stays; 1: they stay too")
    ] = 1.0,
    activation_aware: ActivationAware = False,
    modules: Modules = LAYER_MODULES,
) -> PreTrainedModel:
    """Replaces linear maps and word embeddings by products of two thin matrices, of rank keep · rows · columns /
    (rows + columns): see low_rank.py. Raises UserError where nothing matches, or an MLM head reads the embeddings."""
    where = "surgery low_rank"
    chosen: dict[str, tuple[nn.Linear | nn.Embedding, float]] = {}
    if keep < 1:
        chosen |= {name: (linear, keep) for name, linear in linear_maps(model, modules, where).items()}
    if embeddings < 1:
        name, words = word_embeddings_of(model, where)
        chosen[name] = words, embeddings
    if not chosen:
        raise UserError(f"{where}: keep and embeddings are 1, which leaves all as it is; set one of them below 1")
    ranks = {name: max(1, int(rank_of_share(module.weight, share))) for name, (module, share) in chosen.items()}
    insert_products(model, ranks, sample if activation_aware else None, report)
    return model


def linear_maps(model: PreTrainedModel, modules: str, where: str) -> dict[str, nn.Linear]:
    """Linear maps by name, but for those of products. Raises UserError where none matches."""
    products = [
        part for part in compressed_module.compressed_modules(model) if isinstance(part, LowRank | LowRankEmbedding)
    ]
    inside = {module for part in products for module in part.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and re.search(modules, name)
    }
    if not found:
        raise UserError(f"{where}: no linear map's name matches {modules!r}")
    return found


def insert_products(
    model: PreTrainedModel, ranks: Mapping[str, int], sample: CalibrationBatches | None, tell: ReportValues
) -> None:
    numbers = model.device.type != "meta"
    errors = replace_with_products(model, ranks, sample() if sample and numbers else ())
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    tell({f"initial_error/low_rank/{name.removeprefix(prefix)}": error for name, error in errors.items()})
