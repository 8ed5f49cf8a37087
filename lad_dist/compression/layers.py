"""Changes to whole layers and embeddings: layers kept, embeddings drawn anew, dropout, frozen encoders."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from lad_dist.config.errors import UserError
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel


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
        raise UserError(f"student.num_hidden_layers = {depth}, but the model it starts from has {available} layers")
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


def freeze_encoder(model: PreTrainedModel) -> None:
    """The encoder keeps its weights; heads and poolers learn."""
    head = {id(p) for name, p in model.base_model.named_parameters() if name.startswith("pooler.")}
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(id(parameter) in head)


def scale_position_embeddings(
    model: PreTrainedModel, *, scale: Annotated[float, Field(gt=0, le=1, description="of their size that stays")]
) -> PreTrainedModel:
    """Scales position and segment embeddings. A new model draws them as large as those of words, and the words drown:
    from nothing, a few hundred steps teach it much more when they start small."""
    words = set(model.get_input_embeddings().modules())
    for module in model.base_model.get_submodule("embeddings").modules():
        if isinstance(module, nn.Embedding) and module not in words:
            module.weight.data *= scale
    return model
