"""Footprint: the weights and the arithmetic of a model, counted as those of its compact form.

A low-rank pair counts as the pair where that is cheaper, a replaced layer as its successor. Weights that are zero take
part in every product all the same. The model stays as it is: each compressed module returns its plain module.

The name of a weight says its component. Outside of layers all that is not of embeddings or attention goes with the
head: poolers, norms after the last layer.

B sequences, N tokens of all of them, R rows that the head reads, D width.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lad_dist.compression.compressed_module import COMPACT, MERGED, iter_modules, iter_weights
from lad_dist.core.batch import Batch
from lad_dist.models.dims import encoder_layers
from lad_dist.models.families import family_of, lies_in
from lad_dist.models.loading import PreTrainedModel

COMPONENTS = ("embeddings", "attention", "feed_forward", "head")
FLOPS = "forward_flops_per_token"
ONNX, FP16, INT8 = "onnx", "onnx fp16", "onnx int8"
# The forms of a model in its folder: their names, and the files that hold their weights.
FORMS = {
    "safetensors": "model*.safetensors",
    "compact": "compact.safetensors",
    "masks": "mask.safetensors",
    ONNX: "onnx/model.onnx",
    FP16: "onnx/model.fp16.onnx",
    INT8: "onnx/model.int8.onnx",
}


@dataclass(frozen=True)
class _ComponentMap:
    """The components of a model's modules and weights, by name."""

    model: PreTrainedModel

    @cached_property
    def base_prefix(self) -> str:
        base = self.model.base_model
        return next(f"{name}." if name else "" for name, module in self.model.named_modules() if module is base)

    @cached_property
    def layers_prefix(self) -> str:
        stack = encoder_layers(self.model)
        return next(f"{name}." for name, module in self.model.named_modules() if module is stack)

    def component(self, name: str) -> str:
        """Return the component of the module or weight of that name."""
        if not name.startswith(self.base_prefix):
            return "head"
        name_in_base = name.removeprefix(self.base_prefix)
        if any(lies_in(name_in_base, path) for path in family_of(self.model.config).attention_modules):
            return "attention"
        if name.startswith(self.layers_prefix):
            return "feed_forward"
        return "embeddings" if "embedding" in name_in_base else "head"

    @cached_property
    def attention_widths(self) -> list[int]:
        """For each layer of the compact form, how wide all its heads are together."""
        path = family_of(self.model.config).modules.attention_output
        outputs = [module for name, module in iter_modules(self.model, COMPACT) if f".{name}".endswith(f".{path}")]
        return [next(m for m in module.modules() if isinstance(m, nn.Linear)).in_features for module in outputs]


def flops(model: PreTrainedModel, *batches: Batch) -> dict[str, int]:
    """Return by component the multiply-adds times two of a forward of the compact form over each of the batches.

    Linear maps and attention's scores and sums count, padding does not.
    """
    components, counts = _ComponentMap(model), dict.fromkeys(COMPONENTS, 0)
    modules = iter_modules(model, COMPACT)
    maps = [(name, module) for name, module in modules if isinstance(module, nn.Linear | nn.Conv1d)]
    for batch in batches:
        for name, module in maps:
            rows = _rows(components, name, batch) if isinstance(module, nn.Linear) else batch.num_tokens
            counts[components.component(name)] += 2 * rows * module.weight.numel()
        counts["attention"] += _attention_flops(components, batch)
    return counts


def _attention_flops(components: _ComponentMap, batch: Batch) -> int:
    """Return those of products without weights: of tokens with tokens, and DeBERTa's with relative positions."""
    config = components.model.config
    widths = components.attention_widths * (config.num_hidden_layers if family_of(config).shared_layers else 1)
    products = sum(4 * width * _pairs(batch, window) for width, window in zip(widths, _windows(config), strict=True))
    family = family_of(config)
    maps = config.num_hidden_layers * len(family.relative_position_maps(config))
    return products + 2 * batch.num_tokens * maps * family.relative_positions(config) * config.hidden_size


def _rows(components: _ComponentMap, name: str, batch: Batch) -> int:
    """Return the number of rows that a linear map is applied to."""
    config = components.model.config
    if components.component(name) == "head":
        return 0 if components.base_prefix == "" else len(batch.head_positions)
    if not name.startswith(components.layers_prefix):
        return batch.num_tokens
    family, rows = family_of(config), batch.num_tokens
    if any(lies_in(name, path) for path in (family.modules.position_query, family.modules.position_key) if path):
        rows = 0
    if any(lies_in(name, path) for path in family.relative_position_maps(config)):
        rows += family.relative_positions(config)
    times = config.num_hidden_layers if family.shared_layers else 1
    return times * rows


def _windows(config: Any) -> list[int | None]:
    """Return for each layer how far a token attends; None: to its whole sequence."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _pairs(batch: Batch, window: int | None) -> int:
    """Return the number of pairs of tokens of one sequence that attend to each other."""
    lengths = batch.lengths.double()
    all_pairs = lengths**2
    if window is None:
        return int(all_pairs.sum())
    near_pairs = lengths * (2 * window + 1) - window * (window + 1)
    return int(torch.where(lengths > window, near_pairs, all_pairs).sum())


def stored_weights(model: PreTrainedModel) -> tuple[dict[str, int], dict[str, int]]:
    """Count the weights of the compact form by component, all and those that are not 0; shared ones once."""
    components = _ComponentMap(model)
    weights, nonzero = dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0)
    for name, weight in iter_weights(model, COMPACT):
        component = components.component(name)
        weights[component] += weight.numel()
        nonzero[component] += int(torch.count_nonzero(weight))
    return weights, nonzero


def exported_weights(model: PreTrainedModel) -> int:
    """Return the number of weights of the ordinary folder."""
    return sum(weight.numel() for _, weight in iter_weights(model, MERGED))


def footprint(model: PreTrainedModel, batch: Batch) -> dict[str, float]:
    """Return the counts of a model as a flat table.

    `parameters` are those of the ordinary folder; `stored` and `nonzero` those of the compact form; FLOPS its FLOPs for
    each token of the batch. The last three are there by component too.
    """
    stored, nonzero = stored_weights(model)
    per_token = {name: count / batch.num_tokens for name, count in flops(model, batch).items()}
    return {
        "parameters": exported_weights(model),
        "stored": sum(stored.values()),
        "nonzero": sum(nonzero.values()),
        FLOPS: sum(per_token.values()),
        **{f"stored/{name}": count for name, count in stored.items()},
        **{f"nonzero/{name}": count for name, count in nonzero.items()},
        **{f"{FLOPS}/{name}": count for name, count in per_token.items()},
    }


def bytes_table(export: Path) -> dict[str, float]:
    """Return the bytes of the weights by form, for the forms that the export has, as a flat table."""
    files_of_form = {form: list(export.glob(pattern)) for form, pattern in FORMS.items()}
    return {
        f"bytes/{form}": sum(file.stat().st_size for file in files) for form, files in files_of_form.items() if files
    }
