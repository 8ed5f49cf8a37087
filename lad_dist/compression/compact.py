"""Compact exports: a student in as few bytes as it has, beside the ordinary folder or instead of it.

An ordinary folder has no place for pairs of factors or layers of different sizes, and writes each zero in four bytes.
Here a weight with enough zeros is stored as two tensors. `NAME.bits` has one bit for each weight, row after row, in
numpy's order; the shape is in the file's metadata. `NAME.values` has the values that are not 0. A student that only
chose among weights that never changed is, but for its head, 1/32 of its base: many tasks cost one model and a mask each
(Gao, Colombo and Wang, 2021). Rounded weights are a byte each, uint8 codes: a weight is (code + `NAME.low`) times
`NAME.scale`.
"""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lad_dist.compression.compressed_module import COMPACT, MERGED, compressed_modules, iter_weights
from lad_dist.compression.layers import keep_layers
from lad_dist.compression.pruning.module import GlobalPruning, MaskedModule
from lad_dist.compression.quantize import Grid
from lad_dist.config.errors import UserError
from lad_dist.models import families, loading
from lad_dist.models.frozen import weights_digest
from lad_dist.models.heads import head_of, label_names
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import PreTrainedModel, new_model

COMPACT_FILE, MASK_FILE = "compact.safetensors", "mask.safetensors"
BITS, VALUES = ".bits", ".values"
LOW, SCALE = ".low", ".scale"


@dataclass(frozen=True)
class CompactExport:
    """The small forms of a student; empty where it has none."""

    compact: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    digest: str  # of the weights under the masks and beside them that did not change
    shapes: Mapping[str, Sequence[int]]
    dtype: str  # to which those had been rounded

    def save(self, folder: Path, base: str | None, layers: Sequence[int] | None) -> None:
        """Write the files into an export. `base`, `layers`: what the student started from."""
        if self.compact:
            self._write(folder / COMPACT_FILE, self.compact)
        if self.masks:
            self._write(folder / MASK_FILE, self.masks, base=base, layers=layers, digest=self.digest, dtype=self.dtype)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
        shapes = {name: shape for name, shape in self.shapes.items() if name + BITS in tensors}
        metadata = {"format": 1, "shapes": shapes, **metadata}
        save_file(dict(tensors), path, _encode_metadata(metadata))


def pack(student: PreTrainedModel) -> CompactExport:
    """Return the small forms of a student, in fp32, on the CPU.

    The compact form is there where it takes fewer bytes than the ordinary form, the masks where the weights under them
    did not train.
    """
    weights = _compact_weights(student) if compressed_modules(student) else {}
    compact = dict(pair for name, weight in weights.items() for pair in _pack_weight(name, weight))
    if sum(tensor.nbytes for tensor in compact.values()) >= 4 * sum(
        weight.numel() for _, weight in iter_weights(student, MERGED)
    ):
        compact = {}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    dtype = str(student.dtype).removeprefix("torch.")
    masked = _masks_over_frozen(student)
    if not masked:
        return CompactExport(compact, {}, "", shapes, dtype)
    masks = {f"{name}.weight{BITS}": _pack_bits(module.mask.keep) for name, module in masked.items()}
    frozen, trained = _frozen_and_trained(student, masked)
    return CompactExport(compact, masks | trained, weights_digest(frozen), shapes, dtype)


def _compact_weights(student: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of the compact form by name; one that a head shares has the encoder's name for it."""
    weights, encoder = list(iter_weights(student, COMPACT)), list(iter_weights(student.base_model, COMPACT))
    prefix = "" if student.base_model is student else f"{student.base_model_prefix}."
    names = {id(weight): prefix + name for name, weight in encoder}
    return {names.get(id(weight), name): weight.detach().float().cpu() for name, weight in weights}


def _pack_weight(name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """Return the smallest of the forms that a weight has: whole or without zeros, in fp32 or as codes."""
    forms = [_pack_zeros(name, weight, weight)]
    for grid in (Grid.of_weight(weight), Grid.of_table(weight)) if weight.dim() == 2 else ():
        codes = grid.codes(weight)
        if torch.equal(codes * grid.scale, weight):
            stored = _pack_zeros(name, weight, (codes - grid.low).to(torch.uint8))
            forms.append([*stored, (name + LOW, grid.low), (name + SCALE, grid.scale)])
    return min(forms, key=lambda form: sum(tensor.nbytes for _, tensor in form))


def _pack_zeros(name: str, weight: Tensor, stored: Tensor) -> list[tuple[str, Tensor]]:
    """Return what is stored of a weight: all of it, or bits and what is not 0."""
    bits, values = _pack_bits(weight != 0), stored[weight != 0]
    if bits.nbytes + values.nbytes < stored.nbytes:
        return [(name + BITS, bits), (name + VALUES, values)]
    return [(name, stored.contiguous())]


def _unpack_weights(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith((BITS, VALUES, LOW, SCALE))}
    for name, mask in _unpack_masks(tensors, shapes).items():
        zero = -tensors.get(name + LOW, torch.zeros(()))
        weights[name] = zero.expand(mask.shape).masked_scatter(mask, tensors[name + VALUES].float())
    for name in [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]:
        weights[name] = (weights[name] + tensors[name + LOW]) * tensors[name + SCALE]
    return weights


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.astype(bool)).view(*shape)


def _masks_over_frozen(student: nn.Module) -> dict[str, MaskedModule]:
    """Return the masked modules by name; none where a masked weight trains, or the student has other compressions."""
    masked = {name: module for name, module in student.named_modules() if isinstance(module, MaskedModule)}
    others = any(not isinstance(module, MaskedModule | GlobalPruning) for module in compressed_modules(student))
    return {} if others or any(module.origin.requires_grad for module in masked.values()) else masked


def _frozen_and_trained(student: nn.Module, masked: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights that did not train, without their masks, and those that did, by their names when merged."""
    merged_names = {f"{name}.inner.{kind}": f"{name}.{kind}" for name in masked for kind in ("weight", "bias")}
    scores = tuple(f"{name}.mask." for name in masked)
    weights: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, weight in student.named_parameters():
        if not name.startswith(scores):
            weights[weight.requires_grad][merged_names.get(name, name)] = weight.detach().float().cpu()
    return weights


def load_compact(folder: str | Path) -> PreTrainedModel:
    """Return the model of an export, ready to run. Raise UserError where it cannot be read.

    It has the compact form where the export has one, otherwise the ordinary one.
    """
    path = Path(folder) / COMPACT_FILE
    config = load_hf_config(str(folder))
    head = head_of(config)
    if not path.exists():
        return loading.load_model(str(folder), head, require_head=True)
    tensors, metadata = _read_tensors(path)
    model = new_model(config, head)
    weights = _unpack_weights(tensors, metadata["shapes"])
    if head == "none":
        weights = _encoder_weights(model, weights)
    for name, module in list(model.named_modules()):
        weight, pair = weights.get(f"{name}.weight"), (f"{name}.0.weight", f"{name}.1.weight")
        if isinstance(module, nn.Linear | nn.Embedding) and weights.keys() >= set(pair):
            _insert_pair(model, name, weights[pair[1]].shape[1])
        elif weight is not None and _is_thin(config, name, module, weight):
            rows, columns = weight.shape
            model.set_submodule(name, nn.Linear(columns, rows, bias=module.bias is not None))
    return _load_weights(path, model, weights)


def _is_thin(config: Any, name: str, module: nn.Module, weight: Tensor) -> bool:
    """Return whether a module of a layer has lost the rows or columns of pruned heads or units."""
    paths = families.family_of(config).modules.by_role().values()
    if not isinstance(module, nn.Linear) or not any(f".{name}".endswith(f".{path}") for path in paths):
        return False
    return weight.shape != module.weight.shape and all(map(operator.le, weight.shape, module.weight.shape))


def _encoder_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without a pre-training head, and with the model's new pooler where they have none."""
    prefix = f"{model.base_model_prefix}."
    encoder = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    pooler = {name: weight.detach() for name, weight in model.named_parameters() if name.startswith("pooler.")}
    return pooler | (encoder or dict(weights))


def _insert_pair(model: nn.Module, name: str, rank: int) -> None:
    """Replace a module by a pair of that rank."""
    plain = model.get_submodule(name)
    if isinstance(plain, nn.Embedding):
        rows, width = plain.weight.shape
        inner: nn.Module = nn.Embedding(rows, rank, plain.padding_idx)
        outer = nn.Linear(rank, width, bias=False)
    else:
        assert isinstance(plain, nn.Linear)
        inner = nn.Linear(plain.in_features, rank, bias=False)
        outer = nn.Linear(rank, plain.out_features, bias=plain.bias is not None)
    model.set_submodule(name, nn.Sequential(inner, outer))


def load_masked(folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Return the model of an export that is masks over a base, ready to run.

    Of the export, config.json and mask.safetensors are read, and not its weights. `base` is where the base is now, by
    default where it was. Raise UserError where a file cannot be read, or the base is not the one of the masks.
    """
    path = Path(folder) / MASK_FILE
    config = load_hf_config(str(folder))
    tensors, metadata = _read_tensors(path)
    base = base or metadata["base"]
    model = loading.load_model(base, head_of(config), labels=label_names(config))
    model = keep_layers(model, metadata["layers"])
    trained = {name: tensor for name, tensor in tensors.items() if not name.endswith(BITS)}
    dtype = getattr(torch, metadata["dtype"])
    weights = {name: weight.detach().to(dtype).float() for name, weight in model.named_parameters()}
    digest = weights_digest({name: weight for name, weight in weights.items() if name not in trained})
    if digest != metadata["digest"]:
        raise UserError(f"{base}: is not the base of {path}, whose masks were learnt over other weights")
    for name, mask in _unpack_masks(tensors, metadata["shapes"]).items():
        weights[name] = weights[name] * mask
    return _load_weights(path, model, weights | trained)


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Return the masks of a mask.safetensors by weight [O, I]: True where it stays. Raise UserError."""
    tensors, metadata = _read_tensors(Path(path))
    if "shapes" not in metadata:
        raise UserError(f"{path}: holds no masks; name a {MASK_FILE}")
    return _unpack_masks(tensors, metadata["shapes"])


def replace_masks(path: Path, masks: Mapping[str, Tensor], folder: Path) -> None:
    """Write the mask.safetensors at `path` into a folder, with other masks."""
    tensors, metadata = _read_tensors(path)
    tensors |= {name + BITS: _pack_bits(mask) for name, mask in masks.items()}
    save_file(tensors, folder / MASK_FILE, _encode_metadata(metadata))


def _unpack_masks(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    names = [name.removesuffix(BITS) for name in tensors if name.endswith(BITS)]
    return {name: _unpack_bits(tensors[name + BITS], shapes[name]) for name in names}


def _encode_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in metadata.items()}


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file. Raise UserError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _load_weights(path: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return the model with all its weights from a file. Raise UserError where they have other names or shapes."""
    expected = {name: weight.shape for name, weight in model.named_parameters()}
    shapes = {name: weight.shape for name, weight in weights.items()}
    if expected != shapes:
        wrong = min(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise UserError(f"{path}: is not of the model that config.json beside it describes, see {wrong}")
    model.load_state_dict(dict(weights), strict=False)  # a weight that several modules share comes once
    return model.eval()
