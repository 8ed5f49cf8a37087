"""Changes to whole layers and embeddings: a choice of layers, new embeddings, dropout, frozen encoders."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lad_dist.config.errors import UserError
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.library_versions import check_layer_types
from lad_dist.models.loading import PreTrainedModel


def layer_numbers(rule: str | Sequence[int], num_hidden_layers: int | None, available: int) -> list[int]:
    """Return the numbers, from 1, of the layers to keep. Raise UserError where the model has too few.

    "even" takes every (available / num_hidden_layers)-th, ending with the last: 2, 4, 6 of six.
    """
    if not isinstance(rule, str):
        wrong = [n for n in rule if not 1 <= n <= available]
        if wrong:
            raise UserError(f"student.layers: no layer {wrong[0]}; the model has layers 1 to {available}")
        return list(rule)
    count = available if num_hidden_layers is None else num_hidden_layers
    if count > available:
        raise UserError(f"student.num_hidden_layers = {count}, but the model it starts from has {available} layers")
    if rule == "first":
        return list(range(1, count + 1))
    if rule == "last":
        return list(range(available - count + 1, available + 1))
    return [(m * available) // count for m in range(1, count + 1)]


def keep_layers(model: PreTrainedModel, numbers: Sequence[int]) -> PreTrainedModel:
    """Return the model with these layers alone, numbered from 1.

    Where all layers share their weights (ALBERT), the model runs its one layer as many times as there are numbers.
    """
    model.config.num_hidden_layers = len(numbers)
    if families.family_of(model.config).shared_layers:
        return model
    stack = encoder_layers(model)
    layers = [stack[n - 1] for n in numbers]
    del stack[:]
    stack.extend(layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[n - 1] for n in numbers]
        check_layer_types(model.config)
    if families.family_of(model.config).embeddings_norm is not None:
        _move_norms_before_attention(model, layers)
    return model


def _move_norms_before_attention(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """Leave the first layer, which reads the embeddings' norm (ModernBERT), without a norm before attention.

    Of another layer that comes first, the scale goes into the map to q, k and v. The original first layer gets a new
    norm where it comes later.
    """
    family = families.family_of(model.config)
    assert family.embeddings_norm is not None
    assert family.modules.qkv is not None
    norm_path = family.modules.attention_norm
    embeddings_norm: Any = model.base_model.get_submodule(family.embeddings_norm)
    norm, qkv = (layers[0].get_submodule(path) for path in (norm_path, family.modules.qkv))
    if isinstance(norm, nn.LayerNorm):
        scale = norm.weight.data / embeddings_norm.weight.data.square().mean().sqrt()
        qkv.get_parameter("weight").data *= scale
        layers[0].set_submodule(norm_path, nn.Identity())
    for layer in layers[1:]:
        if isinstance(layer.get_submodule(norm_path), nn.Identity):
            bias = embeddings_norm.bias is not None
            new = nn.LayerNorm(model.config.hidden_size, eps=embeddings_norm.eps, bias=bias)
            layer.set_submodule(norm_path, new)


def random_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with new embeddings: N(0, initializer_range), norms at identity."""
    for module in model.base_model.get_submodule("embeddings").modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=model.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    return model


def set_dropout(model: PreTrainedModel, hidden: float | None, attention: float | None) -> PreTrainedModel:
    """Return the model with other dropout probabilities; None leaves them as they are.

    Its config keeps the old ones, for those who train on from the export.
    """
    family = families.family_of(model.config)
    attention_path, _, attention_name = family.attention_dropout.rpartition(".")
    for name, module in model.named_modules():
        in_attention = f".{name}".endswith(f".{attention_path}")
        if in_attention and attention is not None and isinstance(getattr(module, attention_name), float | int):
            setattr(module, attention_name, attention)
        for child_name, child in module.named_children():
            probability = attention if in_attention and child_name == attention_name else hidden
            if probability is not None and isinstance(child, nn.Dropout):
                child.p = probability
            elif hidden and child_name == family.optional_dropout:
                setattr(module, child_name, nn.Dropout(hidden))
    return model


def freeze_encoder(model: PreTrainedModel) -> None:
    """Freeze the encoder's weights; heads and poolers learn."""
    head = {id(p) for name, p in model.base_model.named_parameters() if name.startswith("pooler.")}
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(id(parameter) in head)
