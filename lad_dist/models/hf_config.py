"""Hugging Face configs: read and checked before any weight is read, or written for a new model."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from lad_dist.config.errors import UserError
from lad_dist.models import families
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.text import one_line

# Keys of a config that do not change what the model computes.
IGNORED_CONFIG_KEYS = frozenset(
    "_name_or_path architectures dtype id2label label2id label_thresholds problem_type transformers_version".split()
)
SIZE_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def load_hf_config(path: str) -> PreTrainedConfig:
    """Return the config of a model folder or hub name. Raise UserError without one of a known family."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a malformed config raises anything from OSError to TypeError
        raise UserError(f"{path}: cannot read a model ({one_line(error)})") from None
    families.check_family(config, path)
    for name in SIZE_KEYS:
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: config.json says {name} = {size!r}; copy the folder again")
    names = config.id2label or {}
    if names.keys() == set(range(1, len(names) + 1)):  # counted from 1; the outputs are in this order
        config.id2label = {number - 1: names[number] for number in sorted(names)}
        config.label2id = {name: number for number, name in config.id2label.items()}
    return config


def architecture_config(
    architecture: dict[str, Any], vocab_size: int, special_ids: Mapping[str, int] = MappingProxyType({})
) -> PreTrainedConfig:
    """Return the config of a new model for a tokenizer of `vocab_size` tokens.

    `special_ids` are the ids of the tokenizer's special tokens: pad_token_id and so on. Raise UserError for a key that
    the family does not have, or values that do not fit together.
    """
    model_type = architecture.get("model_type", "bert")
    if model_type not in families.FAMILIES:
        advice = did_you_mean(model_type, families.FAMILIES)
        raise UserError(f'student.architecture.model_type "{model_type}" is unknown; {advice}')
    config_class = CONFIG_MAPPING[model_type]
    declared = [key for key in config_class().to_dict() if not key.startswith("_")]
    keys = [*declared, *families.FAMILIES[model_type].undeclared_keys]
    values = {key: value for key, value in architecture.items() if key != "model_type"}
    for key in values:
        if key not in keys:
            raise UserError(f"student.architecture.{key}: {model_type} has no such setting; {did_you_mean(key, keys)}")
    defaults = {"vocab_size": vocab_size, **{key: value for key, value in special_ids.items() if key in keys}}
    try:
        config = config_class(**{**defaults, **values})
    except Exception as error:  # the family's own validation, of many kinds
        raise UserError(f"student.architecture: {one_line(error)}") from None
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"student.architecture: num_attention_heads = {config.num_attention_heads} does not divide "
            f"hidden_size = {config.hidden_size}"
        )
    families.check_family(config, "student.architecture")
    return config
