"""What differs between the families of encoders, as one table. All other modules treat the families alike.

A family runs flat where transformers lets its attention be replaced. Where attention is the family's own, it runs
padded, a sequence a span, and its outputs are flattened. MPNet adds a bias by relative position, DeBERTa products with
embeddings of relative positions. Their q and k are of the contents alone, without what positions add to the product.
ModernBERT rotates q and k by their positions, so the product of the two is the score.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.utils.suggest import did_you_mean


@dataclass(frozen=True)
class LayerModules:
    """Paths of the modules within a layer, None where the family has no such module. The defaults are BERT's."""

    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    intermediate: str = "intermediate.dense"
    output: str = "output.dense"
    output_norm: str = "output.LayerNorm"
    query: str | None = "attention.self.query"
    key: str | None = "attention.self.key"
    value: str | None = "attention.self.value"
    qkv: str | None = None  # one map to all three
    position_query: str | None = None  # maps that read embeddings of relative positions alone
    position_key: str | None = None

    def by_role(self) -> dict[str, str]:
        """Return the paths of the modules that the family has, by the names of these fields."""
        return {role: path for role, path in vars(self).items() if path is not None}


@dataclass(frozen=True)
class Family:
    """A family of encoders. The defaults are BERT's. Functions take the model's config."""

    # How it runs.
    flat: bool = True  # whether transformers lets attention be replaced
    first_position: Callable[[Any], int] = lambda _: 0  # the number of a sequence's first position
    mean_pooling: Callable[[Any], bool] = lambda _: False  # whether a classifier reads the mean over tokens
    shared_layers: bool = False  # whether one layer runs many times
    # Whether layers differ in kind, so that none can replace another.
    uneven_layers: Callable[[Any], bool] = lambda _: False
    narrowable: bool = False  # whether norms follow the additions, and scores are products of q and k alone

    # Where its modules stand: in the encoder,
    layer_list: str = "layers?"  # regular expression over the name of the list of layers
    pooler_input: str = "encoder"  # the module whose output a pooler reads
    embedding_projection: str | None = None  # from embeddings to hidden states, where their sizes differ
    embeddings_norm: str | None = None  # what the first layer reads where it has no attention_norm of its own
    attention_modules: tuple[str, ...] = ("attention",)  # modules that count as attention, at any depth
    # and in a layer.
    modules: LayerModules = field(default_factory=LayerModules)
    attention_dropout: str = "attention.self.dropout"  # a module, or a number
    optional_dropout: str | None = None  # name of a dropout of hidden states that is left out at probability 0
    relative_position_maps: Callable[[Any], tuple[str, ...]] = lambda _: ()  # maps that read relative positions
    relative_positions: Callable[[Any], int] = lambda _: 0  # how many embeddings of relative positions they read

    # What its configs say.
    intermediate_size_key: str = "intermediate_size"
    undeclared_keys: dict[str, type] = field(default_factory=dict)  # read from a config that does not declare them
    required_values: dict[str, Any] = field(default_factory=dict)  # a config with others is refused
    discriminators: tuple[str, ...] = ()  # architectures for pre-training without a masked-language-model head


def _deberta_position_maps(config: Any) -> tuple[str, ...]:
    """Return the map that reads relative positions for each of their uses in config.pos_att_type."""
    names = {"c2p": "key_proj", "p2c": "query_proj"}
    prefix = "" if getattr(config, "share_att_key", False) else "pos_"
    uses = config.pos_att_type or () if config.relative_attention else ()
    return tuple(f"attention.self.{prefix}{names[use]}" for use in uses)


def _deberta_relative_positions(config: Any) -> int:
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    buckets = getattr(config, "position_buckets", -1)
    return 2 * (buckets if buckets > 0 else longest)


def _after_padding(config: Any) -> int:
    return config.pad_token_id + 1


BERT = Family(narrowable=True)
ROBERTA = replace(BERT, first_position=_after_padding)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": replace(
        ROBERTA,
        modules=LayerModules(attention_norm="attention.self_attn_layer_norm", output_norm="LayerNorm"),
        narrowable=False,
    ),
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "roberta-prelayernorm": replace(
        ROBERTA,
        modules=LayerModules(attention_norm="attention.LayerNorm", output_norm="intermediate.LayerNorm"),
        narrowable=False,
    ),
    "electra": replace(BERT, embedding_projection="embeddings_project", discriminators=("ElectraForPreTraining",)),
    "distilbert": Family(
        modules=LayerModules(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            intermediate="ffn.lin1",
            output="ffn.lin2",
            output_norm="output_layer_norm",
        ),
        attention_modules=("attention", "sa_layer_norm"),
        narrowable=True,
        intermediate_size_key="hidden_dim",
        attention_dropout="attention.dropout",
    ),
    "albert": Family(
        modules=LayerModules(
            query="albert_layers.0.attention.query",
            key="albert_layers.0.attention.key",
            value="albert_layers.0.attention.value",
            attention_output="albert_layers.0.attention.dense",
            attention_norm="albert_layers.0.attention.LayerNorm",
            intermediate="albert_layers.0.ffn",
            output="albert_layers.0.ffn_output",
            output_norm="albert_layers.0.full_layer_layer_norm",
        ),
        layer_list="albert_layer_groups",
        # One layer for all: with several groups or layers in a group, its number would not say how often it runs.
        shared_layers=True,
        attention_dropout="attention.attention_dropout",
        required_values={"num_hidden_groups": 1, "inner_group_num": 1},
    ),
    "mpnet": Family(
        modules=LayerModules(
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention_output="attention.attn.o",
            attention_norm="attention.LayerNorm",
        ),
        attention_modules=("attention", "relative_attention_bias"),
        flat=False,
        # Its padding token is 1 whatever its config says, for positions too.
        first_position=lambda _: 2,
        attention_dropout="attention.attn.dropout",
        required_values={"pad_token_id": 1},
    ),
    "deberta-v2": Family(
        modules=LayerModules(
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            position_query="attention.self.pos_query_proj",
            position_key="attention.self.pos_key_proj",
        ),
        attention_modules=("attention", "conv"),
        flat=False,
        uneven_layers=lambda config: getattr(config, "conv_kernel_size", 0) > 0,
        relative_position_maps=_deberta_position_maps,
        relative_positions=_deberta_relative_positions,
        undeclared_keys={
            "position_buckets": int,
            "share_att_key": bool,
            "norm_rel_ebd": str,
            "conv_kernel_size": int,
            "conv_groups": int,
            "conv_act": str,
            "embedding_size": int,
        },
    ),
    "modernbert": Family(
        modules=LayerModules(
            query=None,
            key=None,
            value=None,
            qkv="attn.Wqkv",
            attention_output="attn.Wo",
            attention_norm="attn_norm",
            intermediate="mlp.Wi",
            output="mlp.Wo",
            output_norm="mlp_norm",
        ),
        attention_modules=("attn", "attn_norm"),
        uneven_layers=lambda config: bool(config.layer_types),
        embeddings_norm="embeddings.norm",
        attention_dropout="attn.attention_dropout",
        optional_dropout="out_drop",
        mean_pooling=lambda config: config.classifier_pooling == "mean",
    ),
}


def family_of(config: Any) -> Family:
    """Return the family of the model with this config."""
    return FAMILIES[config.model_type]


def check_family(config: Any, name: str) -> None:
    """Raise UserError where the model called `name` is of an unknown family, or has a config that cannot run here."""
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UserError(f"{name}: the family {model_type} is not supported; {did_you_mean(model_type, FAMILIES)}")
    family = family_of(config)
    for key, required in {"is_decoder": False, **family.required_values}.items():
        value = getattr(config, key, required)
        if value != required:
            raise UserError(f"{name}: {model_type} with {key} = {value} is not supported, {required} is")
    for key, kind in family.undeclared_keys.items():  # of the others transformers checks the types
        value = getattr(config, key, None)
        if value is not None and type(value) is not kind:
            raise UserError(f"{name}: {key} must be of type {kind.__name__}, not {value!r}")
    if family.first_position is _after_padding and config.pad_token_id is None:
        raise UserError(f"{name}: {model_type} numbers positions from pad_token_id, which is not set; set it")


def intermediate_size(config: Any) -> int:
    """Return the number of units between the two maps of a feed-forward block."""
    return int(getattr(config, family_of(config).intermediate_size_key))


def lies_in(name: str, path: str) -> bool:
    """Return whether `name` is that of a module at `path` or inside one, wherever in the model the path begins."""
    return f".{path}." in f".{name}."


def layer_list_pattern() -> str:
    """Return a regular expression that matches the names of modules in the layers of any encoder."""
    return rf"(^|\.)({'|'.join(dict.fromkeys(family.layer_list for family in FAMILIES.values()))})\."


def module_pattern(*roles: str) -> str:
    """Return a regular expression for how the names of the modules with these roles end, in any family."""
    modules = (family.modules.by_role() for family in FAMILIES.values())
    paths = dict.fromkeys(paths[role] for paths in modules for role in roles if role in paths)
    return rf"\.({'|'.join(map(re.escape, paths))})"
