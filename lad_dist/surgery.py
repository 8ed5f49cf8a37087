"""Surgeries: model -> model. A list of them is applied to the student, in order, before it trains.

    keep_layers        the student's layers, by number; `layer_numbers` turns a rule into numbers
    random_embeddings  embeddings drawn anew
    set_dropout        other dropout while training
    low_rank           linear maps and word embeddings as thin products (low_rank.py)
    ladabert           low rank, then pruning, by one budget (budget.py)
    prune              masks over weights (pruning.py)
    quiet_positions    position and segment embeddings made small beside those of words
    theseus            layers that succeed a predecessor's, step by step (theseus.py)

`SURGERIES` names those that a config may list under `[[surgery]]`; the keyword-only arguments are their schema. Two
positional ones are given to those that name them, by `operate`: `sample` and `tell`.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import nn

from lad_dist import budget, parts, pruning, theseus
from lad_dist import low_rank as lowering
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Batch, Head
from lad_dist.low_rank import LowRank, LowRankEmbedding
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel
from lad_dist.pruning import CRITERIA, Magnitude, Pattern, Schedule

LAYERS = r"(^|\.)(layers?|albert_layer_groups)\."  # names of modules in the encoder's layers

Sample = Callable[[], Sequence[Batch]]
Tell = Callable[[Mapping[str, float]], None]


def no_sample() -> Sequence[Batch]:
    """Of a model that stands alone."""
    raise ValueError("there are no training data to take a sample of")


def silent(values: Mapping[str, float]) -> None:
    """Tells nobody."""


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return text


Modules = Annotated[str, Field(description="regular expression over module names"), AfterValidator(_pattern)]
Weighted = Annotated[
    bool, Field(description="low rank that is nearest on a sample of the training data, not in the weights themselves")
]
Factor = Annotated[float, Field(ge=1)] | None
Begin = Annotated[float, Field(ge=0, le=1, description="share of the training after which weights go")]
End = Annotated[float, Field(ge=0, le=1, description="share of the training after which all have gone")]
Every = Annotated[int, Field(ge=1, description="steps between one tightening and the next")]


def layer_numbers(rule: str | Sequence[int], depth: int | None, available: int) -> list[int]:
    """Numbers from 1 of the layers to keep. "even" takes every (available / depth)-th, ending with the last: 2, 4, 6
    of six. Raises UserError."""
    if not isinstance(rule, str):
        wrong = [n for n in rule if not 1 <= n <= available]
        if wrong:
            raise UserError(f"student.layers: there is no layer {wrong[0]}, the model has layers 1 to {available}")
        return list(rule)
    depth = available if depth is None else depth
    if depth > available:
        raise UserError(f"student.depth = {depth}, but the model it starts from has {available} layers")
    if rule == "first":
        return list(range(1, depth + 1))
    if rule == "last":
        return list(range(available - depth + 1, available + 1))
    return [(m * available) // depth for m in range(1, depth + 1)]


def keep_layers(model: PreTrainedModel, numbers: Sequence[int]) -> PreTrainedModel:
    """The model with only these layers, numbered from 1. Where all layers share their weights (ALBERT), the model runs
    its one layer as many times as there are numbers."""
    model.config.num_hidden_layers = len(numbers)
    if families.family_of(model.config).shared_layers:
        return model
    stack = encoder_layers(model)
    kept = [stack[n - 1] for n in numbers]
    del stack[:]
    stack.extend(kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[n - 1] for n in numbers]
    if hasattr(kept[0], "attn_norm"):
        _norms_before_attention(model, kept)
    return model


def _norms_before_attention(model: PreTrainedModel, kept: Sequence[Any]) -> None:
    """ModernBERT has none in its first layer, which reads the embeddings' norm. Of another layer that comes first, the
    scale goes into the map to q, k and v; the first one that comes later gets a new norm."""
    first, config = kept[0], model.config
    if isinstance(first.attn_norm, nn.LayerNorm):
        before = model.base_model.get_parameter("embeddings.norm.weight")
        first.attn.Wqkv.weight.data *= first.attn_norm.weight.data / before.data.square().mean().sqrt()
        first.attn_norm = nn.Identity()
    for layer in kept[1:]:
        if isinstance(layer.attn_norm, nn.Identity):
            layer.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def random_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """The model with new embeddings: N(0, initializer_range), norms at identity."""
    for module in model.base_model.get_submodule("embeddings").modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=model.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    return model


def set_dropout(model: PreTrainedModel, hidden: float | None, attention: float | None) -> PreTrainedModel:
    """The model with other dropout probabilities, None leaving its own. Its config keeps the old ones, for those who
    train on from the export."""
    for parent in model.modules():
        own = type(parent).__name__.endswith("SelfAttention")
        if attention is not None and isinstance(getattr(parent, "attention_dropout", None), float | int):
            parent.attention_dropout = attention  # type: ignore[assignment]  # ModernBERT's is a number
        for name, child in parent.named_children():
            probability = attention if name == "attention_dropout" or (own and name == "dropout") else hidden
            if probability is not None and isinstance(child, nn.Dropout):
                child.p = probability
            elif hidden and name == "out_drop":
                parent.out_drop = nn.Dropout(hidden)  # ModernBERT leaves it out where there is none
    return model


def low_rank(
    model: PreTrainedModel,
    sample: Sample = no_sample,
    tell: Tell = silent,
    *,
    keep: Annotated[
        float, Field(gt=0, le=1, description="share of the linear maps' weights that stays; 1: they stay as they are")
    ],
    embeddings: Annotated[
        float, Field(gt=0, le=1, description="share of the word embeddings' weights that stays; 1: they stay too")
    ] = 1.0,
    weighted: Weighted = False,
    modules: Modules = LAYERS,
) -> PreTrainedModel:
    """Replaces linear maps and word embeddings by products of two thin matrices, of rank keep · rows · columns /
    (rows + columns): see low_rank.py. Raises UserError where nothing matches, or an MLM head reads the embeddings."""
    where = "surgery low_rank"
    chosen: dict[str, tuple[nn.Linear | nn.Embedding, float]] = {}
    if keep < 1:
        chosen |= {name: (linear, keep) for name, linear in _maps(model, modules, where).items()}
    if embeddings < 1:
        name, words = lowering.words_of(model, where)
        chosen[name] = words, embeddings
    if not chosen:
        raise UserError(f"{where}: keep and embeddings are 1, which leaves all as it is; set one of them below 1")
    ranks = {name: max(1, int(lowering.rank(module.weight, share))) for name, (module, share) in chosen.items()}
    _put_low_rank(model, ranks, sample if weighted else None, tell)
    return model


def _maps(model: PreTrainedModel, modules: str, where: str) -> dict[str, nn.Linear]:
    """Linear maps by name, but for those of products. Raises UserError where none matches."""
    products = [part for part in parts.parts(model) if isinstance(part, LowRank | LowRankEmbedding)]
    inside = {module for part in products for module in part.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and re.search(modules, name)
    }
    if not found:
        raise UserError(f"{where}: no linear map's name matches {modules!r}")
    return found


def _put_low_rank(model: PreTrainedModel, ranks: Mapping[str, int], sample: Sample | None, tell: Tell) -> None:
    numbers = model.device.type != "meta"
    errors = lowering.put(model, ranks, sample() if sample and numbers else ())
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    tell({f"initial_error/low_rank/{name.removeprefix(prefix)}": error for name, error in errors.items()})


def ladabert(
    model: PreTrainedModel,
    sample: Sample = no_sample,
    tell: Tell = silent,
    *,
    reduction: Annotated[
        Factor, Field(description="times fewer weights of the whole model; with it one of the next three is not given")
    ] = None,
    embedding: Annotated[Factor, Field(description="times fewer weights of the word embeddings, by low rank")] = None,
    svd: Annotated[Factor, Field(description="times fewer weights of the encoder's linear maps, by low rank")] = None,
    weight: Annotated[Factor, Field(description="times fewer of what is left of them, by pruning")] = None,
    weighted: Weighted = False,
    modules: Modules = LAYERS,
    begin: Begin = 0.0,
    end: End = 0.5,
    every: Every = 20,
) -> PreTrainedModel:
    """LadaBERT (Mao et al., 2020): word embeddings and linear maps of low rank, then the two factors of each map pruned
    by magnitude, step by step while the student trains; see budget.py for how the factors go together. Raises UserError
    for factors that do not."""
    where = "surgery ladabert"
    maps = _maps(model, modules, where)
    counts = budget.count(model, maps)
    factors = budget.solve(counts, reduction, embedding, svd, weight)
    ranks = {name: _rank_up(linear, factors.svd) for name, linear in maps.items() if factors.svd > 1}
    if factors.embedding > 1:
        name, words = lowering.words_of(model, where)
        ranks[name] = _rank_up(words, factors.embedding)
    _put_low_rank(model, ranks, sample if weighted else None, tell)
    thin = [f"{name}.{side}" for name in maps if name in ranks for side in ("inner", "outer")]
    left = [*thin, *(name for name in maps if name not in ranks)]
    after = budget.count(model, left)
    sparsity = budget.sparsity(after, reduction and counts.total / reduction, weight)
    if sparsity:
        schedule = Schedule(sparsity, begin=begin, end=end, every=every)
        pruning.prune(model, left, Magnitude, schedule, Pattern(), recover=True)
    if model.device.type != "meta":
        tell(budget.told(counts, after, factors, reduction, sparsity))
    return model


def _rank_up(module: nn.Linear | nn.Embedding, factor: float) -> int:
    return math.ceil(lowering.rank(module.weight, 1 / factor))


def _pruning_pattern(text: str) -> str:
    Pattern.of(text)
    return text


def prune(
    model: PreTrainedModel,
    *,
    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of the weights that goes")],
    criterion: Annotated[
        Literal["magnitude", "movement", "adapting", "adapting_paper", "iterative", "random"],
        Field(description="which weights go; adapting and iterative: of weights that do not change"),
    ] = "magnitude",
    modules: Annotated[
        str,
        Field(description="regular expression over the names of linear maps and embeddings"),
        AfterValidator(_pattern),
    ] = LAYERS,
    initial: Annotated[float, Field(ge=0, lt=1, description="share that goes at once when it begins")] = 0.0,
    begin: Begin = 0.0,
    end: End = 0.5,
    every: Every = 20,
    pattern: Annotated[
        str,
        Field(description="unstructured; N:M, of M neighbours N stay; rows x columns, as 32x1: whole blocks"),
        AfterValidator(_pruning_pattern),
    ] = "unstructured",
    frozen: Annotated[bool, Field(description="the encoder's weights stay as they are; scores and head learn")] = False,
    recover: Annotated[bool, Field(description="whether learnt scores may bring weights back")] = True,
) -> PreTrainedModel:
    """Masks over the weights that train, ranked together over all modules chosen, tightened along a cubic schedule:
    see pruning.py. Raises UserError where nothing matches, or the pattern does not fit."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and re.search(modules, name) and module.weight.requires_grad
    ]
    if not names:
        raise UserError(f"surgery prune: no linear map's or embedding's name matches {modules!r}")
    kind = CRITERIA[criterion]
    if frozen or kind.freezes:
        freeze(model)
    pruning.prune(model, names, kind, Schedule(sparsity, initial, begin, end, every), Pattern.of(pattern), recover)
    return model


def check_prune(
    config: TrainConfig,
    head: Head,
    labels: Sequence[str],
    *,
    sparsity: float,
    criterion: str,
    initial: float,
    begin: float,
    end: float,
    **_: Any,
) -> None:
    """Whether the surgery goes with the rest of the config. Raises UserError."""
    _check_pruning("surgery prune", config, begin, end)
    if initial > sparsity:
        raise UserError(f"surgery prune: initial = {initial:g} is more than sparsity = {sparsity:g}")
    if criterion == "movement" and not (end and (begin or not initial)):
        raise UserError("surgery prune: before the first step nothing has moved; let weights go later, by begin or end")
    names = [named.name for named in config.surgery]
    later = {"low_rank", "ladabert"}.intersection(names[names.index("prune") :])
    if later:
        raise UserError(f"surgery prune: masks lie on the weights that {later.pop()} replaces; list prune after it")


def check_ladabert(
    config: TrainConfig, head: Head, labels: Sequence[str], *, begin: float, end: float, **_: Any
) -> None:
    """Whether the surgery goes with the rest of the config. Raises UserError."""
    _check_pruning("surgery ladabert", config, begin, end)


def _check_pruning(where: str, config: TrainConfig, begin: float, end: float) -> None:
    if begin > end:
        raise UserError(f"{where}: begin = {begin:g} is later than end = {end:g}")
    if config.zero_stage == 3:
        raise UserError(
            f"{where}: ranks all weights, of which under ZeRO 3 no process has more than its share; set a stage up to 2"
        )


def freeze(model: PreTrainedModel) -> None:
    """The encoder keeps its weights; heads and poolers learn."""
    head = {id(p) for name, p in model.base_model.named_parameters() if name.startswith("pooler.")}
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(id(parameter) in head)


def quiet_positions(
    model: PreTrainedModel, *, share: Annotated[float, Field(gt=0, le=1, description="of their size that stays")]
) -> PreTrainedModel:
    """Scales position and segment embeddings. A new model draws them as large as those of words, and the words drown:
    from nothing, a few hundred steps teach it much more when they start small."""
    words = set(model.get_input_embeddings().modules())
    for module in model.base_model.get_submodule("embeddings").modules():
        if isinstance(module, nn.Embedding) and module not in words:
            module.weight.data *= share
    return model


def operate(
    model: PreTrainedModel,
    surgeries: Iterable["partial[PreTrainedModel]"],
    sample: Sample = no_sample,
    tell: Tell = silent,
) -> PreTrainedModel:
    """The model after these surgeries, in order. `sample()` is the first batches of the training data, the same on all
    processes; `tell(values)` puts what was found, by name, into the first row and the results of the run. On the meta
    device a model has shapes and no numbers: a surgery refuses there what does not fit, and asks and tells nothing."""
    given = {"sample": sample, "tell": tell}
    for surgery in surgeries:
        wanted = inspect.signature(surgery.func).parameters.keys() & given.keys()
        model = surgery(model, **{name: given[name] for name in wanted})
    return model


SURGERIES: dict[str, Callable[..., PreTrainedModel]] = {
    "ladabert": ladabert,
    "low_rank": low_rank,
    "prune": prune,
    "quiet_positions": quiet_positions,
    "theseus": theseus.theseus,
}
# Of the rest of the config, given it, the student's head and its labels, and the surgery's arguments.
CHECKS: dict[str, Callable[..., None]] = {"ladabert": check_ladabert, "prune": check_prune, "theseus": theseus.check}
