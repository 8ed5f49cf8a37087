"""The budget of LadaBERT: how small a model becomes by low rank and pruning (Mao et al., 2020, equation 7).

    count(model, maps)      a model's weights, by what can become of them
    solve(…)                the factor that is not given
    sparsity(…)             how much has to be pruned, once the ranks are known
    told(…)                 what was asked for and what is achieved

    weights / reduction = words / embedding + maps / (svd · weight) + rest

All factors say how many times fewer weights there are, as the paper's Table 2 does. Words are the word embeddings, maps
the encoder's linear maps; the rest (positions, segments, biases, norms, pooler and head) stays as it is.

Ranks are whole numbers, so a budget cannot be met by ranks alone. They are rounded up, and pruning takes what is too
much, unless that is less than TOLERANCE of the budget.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from torch import nn

from lad_dist.compression.low_rank import insert_products, linear_maps, rank_of_share, word_embeddings_of
from lad_dist.compression.options import (
    LAYER_MODULES,
    ActivationAware,
    Begin,
    CalibrationBatches,
    End,
    Modules,
    ReportValues,
    UpdateEvery,
    no_calibration_batches,
    silent,
)
from lad_dist.compression.pruning.criteria import Magnitude
from lad_dist.compression.pruning.module import insert_masks
from lad_dist.compression.pruning.prune import check_pruning
from lad_dist.compression.pruning.schedule import Pattern, Schedule
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Head
from lad_dist.models.dims import count_parameters
from lad_dist.models.loading import PreTrainedModel

TOLERANCE = 0.005  # of the weights asked for


class WeightCounts(NamedTuple):
    words: int
    maps: int
    rest: int

    @property
    def total(self) -> int:
        return sum(self)


class Factors(NamedTuple):
    embedding: float
    svd: float
    weight: float


def count_weights(model: PreTrainedModel, maps: Iterable[str]) -> WeightCounts:
    """`maps`: the names of those that weights are taken from, by low rank or by pruning."""
    chosen = {model.get_submodule(name).get_parameter("weight") for name in maps}
    words, linear = count_parameters(model.get_input_embeddings()), sum(weight.numel() for weight in chosen)
    return WeightCounts(words, linear, count_parameters(model) - words - linear)


def solve_factors(
    counts: WeightCounts, reduction: float | None, embedding: float | None, svd: float | None, weight: float | None
) -> Factors:
    """All three factors. Raises UserError where not exactly one of the four is missing, or none of the missing one's
    values gives the reduction."""
    given = {"embedding": embedding, "svd": svd, "weight": weight}
    missing = [name for name, factor in given.items() if factor is None]
    if len(missing) != (reduction is not None):
        raise UserError("surgery ladabert: give reduction and two of embedding, svd and weight, or these three alone")
    if reduction is None or not missing:
        return Factors(**given)  # type: ignore[arg-type]
    known = Factors(*(factor or 1.0 for factor in given.values()))
    free = counts.words / known.embedding if embedding is None else counts.maps / (known.svd * known.weight)
    fixed = remaining_weights(counts, known) - free
    left = counts.total / reduction - fixed
    if not 0 < left <= free:
        most = (
            f"more than {counts.total / fixed:.3g}" if left <= 0 else f"less than {counts.total / (fixed + free):.3g}"
        )
        others = " and ".join(f"{name} = {factor:g}" for name, factor in given.items() if factor is not None)
        raise UserError(
            f"surgery ladabert: reduction = {reduction:g}, but with {others} no {missing[0]} can make it {most}"
        )
    return known._replace(**{missing[0]: free / left})


def remaining_weights(counts: WeightCounts, factors: Factors) -> float:
    """That are left of a model."""
    return counts.words / factors.embedding + counts.maps / (factors.svd * factors.weight) + counts.rest


def required_sparsity(counts: WeightCounts, asked: float | None, weight: float | None) -> float:
    """The share of a model's maps, products by now, that has to go for `asked` weights to stay; that of the factor
    `weight` where no number is asked for, or it comes near enough. Raises UserError where that is more than all."""
    given = None if weight is None else 1 - 1 / weight
    if asked is None:
        assert given is not None
        return given
    if given is not None and abs(counts.total - given * counts.maps - asked) <= TOLERANCE * asked:
        return given
    share = (counts.total - asked) / counts.maps
    if not 0 <= share < 1:
        raise UserError(
            f"surgery ladabert: {round(asked)} weights cannot be met: the model is too small for such ranks"
        )
    return share


def summary(
    before: WeightCounts, after: WeightCounts, factors: Factors, reduction: float | None, sparsity: float
) -> dict[str, float]:
    """Factors as asked for or solved, and as achieved, of a model before and after its ranks were cut; `sparsity` of
    its maps goes."""
    stays = after.maps - round(sparsity * after.maps)
    achieved = {
        "reduction": before.total / (after.total - after.maps + stays),
        "embedding": before.words / after.words,
        "svd": before.maps / after.maps,
        "weight": after.maps / stays,
    }
    asked = {"reduction": reduction or before.total / remaining_weights(before, factors), **factors._asdict()}
    return {f"budget/requested/{name}": factor for name, factor in asked.items()} | {
        f"budget/achieved/{name}": factor for name, factor in achieved.items()
    }


Factor = Annotated[float, Field(ge=1)] | None


def ladabert(
    model: PreTrainedModel,
    sample: CalibrationBatches = no_calibration_batches,
    report: ReportValues = silent,
    *,
    reduction: Annotated[
        Factor, Field(description="times fewer weights of the whole model; with it one of the next three is not given")
    ] = None,
    embedding: Annotated[Factor, Field(description="times fewer weights of the word embeddings, by low rank")] = None,
    svd: Annotated[Factor, Field(description="times fewer weights of the encoder's linear maps, by low rank")] = None,
    weight: Annotated[Factor, Field(description="times fewer of what is left of them, by pruning")] = None,
    activation_aware: ActivationAware = False,
    modules: Modules = LAYER_MODULES,
    begin: Begin = 0.0,
    end: End = 0.5,
    update_every: UpdateEvery = 20,
) -> PreTrainedModel:
    """LadaBERT (Mao et al., 2020): word embeddings and linear maps of low rank, then the two factors of each map pruned
    by magnitude, step by step while the student trains; see budget.py for how the factors go together. Raises UserError
    for factors that do not."""
    where = "surgery ladabert"
    maps = linear_maps(model, modules, where)
    counts = count_weights(model, maps)
    factors = solve_factors(counts, reduction, embedding, svd, weight)
    ranks = {name: _rank_up(linear, factors.svd) for name, linear in maps.items() if factors.svd > 1}
    if factors.embedding > 1:
        name, words = word_embeddings_of(model, where)
        ranks[name] = _rank_up(words, factors.embedding)
    insert_products(model, ranks, sample if activation_aware else None, report)
    thin = [f"{name}.{side}" for name in maps if name in ranks for side in ("inner", "outer")]
    left = [*thin, *(name for name in maps if name not in ranks)]
    after = count_weights(model, left)
    sparsity = required_sparsity(after, reduction and counts.total / reduction, weight)
    if sparsity:
        schedule = Schedule(sparsity, begin=begin, end=end, update_every=update_every)
        insert_masks(model, left, Magnitude, schedule, Pattern(), recover=True)
    if model.device.type != "meta":
        report(summary(counts, after, factors, reduction, sparsity))
    return model


def _rank_up(module: nn.Linear | nn.Embedding, factor: float) -> int:
    return math.ceil(rank_of_share(module.weight, 1 / factor))


def check_ladabert(
    config: TrainConfig, head: Head, labels: Sequence[str], *, begin: float, end: float, **_: Any
) -> None:
    """Whether the surgery goes with the rest of the config. Raises UserError."""
    check_pruning("surgery ladabert", config, begin, end)
