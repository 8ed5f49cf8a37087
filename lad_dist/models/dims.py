"""Sizes of models: dimensions, positions, vocabulary, parameters."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Head
from lad_dist.core.outputs import ModelDims
from lad_dist.models import families


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's layers, first to last; one, where they share their weights."""
    base = model.base_model
    children = (child for module in (base, *base.children()) for child in module.children())
    return next(child for child in children if isinstance(child, nn.ModuleList))


def model_dims(
    config: PreTrainedConfig, head: Head, *, labels: int = 0, span: int | None = None, vocabulary: int | None = None
) -> ModelDims:
    """Return the sizes of a model that an objective needs to know."""
    return ModelDims(
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head=head,
        num_outputs={"none": 0, "mlm": config.vocab_size}.get(head, labels),
        padded_length=span,
        vocabulary=vocabulary,
    )


def max_positions(config: PreTrainedConfig) -> int:
    """Return the length of the longest sequence that the model has positions for."""
    return int(config.max_position_embeddings) - families.family_of(config).first_position(config)


def check_length(config: PreTrainedConfig, name: str, longest: int) -> None:
    """Raise UserError where the model has no positions for sequences of `longest` tokens."""
    positions = max_positions(config)
    if longest > positions:
        raise UserError(f"data.max_length: {longest} tokens, but {name} has {positions} positions")


def check_vocabulary(config: PreTrainedConfig, name: str, vocab_size: int) -> None:
    """Raise UserError where the model has embeddings for fewer tokens than its tokenizer, `vocab_size`, has."""
    if config.vocab_size < vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {vocab_size} tokens, the model only {config.vocab_size}; "
            "take the tokenizer that the model was trained with"
        )


def check_padding(config: PreTrainedConfig, name: str, padding: int | None) -> None:
    """Raise UserError where the model counts positions from another token of padding than the tokenizer's.

    transformers counts the tokens that are no padding: a word of that number would have no position.
    """
    if families.family_of(config).first_position(config) and padding != config.pad_token_id:
        raise UserError(
            f"{name}: positions begin after the padding token {config.pad_token_id}, the tokenizer's is {padding}; "
            "take the tokenizer that the model was trained with"
        )


def uses_segments(config: PreTrainedConfig) -> bool:
    """Return whether the model sees which tokens are those of the second text."""
    return getattr(config, "type_vocab_size", 0) > 1


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights, shared ones counted once; under ZeRO-3 those of all processes."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
