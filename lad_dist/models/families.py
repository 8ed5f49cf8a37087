"""Families of encoders: what differs between them, as one table. `lad_dist/models.py` is the same for all.

    Family         the facts that a forward, sizes and surgeries need
    FAMILIES       by model_type
    of(config)     the facts of a model
    check(…)       refuses a model of which nothing is known

Where transformers lets attention be replaced, a family runs flat. Where attention is the family's own (MPNet adds a
bias by relative position, DeBERTa products with embeddings of relative positions), it runs padded, a sequence a span,
and what it leaves is flattened: its q and k are the contents alone, without what positions add to their product.
ModernBERT's q and k are rotated by their positions, so that their product is its attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.utils.suggest import did_you_mean


def _from_zero(config: Any) -> int:
    return 0


def _after_padding(config: Any) -> int:
    return config.pad_token_id + 1


@dataclass(frozen=True)
class Family:
    """`projections`: names of the maps to q, k and v where attention is the family's own, so that it runs padded.
    `first_position`: of the config, the number of a sequence's first position. `settings`: what the family reads from a
    config that does not declare it. `fixed`: settings that must have these values."""

    projections: tuple[str, str, str] | None = None
    first_position: Callable[[Any], int] = _from_zero
    shared_layers: bool = False
    settings: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether its attention runs on flat tokens."""
        return self.projections is None


ROBERTA = Family(first_position=_after_padding)
DEBERTA_SETTINGS = "position_buckets share_att_key norm_rel_ebd conv_kernel_size conv_groups conv_act embedding_size"
FAMILIES = {
    "bert": Family(),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "electra": Family(),
    "distilbert": Family(),
    # One layer for all: with several groups or layers in a group, a layer's number would not say how often it runs.
    "albert": Family(shared_layers=True, fixed={"num_hidden_groups": 1, "inner_group_num": 1}),
    # Its padding token is 1 whatever its config says, for positions too.
    "mpnet": Family(projections=("q", "k", "v"), first_position=lambda _: 2, fixed={"pad_token_id": 1}),
    "deberta-v2": Family(
        projections=("query_proj", "key_proj", "value_proj"), settings=tuple(DEBERTA_SETTINGS.split())
    ),
    "modernbert": Family(),
}


def family_of(config: Any) -> Family:
    """The facts of the model with this config."""
    return FAMILIES[config.model_type]


def check_family(config: Any, name: str) -> None:
    """Raises UserError where the family of the model called `name` is not known, or it is shaped in a way that nothing
    here can run."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise UserError(f"{name}: the family {kind} is not supported; {did_you_mean(kind, FAMILIES)}")
    for setting, value in family_of(config).fixed.items():
        if getattr(config, setting) != value:
            raise UserError(f"{name}: {kind} with {setting} = {getattr(config, setting)} is not supported, {value} is")
