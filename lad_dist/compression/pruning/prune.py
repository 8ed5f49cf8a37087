"""The compression `prune`: masks over weights, tightened while the student trains."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import nn

from lad_dist.compression.layers import freeze_encoder
from lad_dist.compression.options import LAYER_MODULES, Begin, End, UpdateEvery, regular_expression
from lad_dist.compression.pruning.criteria import CRITERIA
from lad_dist.compression.pruning.module import insert_masks
from lad_dist.compression.pruning.schedule import Pattern, Schedule
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Head
from lad_dist.models.loading import PreTrainedModel


def _pruning_pattern(text: str) -> str:
    Pattern.parse(text)
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
        AfterValidator(regular_expression),
    ] = LAYER_MODULES,
    initial: Annotated[float, Field(ge=0, lt=1, description="share that goes at once when it begins")] = 0.0,
    begin: Begin = 0.0,
    end: End = 0.5,
    update_every: UpdateEvery = 20,
    pattern: Annotated[
        str,
        Field(description="unstructured; N:M, of M neighbours N stay; rows x columns, as 32x1: whole blocks"),
        AfterValidator(_pruning_pattern),
    ] = "unstructured",
    frozen: Annotated[bool, Field(description="the encoder's weights stay as they are; scores and head learn")] = False,
    recover: Annotated[bool, Field(description="whether learnt scores may bring weights back")] = True,
) -> PreTrainedModel:
    """Put masks over the weights that train. They are ranked together and pruned along a cubic schedule.

    Raise UserError where no name matches, or the pattern does not fit.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and re.search(modules, name) and module.weight.requires_grad
    ]
    if not names:
        raise UserError(f"compression prune: no linear map's or embedding's name matches {modules!r}")
    kind = CRITERIA[criterion]
    if frozen or kind.freezes:
        freeze_encoder(model)
    insert_masks(
        model, names, kind, Schedule(sparsity, initial, begin, end, update_every), Pattern.parse(pattern), recover
    )
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
    """Raise UserError where the compression does not go with the rest of the config."""
    check_pruning("compression prune", config, begin, end)
    if initial > sparsity:
        raise UserError(f"compression prune: initial = {initial:g} is more than sparsity = {sparsity:g}")
    if criterion == "movement" and not (end and (begin or not initial)):
        raise UserError(
            "compression prune: before the first step nothing has moved; let weights go later, by begin or end"
        )
    names = [named.name for named in config.compression]
    later = {"low_rank", "ladabert"}.intersection(names[names.index("prune") :])
    if later:
        raise UserError(f"compression prune: masks lie on the weights that {later.pop()} replaces; list prune after it")


def check_pruning(where: str, config: TrainConfig, begin: float, end: float) -> None:
    """Raise UserError where a schedule ends before it begins, or ZeRO's stage is 3."""
    if begin > end:
        raise UserError(f"{where}: begin = {begin:g} is later than end = {end:g}")
    if config.zero_stage == 3:
        raise UserError(
            f"{where}: ranks all weights, but under ZeRO 3 each process has only a share of them; set a stage up to 2"
        )
