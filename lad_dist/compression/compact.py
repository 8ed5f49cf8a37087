"""Compact: a student in as few bytes as it has, beside the ordinary folder or in its stead.

    pack(student)               its small forms, before its Parts are folded away
    Packed.save(folder, ..)     the files: compact.safetensors, mask.safetensors
    load(folder)                an export's model in its compact form: a low-rank pair is a pair
    load_masked(folder, base)   an export's model as its masks over a base
    masks, replace_masks        the masks alone

An ordinary folder has no place for pairs of factors, and writes each zero in four bytes. Here a weight of which
enough is 0 is one bit a weight (`NAME.bits`, row after row, in numpy's order, its shape in the file's metadata) and the
values that are not 0 (`NAME.values`). A student that only chose among weights that never changed is, but for its head,
1/32 of its base: many tasks cost one model and a mask each (Gao, Colombo and Wang, 2021).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lad_dist.compression import compressed_module
from lad_dist.compression.compressed_module import COMPACT, MERGED, ToPlain
from lad_dist.compression.layers import keep_layers
from lad_dist.compression.pruning.module import GlobalPruning, MaskedModule
from lad_dist.config.errors import UserError
from lad_dist.models import loading
from lad_dist.models.frozen import weights_digest
from lad_dist.models.heads import head_of_architectures, label_names
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import PreTrainedModel, new_model

COMPACT_FILE, MASK_FILE = "compact.safetensors", "mask.safetensors"
BITS, VALUES = ".bits", ".values"


@dataclass(frozen=True)
class CompactExport:
    """Small forms of a student; empty where it has none."""

    compact: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    digest: str  # of the weights under the masks and beside them that did not change
    shapes: Mapping[str, Sequence[int]]
    dtype: str  # to which those had been rounded

    def save(self, folder: Path, base: str | None, layers: Sequence[int] | None) -> None:
        """Into an export. `base`, `layers`: what the student started from."""
        if self.compact:
            self._write(folder / COMPACT_FILE, self.compact)
        if self.masks:
            self._write(folder / MASK_FILE, self.masks, base=base, layers=layers, digest=self.digest, dtype=self.dtype)

    def _write(self, path: Path, values: Mapping[str, Tensor], **facts: Any) -> None:
        shapes = {name: shape for name, shape in self.shapes.items() if name + BITS in values}
        facts = {"format": 1, "shapes": shapes, **facts}
        save_file(dict(values), path, {name: json.dumps(fact) for name, fact in facts.items()})


def pack(student: PreTrainedModel) -> CompactExport:
    """In fp32, on the CPU. Compact, where that takes fewer bytes than the ordinary form; as masks, where the weights
    under them did not train."""
    weights = dict(_plain(student, COMPACT)) if compressed_module.compressed_modules(student) else {}
    compact = dict(pair for name, weight in weights.items() for pair in _packed(name, weight))
    if _bytes(compact) >= 4 * sum(weight.numel() for _, weight in compressed_module.iter_weights(student, MERGED)):
        compact = {}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    dtype = str(student.dtype).removeprefix("torch.")
    masked = _over_frozen(student)
    if not masked:
        return CompactExport(compact, {}, "", shapes, dtype)
    masks = {f"{name}.weight{BITS}": _bits(part.mask.keep) for name, part in masked.items()}
    frozen, learnt = _side_tensors(student, masked)
    return CompactExport(compact, masks | learnt, weights_digest(frozen), shapes, dtype)


def _plain(student: nn.Module, plain: ToPlain) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight.detach().float().cpu()) for name, weight in compressed_module.iter_weights(student, plain))


def _packed(name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    bits, values = _bits(weight != 0), weight[weight != 0]
    if bits.nbytes + values.nbytes < weight.nbytes:
        return [(name + BITS, bits), (name + VALUES, values)]
    return [(name, weight.contiguous())]


def _unpacked(values: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    whole = {name: value for name, value in values.items() if not name.endswith((BITS, VALUES))}
    for name in {name.removesuffix(BITS) for name in values if name.endswith(BITS)}:
        mask = _mask(values[name + BITS], shapes[name])
        whole[name] = torch.zeros(mask.shape).masked_scatter(mask, values[name + VALUES])
    return whole


def _bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.astype(bool)).view(*shape)


def _bytes(values: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in values.values())


def _over_frozen(student: nn.Module) -> dict[str, MaskedModule]:
    """The masked weights by name, where that is all there is to the student and none of them trains."""
    masked = {name: part for name, part in student.named_modules() if isinstance(part, MaskedModule)}
    others = any(
        not isinstance(part, MaskedModule | GlobalPruning) for part in compressed_module.compressed_modules(student)
    )
    return {} if others or any(part.origin.requires_grad for part in masked.values()) else masked


def _side_tensors(student: nn.Module, masked: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights that did not change, without their masks, and those that learnt, by their names in the plain model."""
    plain = {f"{name}.inner.{own}": f"{name}.{own}" for name in masked for own in ("weight", "bias")}
    scores = tuple(f"{name}.mask." for name in masked)
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, weight in student.named_parameters():
        if not name.startswith(scores):
            sides[weight.requires_grad][plain.get(name, name)] = weight.detach().float().cpu()
    return sides


def load_compact(folder: str | Path) -> PreTrainedModel:
    """The model of an export, in its compact form where one lies there, otherwise in its ordinary one, ready to run.
    Raises UserError."""
    path = Path(folder) / COMPACT_FILE
    config = load_hf_config(str(folder))
    head = head_of_architectures(config.architectures or ())
    if not path.exists():
        return loading.load_model(str(folder), head, whole=True)
    values, facts = _read(path)
    model = new_model(config, head)
    weights = _unpacked(values, facts["shapes"])
    if head == "none":
        weights = _encoder(model, weights)
    for name in [name.removesuffix(".1.weight") for name in weights if name.endswith(".1.weight")]:
        _split(model, name, len(weights[f"{name}.1.weight"][0]))
    return _filled(path, model, weights)


def _encoder(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the head of a pre-training, and with the pooler that it lacks, as `models.load` has it."""
    prefix = f"{model.base_model_prefix}."
    inside = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    pooler = {name: weight.detach() for name, weight in model.named_parameters() if name.startswith("pooler.")}
    return pooler | (inside or dict(weights))


def _split(model: nn.Module, name: str, rank: int) -> None:
    """A pair of that rank in a module's place."""
    parent, _, child = name.rpartition(".")
    plain = model.get_submodule(name)
    if isinstance(plain, nn.Embedding):
        rows, width = plain.weight.shape
        inner: nn.Module = nn.Embedding(rows, rank, plain.padding_idx)
        outer = nn.Linear(rank, width, bias=False)
    else:
        assert isinstance(plain, nn.Linear)
        inner = nn.Linear(plain.in_features, rank, bias=False)
        outer = nn.Linear(rank, plain.out_features, bias=plain.bias is not None)
    setattr(model.get_submodule(parent), child, nn.Sequential(inner, outer))


def load_masked(folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """The model of an export that is masks over a base, ready to run. Of the export, config.json and mask.safetensors
    are read, and not its weights. `base`: where the base lies now, by default where it lay. Raises UserError, also
    where the base is not the one that the masks were learnt over."""
    path = Path(folder) / MASK_FILE
    config = load_hf_config(str(folder))
    values, facts = _read(path)
    place = base or facts["base"]
    model = loading.load_model(place, head_of_architectures(config.architectures or ()), labels=label_names(config))
    model = keep_layers(model, facts["layers"])
    learnt = {name: value for name, value in values.items() if not name.endswith(BITS)}
    dtype = getattr(torch, facts["dtype"])
    weights = {name: weight.detach().to(dtype).float() for name, weight in model.named_parameters()}
    if weights_digest({name: weight for name, weight in weights.items() if name not in learnt}) != facts["digest"]:
        raise UserError(f"{place}: its weights are not those that {path} was learnt over")
    for name, mask in _masks(values, facts["shapes"]).items():
        weights[name] = weights[name] * mask
    return _filled(path, model, weights | learnt)


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Of a mask.safetensors, by weight [O, I]: True where it stays. Raises UserError."""
    values, facts = _read(Path(path))
    if "shapes" not in facts:
        raise UserError(f"{path}: holds no masks; name a {MASK_FILE}")
    return _masks(values, facts["shapes"])


def replace_masks(path: Path, kept: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the mask.safetensors at `path` into a folder, with other masks."""
    values, facts = _read(path)
    values |= {name + BITS: _bits(mask) for name, mask in kept.items()}
    save_file(values, folder / MASK_FILE, {name: json.dumps(fact) for name, fact in facts.items()})


def _masks(values: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    names = [name.removesuffix(BITS) for name in values if name.endswith(BITS)]
    return {name: _mask(values[name + BITS], shapes[name]) for name in names}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(fact) for name, fact in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _filled(path: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with all its weights from a file. Raises UserError where they are others."""
    own = {name: weight.shape for name, weight in model.named_parameters()}
    found = {name: weight.shape for name, weight in weights.items()}
    if own != found:
        wrong = min(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
        raise UserError(f"{path}: is not of the model that config.json beside it describes, see {wrong}")
    model.load_state_dict(dict(weights), strict=False)  # a weight that several modules share is there once
    return model.eval()
