"""Hugging Face configs: read and checked before any weight is read, or made for a new model."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)

from lad_dist.config.errors import UserError
from lad_dist.models import families
from lad_dist.utils.errors import first_line
from lad_dist.utils.suggest import did_you_mean

# Settings of a config that change nothing of what the model computes.
IGNORED_CONFIG_KEYS = frozenset(
    "_name_or_path architectures dtype id2label label2id problem_type transformers_version".split()
)
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def load_hf_config(path: str) -> PreTrainedConfig:
    """The config of a model folder or hub name. Raises UserError when there is none, or none of a known family."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a malformed one provokes anything from OSError to TypeError: the user gets one line
        raise UserError(f"{path}: no model can be read there ({first_line(error)})") from None
    families.check_family(config, path)
    for name in SIZES:
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: its config.json says {name} = {size!r}; copy the folder again")
    return config


def architecture_config(
    architecture: dict[str, Any], vocabulary: int, special: Mapping[str, int] = MappingProxyType({})
) -> PreTrainedConfig:
    """The config of a new model for a tokenizer of `vocabulary` tokens, whose `special` ones have these numbers
    (pad_token_id and so on). Raises UserError for a setting that its family does not have."""
    kind = architecture.get("model_type", "bert")
    if kind not in families.FAMILIES:
        raise UserError(f'student.architecture.model_type "{kind}" is unknown; {did_you_mean(kind, families.FAMILIES)}')
    family = CONFIG_MAPPING[kind]
    names = [name for name in family().to_dict() if not name.startswith("_")] + [*families.FAMILIES[kind].settings]
    words = {name: value for name, value in architecture.items() if name != "model_type"}
    for name in words:
        if name not in names:
            raise UserError(f"student.architecture.{name}: {kind} has no such setting; {did_you_mean(name, names)}")
    try:
        config = family(
            **{"vocab_size": vocabulary, **{k: v for k, v in special.items() if k in names}, **words},
        )
    except Exception as error:  # the family's own validation, of many kinds
        raise UserError(f"student.architecture: {first_line(error)}") from None
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"student.architecture: {config.num_attention_heads} heads do not divide a width of {config.hidden_size}"
        )
    families.check_family(config, "student.architecture")
    return config
