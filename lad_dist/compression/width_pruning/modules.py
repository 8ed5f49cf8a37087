"""The modules of an encoder by role, and their weights in fp64.

V words, D width.
"""

from typing import Any

from torch import Tensor, nn

from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel

Layer = dict[str, Any]


class ModuleMap:
    """The modules of a model by role. `stream` are those whose outputs are hidden states, in order."""

    def __init__(self, model: PreTrainedModel):
        family = families.family_of(model.config)
        paths = family.modules.by_role()
        base: Any = model.base_model
        self.model = model
        self.embeddings = base.embeddings
        self.projection: nn.Linear | None = getattr(base, family.embedding_projection or "", None)
        self.layers: list[Layer] = [
            {role: layer.get_submodule(path) for role, path in paths.items()} for layer in encoder_layers(model)
        ]
        first = self.embeddings.LayerNorm if self.projection is None else self.projection
        self.stream = [first, *(layer[norm] for layer in self.layers for norm in ("attention_norm", "output_norm"))]
        inside = {
            *self.embeddings.modules(),
            *(m for layer in encoder_layers(model) for m in layer.modules()),
            self.projection,
        }
        word_embeddings = model.get_input_embeddings().get_parameter("weight")
        self.word_embeddings = word_embeddings.detach().double().cpu()  # [V, D]
        outside = [module for module in model.modules() if module not in inside]
        readers = [module for module in outside if getattr(module, "weight", None) is word_embeddings]
        self.is_tied = bool(readers)
        self.head = [m for m in outside if isinstance(m, nn.Linear) and m.weight is not word_embeddings]
        self.head_norm = next((m for m in outside if isinstance(m, nn.LayerNorm)), None)
        self.decoder_bias: Any = next((module.bias for module in readers), None)
        inside_ids = {id(p) for m in inside if m is not None for p in m.parameters()}
        self.outside = {name: p for name, p in model.named_parameters() if id(p) not in inside_ids}


def assign(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Copy weight and bias into a linear map, which may have no bias."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return both in fp64 on the CPU, zeros where there is no bias."""
    weight = linear.weight.double().cpu()
    return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double().cpu()
