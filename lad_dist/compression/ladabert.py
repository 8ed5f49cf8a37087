"""LadaBERT: a budget of weights, met by low rank and pruning together (Mao et al., 2020, equation 7).

    count_weights(model, maps)   a model's weights, by what can become of them
    solve_factors(…)             the factor that is missing
    required_sparsity(…)         the share that has to be pruned, once the ranks are known
    summary(…)                   the requested and the achieved factors
    LadaBERT                     the compression

    weights / reduction = word embeddings / embedding + linear maps / (svd · weight) + rest

All factors say how many times fewer weights there are, as the paper's Table 2 does. The linear maps are the encoder's;
the rest (positions, segments, biases, norms, pooler and head) stays as it is.

Ranks are whole numbers, so ranks alone cannot meet a budget. They are rounded up, and pruning takes what is too much,
unless that is less than TOLERANCE of the budget.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field
from torch import nn

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, RunSettings
from lad_dist.compression.options import LAYER_MODULES, ActivationAware, Begin, End, Modules, UpdateEvery
from lad_dist.compression.products import insert_products, linear_maps, rank_of_share, word_embeddings_of
from lad_dist.compression.pruning.criteria import Magnitude
from lad_dist.compression.pruning.module import insert_masks
from lad_dist.compression.pruning.schedule import Pattern, Schedule, check_span
from lad_dist.config.errors import UserError
from lad_dist.models.dims import count_parameters
from lad_dist.models.loading import PreTrainedModel

TOLERANCE = 0.005  # of the requested number of weights


class WeightCounts(NamedTuple):
    """Numbers of a model's weights, by what can become of them."""

    word_embeddings: int
    linear_maps: int
    rest: int

    @property
    def total(self) -> int:
        return sum(self)


class Factors(NamedTuple):
    """How many times fewer weights: of the word embeddings, of the maps by low rank, of these by pruning."""

    embedding: float
    svd: float
    weight: float


def count_weights(model: PreTrainedModel, maps: Iterable[str]) -> WeightCounts:
    """Count the weights. `maps` are the names of the linear maps that low rank or pruning makes smaller."""
    weights = {model.get_submodule(name).get_parameter("weight") for name in maps}
    embedding_count, map_count = count_parameters(model.get_input_embeddings()), sum(w.numel() for w in weights)
    return WeightCounts(embedding_count, map_count, count_parameters(model) - embedding_count - map_count)


def solve_factors(
    counts: WeightCounts, reduction: float | None, embedding: float | None, svd: float | None, weight: float | None
) -> Factors:
    """Return all three factors, the missing one solved for.

    Raise UserError where not exactly one of the four is missing, or no value of it gives the reduction.
    """
    options = {"embedding": embedding, "svd": svd, "weight": weight}
    missing = [name for name, factor in options.items() if factor is None]
    if len(missing) != (reduction is not None):
        raise UserError(
            "compression ladabert: give reduction and two of embedding, svd and weight, or these three alone"
        )
    if reduction is None or not missing:
        return Factors(**options)  # type: ignore[arg-type]
    known = Factors(*(factor or 1.0 for factor in options.values()))
    if embedding is None:
        free = counts.word_embeddings / known.embedding
    else:
        free = counts.linear_maps / (known.svd * known.weight)
    fixed = remaining_weights(counts, known) - free
    available = counts.total / reduction - fixed
    if not 0 < available <= free:
        limit = (
            f"more than {counts.total / fixed:.3g}"
            if available <= 0
            else f"less than {counts.total / (fixed + free):.3g}"
        )
        others = " and ".join(f"{name} = {factor:g}" for name, factor in options.items() if factor is not None)
        raise UserError(
            f"compression ladabert: reduction = {reduction:g}, but with {others} no {missing[0]} can make it {limit}"
        )
    return known._replace(**{missing[0]: free / available})


def remaining_weights(counts: WeightCounts, factors: Factors) -> float:
    """Return the number of weights that remain of a model under these factors."""
    remaining_maps = counts.linear_maps / (factors.svd * factors.weight)
    return counts.word_embeddings / factors.embedding + remaining_maps + counts.rest


def required_sparsity(counts: WeightCounts, target: float | None, weight: float | None) -> float:
    """Return the share of a model's maps, products by now, that has to go for `target` weights to stay.

    It is the one of the factor `weight` where there is no target, or where that comes near enough to it. Raise
    UserError where the share is more than all.
    """
    by_factor = None if weight is None else 1 - 1 / weight
    if target is None:
        assert by_factor is not None
        return by_factor
    if by_factor is not None and abs(counts.total - by_factor * counts.linear_maps - target) <= TOLERANCE * target:
        return by_factor
    share = (counts.total - target) / counts.linear_maps
    if not 0 <= share < 1:
        raise UserError(
            f"compression ladabert: {round(target)} weights cannot be met: the model is too small for such ranks"
        )
    return share


def summary(
    before: WeightCounts, after: WeightCounts, factors: Factors, reduction: float | None, sparsity: float
) -> dict[str, float]:
    """Return the factors as requested or solved, and as achieved, by logged name.

    `before` and `after` are the counts around the low rank; `sparsity` of the maps goes afterwards.
    """
    remaining_maps = after.linear_maps - round(sparsity * after.linear_maps)
    achieved = {
        "reduction": before.total / (after.total - after.linear_maps + remaining_maps),
        "embedding": before.word_embeddings / after.word_embeddings,
        "svd": before.linear_maps / after.linear_maps,
        "weight": after.linear_maps / remaining_maps,
    }
    requested = {"reduction": reduction or before.total / remaining_weights(before, factors), **factors._asdict()}
    return {f"budget/requested/{name}": factor for name, factor in requested.items()} | {
        f"budget/achieved/{name}": factor for name, factor in achieved.items()
    }


Factor = Annotated[float, Field(ge=1)] | None


@dataclass(frozen=True, kw_only=True)
class LadaBERT(Compression):
    """Replace word embeddings and linear maps by products, whose factors lose weights while the student trains.

    Pruning is by magnitude (LadaBERT, Mao et al., 2020).
    """

    name = "ladabert"
    inserts = frozenset({"products", "masks"})
    supports_zero3 = False  # the ranking of weights needs all of them on each process

    reduction: Annotated[
        Factor, Field(description="times fewer weights of the whole model; with it one of the next three is not given")
    ] = None
    embedding: Annotated[Factor, Field(description="times fewer weights of the word embeddings, by low rank")] = None
    svd: Annotated[Factor, Field(description="times fewer weights of the encoder's linear maps, by low rank")] = None
    weight: Annotated[Factor, Field(description="times fewer of what is left of them, by pruning")] = None
    activation_aware: ActivationAware = False
    modules: Modules = LAYER_MODULES
    begin: Begin = 0.0
    end: End = 0.5
    update_every: UpdateEvery = 20

    def check(self, spec: RunSettings) -> None:
        """Raise UserError where pruning ends before it begins."""
        check_span(self.name, self.begin, self.end)

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Insert products and masks; raise UserError for factors that do not go together."""
        where = f"compression {self.name}"
        maps = linear_maps(model, self.modules, where)
        counts = count_weights(model, maps)
        factors = solve_factors(counts, self.reduction, self.embedding, self.svd, self.weight)
        ranks = {name: _rank_up(linear, factors.svd) for name, linear in maps.items() if factors.svd > 1}
        if factors.embedding > 1:
            name, word_embeddings = word_embeddings_of(model, where)
            ranks[name] = _rank_up(word_embeddings, factors.embedding)
        insert_products(model, ranks, context, self.activation_aware)
        product_factors = [f"{name}.{side}" for name in maps if name in ranks for side in ("inner", "outer")]
        prunable = [*product_factors, *(name for name in maps if name not in ranks)]
        after = count_weights(model, prunable)
        sparsity = required_sparsity(after, self.reduction and counts.total / self.reduction, self.weight)
        if sparsity:
            schedule = Schedule(sparsity, begin=self.begin, end=self.end, update_every=self.update_every)
            insert_masks(model, prunable, Magnitude, schedule, Pattern(), recover=True)
        if model.device.type != "meta":
            context.report(summary(counts, after, factors, self.reduction, sparsity))
        return model


def _rank_up(module: nn.Linear | nn.Embedding, factor: float) -> int:
    return math.ceil(rank_of_share(module.weight, 1 / factor))
