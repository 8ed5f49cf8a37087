"""The compression `low_rank`: linear maps and word embeddings as products of two smaller matrices."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext
from lad_dist.compression.options import LAYER_MODULES, ActivationAware, Modules
from lad_dist.compression.products import insert_products, linear_maps, rank_of_share, word_embeddings_of
from lad_dist.config.errors import UserError
from lad_dist.models.loading import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LowRank(Compression):
    """Replace linear maps and word embeddings by products of two smaller matrices (LadaBERT, Mao et al., 2020).

    The rank of a map's product is keep · rows · columns / (rows + columns), that of the embeddings likewise.
    """

    name = "low_rank"
    inserts = frozenset({"products"})
    may_follow = frozenset({"products"})

    keep: Annotated[
        float, Field(gt=0, le=1, description="share of the linear maps' weights that stays; 1: they stay as they are")
    ]
    embeddings: Annotated[
        float, Field(gt=0, le=1, description="share of the word embeddings' weights that stays; 1: they stay too")
    ] = 1.0
    activation_aware: ActivationAware = False
    modules: Modules = LAYER_MODULES

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Insert the products; raise UserError where no name matches, or an MLM head reads the embeddings."""
        where = f"compression {self.name}"
        shares: dict[str, tuple[nn.Linear | nn.Embedding, float]] = {}
        if self.keep < 1:
            maps = linear_maps(model, self.modules, where)
            shares |= {name: (linear, self.keep) for name, linear in maps.items()}
        if self.embeddings < 1:
            name, embedding = word_embeddings_of(model, where)
            shares[name] = embedding, self.embeddings
        if not shares:
            raise UserError(f"{where}: keep and embeddings are 1, which leaves all as it is; set one of them below 1")
        ranks = {name: max(1, int(rank_of_share(module.weight, share))) for name, (module, share) in shares.items()}
        insert_products(model, ranks, context, self.activation_aware)
        return model
