"""The compression `scale_position_embeddings`: a new student's position embeddings start small."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from lad_dist.compression.base import NO_DATA, Compression, CompressionContext, ModuleKind
from lad_dist.models.loading import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ScalePositionEmbeddings(Compression):
    """Scale position and segment embeddings.

    A new model draws them as large as those of words, and the words drown. A model that is trained from scratch learns
    much more in its first few hundred steps when they start small.
    """

    name = "scale_position_embeddings"
    may_follow: ClassVar[frozenset[ModuleKind]] = frozenset({"products", "masks", "gates", "quantized"})

    scale: Annotated[float, Field(gt=0, le=1, description="of their size that stays")]

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        word_embeddings = set(model.get_input_embeddings().modules())
        for module in model.base_model.get_submodule("embeddings").modules():
            if isinstance(module, nn.Embedding) and module not in word_embeddings:
                module.weight.data *= self.scale
        return model
