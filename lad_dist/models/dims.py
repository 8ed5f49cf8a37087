"""Sizes of models: dimensions, positions, vocabulary, parameters."""

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Head
from lad_dist.core.outputs import ModelDims
from lad_dist.models import families


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, first to last; one, where they share their weights."""
    base = model.base_model
    inside = (child for module in (base, *base.children()) for child in module.children())
    return next(child for child in inside if isinstance(child, nn.ModuleList))


def model_dims(config: PreTrainedConfig, head: Head, *, labels: int = 0, span: int | None = None) -> ModelDims:
    """What an objective needs to know of a model's sizes."""
    outputs = {"none": 0, "mlm": config.vocab_size}.get(head, labels)
    return ModelDims(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head, outputs, span)


def max_positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence that the model has positions for."""
    return int(config.max_position_embeddings) - families.family_of(config).first_position(config)


def check_length(config: PreTrainedConfig, name: str, longest: int) -> None:
    """Raises UserError when the model has no positions for sequences of `longest` tokens."""
    room = max_positions(config)
    if longest > room:
        raise UserError(f"data.max_length: {longest} tokens, but {name} has {room} positions")


def check_vocabulary(config: PreTrainedConfig, name: str, tokens: int) -> None:
    """Raises UserError when the model has embeddings for fewer than so many tokens."""
    if config.vocab_size < tokens:
        raise UserError(
            f"{name}: its tokenizer has {tokens} tokens, the model only {config.vocab_size}; one is not its"
        )


def uses_segments(config: PreTrainedConfig) -> bool:
    """Whether the model sees which tokens are those of the second text."""
    return getattr(config, "type_vocab_size", 0) > 1


def count_parameters(model: nn.Module) -> int:
    """Number of weights, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())
