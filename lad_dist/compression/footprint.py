"""Sizes: what a model weighs and computes, counted as its compact form is, whatever Parts are in it.

    flops(model, batches)   multiply-adds times two of a forward over each, by component
    stored(model)           weights of the compact form, by component: all of them, and those that are not zero
    exported(model)         weights of the ordinary folder
    of(model, batch)        these as one flat table: what results.json and the model card hold
    on_disk(export)         bytes of each form of a model that lies in its folder

A low-rank pair counts as the pair where that is cheaper, a replaced layer as its successor; weights that are zero take
part in every product all the same. Nothing is changed: Parts are asked for their plain modules one by one.

A weight's component is told by where it lives. Outside of layers all that is not of embeddings or attention goes with
the head: poolers, norms after the last layer.

B sequences, N tokens of all of them, R rows that the head reads, D width.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lad_dist.compression import compressed_module
from lad_dist.compression.compressed_module import COMPACT, MERGED
from lad_dist.core.batch import Batch
from lad_dist.models import families
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel

COMPONENTS = ("embeddings", "attention", "feed_forward", "head")
FLOPS = "forward_flops_per_token"
ATTENTION = re.compile(r"(^|\.)(attention|attn|sa_layer_norm|relative_attention_bias|conv)")
# DeBERTa's maps that read the embeddings of relative positions too, by what config.pos_att_type calls their use.
RELATIVE_MAPS = {"c2p": "key_proj", "p2c": "query_proj"}
# The forms of a model in its folder: their names, and the files that hold their weights.
FORMS = {
    "safetensors": "model*.safetensors",
    "compact": "compact.safetensors",
    "masks": "mask.safetensors",
    "onnx": "onnx/model.onnx",
    "onnx int8": "onnx/model.int8.onnx",
}


@dataclass(frozen=True)
class _ModulePlan:
    """Where things stand in a model."""

    model: PreTrainedModel

    @cached_property
    def base(self) -> str:
        own = self.model.base_model
        return next(f"{name}." if name else "" for name, module in self.model.named_modules() if module is own)

    @cached_property
    def layers(self) -> str:
        stack = encoder_layers(self.model)
        return next(f"{name}." for name, module in self.model.named_modules() if module is stack)

    def component(self, name: str) -> str:
        """Of the module or weight of that name."""
        if not name.startswith(self.base):
            return "head"
        own = name.removeprefix(self.base)
        if ATTENTION.search(own):
            return "attention"
        if name.startswith(self.layers):
            return "feed_forward"
        return "embeddings" if "embedding" in own else "head"

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules by name, as they are in the compact form."""
        return compressed_module.iter_modules(self.model, COMPACT)


def flops(model: PreTrainedModel, *batches: Batch) -> dict[str, int]:
    """By component, the multiply-adds times two of a forward of the compact form over each of the batches, padding not
    counted: linear maps, attention's scores and sums."""
    plan, found = _ModulePlan(model), dict.fromkeys(COMPONENTS, 0)
    maps = [(name, module) for name, module in plan.modules() if isinstance(module, nn.Linear | nn.Conv1d)]
    for batch in batches:
        for name, module in maps:
            rows = _rows(plan, name, batch) if isinstance(module, nn.Linear) else batch.num_tokens
            found[plan.component(name)] += 2 * rows * module.weight.numel()
        found["attention"] += _attention_flops(model.config, batch)
    return found


def _attention_flops(config: Any, batch: Batch) -> int:
    """Of products without weights: of tokens with tokens, and DeBERTa's with relative positions."""
    products = sum(4 * config.hidden_size * _pairs(batch, window) for window in _windows(config))
    relative = config.num_hidden_layers * len(_relative_kinds(config)) * _relative_positions(config)
    return products + 2 * batch.num_tokens * relative * config.hidden_size


def _rows(plan: _ModulePlan, name: str, batch: Batch) -> int:
    """How many rows a linear map is applied to."""
    config = plan.model.config
    if plan.component(name) == "head":
        return 0 if plan.base == "" else len(batch.head_positions)
    if not name.startswith(plan.layers):
        return batch.num_tokens
    times = config.num_hidden_layers if families.family_of(config).shared_layers else 1
    return times * (batch.num_tokens * (".pos_" not in name) + _relative_rows(config, name))


def _relative_rows(config: Any, name: str) -> int:
    """Of embeddings of relative positions."""
    own = "" if getattr(config, "share_att_key", False) else "pos_"
    maps = {f"{own}{RELATIVE_MAPS[kind]}" for kind in _relative_kinds(config)}
    return _relative_positions(config) if maps & set(name.split(".")) else 0


def _relative_kinds(config: Any) -> list[str]:
    return list(config.pos_att_type or ()) if getattr(config, "relative_attention", False) else []


def _relative_positions(config: Any) -> int:
    if not _relative_kinds(config):
        return 0
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    buckets = getattr(config, "position_buckets", -1)
    return 2 * (buckets if buckets > 0 else longest)


def _windows(config: Any) -> list[int | None]:
    """Of each layer, how far a token sees; None: as far as its sequence goes."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _pairs(batch: Batch, window: int | None) -> int:
    """Pairs of tokens of one sequence that see each other."""
    lengths = batch.lengths.double()
    everything = lengths**2
    if window is None:
        return int(everything.sum())
    near = lengths * (2 * window + 1) - window * (window + 1)
    return int(torch.where(lengths > window, near, everything).sum())


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a compact form, by component."""

    weights: dict[str, int]
    nonzero: dict[str, int]


def stored_weights(model: PreTrainedModel) -> StoredWeights:
    """Shared ones are counted once, where they come first."""
    plan = _ModulePlan(model)
    found = StoredWeights(dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0))
    for name, weight in compressed_module.iter_weights(model, COMPACT):
        part = plan.component(name)
        found.weights[part] += weight.numel()
        found.nonzero[part] += int(torch.count_nonzero(weight))
    return found


def exported(model: PreTrainedModel) -> int:
    """Weights of the ordinary folder."""
    return sum(weight.numel() for _, weight in compressed_module.iter_weights(model, MERGED))


def footprint(model: PreTrainedModel, batch: Batch) -> dict[str, float]:
    """`parameters` of the ordinary folder, `stored` and of them `nonzero` of the compact form, and its FLOPs per token
    of the batch; the last three by component too."""
    weights, arithmetic = stored_weights(model), flops(model, batch)
    per_token = {name: count / batch.num_tokens for name, count in arithmetic.items()}
    return {
        "parameters": exported(model),
        "stored": sum(weights.weights.values()),
        "nonzero": sum(weights.nonzero.values()),
        FLOPS: sum(per_token.values()),
        **{f"stored/{name}": count for name, count in weights.weights.items()},
        **{f"nonzero/{name}": count for name, count in weights.nonzero.items()},
        **{f"{FLOPS}/{name}": count for name, count in per_token.items()},
    }


def table_on_disk(export: Path) -> dict[str, float]:
    """`on_disk` as `of` is."""
    return {f"bytes/{form}": size for form, size in on_disk(export).items()}


def on_disk(export: Path) -> dict[str, int]:
    """Bytes of the weights, by form; of the forms that are there."""
    found = {form: list(export.glob(pattern)) for form, pattern in FORMS.items()}
    return {form: sum(file.stat().st_size for file in files) for form, files in found.items() if files}
