"""The compression `prune`: masks over weights, tightened while the student trains."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import nn

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, RunSettings
from lad_dist.compression.layers import freeze_encoder
from lad_dist.compression.options import LAYER_MODULES, Begin, End, UpdateEvery, regular_expression
from lad_dist.compression.pruning.criteria import CRITERIA
from lad_dist.compression.pruning.module import insert_masks
from lad_dist.compression.pruning.schedule import Pattern, Schedule, check_span
from lad_dist.config.errors import UserError
from lad_dist.models.loading import PreTrainedModel


def _pruning_pattern(text: str) -> str:
    Pattern.parse(text)
    return text


@dataclass(frozen=True, kw_only=True)
class Prune(Compression):
    """Put masks over the weights that train. They are ranked together and pruned along a cubic schedule.

    The schedule is that of Zhu and Gupta (2017); `pruning/criteria.py` names the sources of the criteria.
    """

    name = "prune"
    inserts = frozenset({"masks"})
    may_follow = frozenset({"products", "masks"})
    supports_zero3 = False  # the ranking of weights needs all of them on each process

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of the weights that goes")]
    criterion: Annotated[
        Literal["magnitude", "movement", "adapting", "adapting_paper", "iterative", "random"],
        Field(description="which weights go; adapting and iterative: of weights that do not change"),
    ] = "magnitude"
    modules: Annotated[
        str,
        Field(description="regular expression over the names of linear maps and embeddings"),
        AfterValidator(regular_expression),
    ] = LAYER_MODULES
    initial: Annotated[float, Field(ge=0, lt=1, description="share that goes at once when it begins")] = 0.0
    begin: Begin = 0.0
    end: End = 0.5
    update_every: UpdateEvery = 20
    pattern: Annotated[
        str,
        Field(description="unstructured; N:M, of M neighbours N stay; rows x columns, as 32x1: whole blocks"),
        AfterValidator(_pruning_pattern),
    ] = "unstructured"
    frozen: Annotated[bool, Field(description="the encoder's weights stay as they are; scores and head learn")] = False
    recover: Annotated[bool, Field(description="whether learnt scores may bring weights back")] = True

    def check(self, spec: RunSettings) -> None:
        """Raise UserError where the schedule contradicts itself, or the criterion."""
        check_span(self.name, self.begin, self.end)
        if self.initial > self.sparsity:
            raise UserError(f"compression prune: initial = {self.initial:g} is more than sparsity = {self.sparsity:g}")
        if self.criterion == "movement" and not (self.end and (self.begin or not self.initial)):
            raise UserError(
                "compression prune: before the first step nothing has moved; let weights go later, by begin or end"
            )

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Insert the masks; raise UserError where no name matches, or the pattern does not fit."""
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
            and re.search(self.modules, name)
            and module.weight.requires_grad
        ]
        if not names:
            raise UserError(f"compression prune: no linear map's or embedding's name matches {self.modules!r}")
        kind = CRITERIA[self.criterion]
        if self.frozen or kind.freezes:
            freeze_encoder(model)
        schedule = Schedule(self.sparsity, self.initial, self.begin, self.end, self.update_every)
        insert_masks(model, names, kind, schedule, Pattern.parse(self.pattern), self.recover)
        return model
