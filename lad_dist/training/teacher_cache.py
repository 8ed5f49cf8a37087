"""Answers: what a frozen teacher says of each training example of a task, asked once and kept on disk.

    fields(needs)     names of what is kept of a Trace
    bytes_of(...)     what they take on disk
    Answers           asks for what is not there yet; then numbers of examples -> Trace

An answer is a function of the teacher and the example, not of the run: the teacher is asked block by block, in batches
of its own. So a run that finds all answers and one that has to ask learn from the same numbers, to the bit, whatever
its seed, its batches and its number of processes.

    <folder>/<digest>/about.json                    what the digest was taken of
                      hidden-4.00003.safetensors    one field of one block: `values` [N or R, …] and `starts`
                                                    [examples + 1], where each example's rows begin

The digest is over the teacher's weights and settings, the tokenized examples, and what computes them. A field has files
of its own, so runs that need other layers share those that they have in common. Files appear whole, so runs may fill
one folder at the same time; one that cannot be read is asked for again.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TeacherConfig
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import QKV, ModelDims, ModelOutputs, OutputSpec
from lad_dist.distributed import processes
from lad_dist.utils.atomic_io import fsync, temporary_path, write_text

FORMAT = 1
BLOCK = 256  # examples of a file
BATCH = 32  # examples that the teacher is asked about at once

AskTeacher = Callable[[Batch, OutputSpec], ModelOutputs]


class Examples(Protocol):
    """Tokenized examples, numbered from 0. `fingerprint` tells two sets of them apart."""

    @property
    def count(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def labels(self) -> np.ndarray: ...  # of all rows that the head reads

    @property
    def fingerprint(self) -> str: ...

    def batch(self, numbers: np.ndarray) -> Batch: ...


class _CachedColumn(NamedTuple):
    """A field of a block. `starts` are plain numbers: they are looked up one by one."""

    values: Tensor
    starts: list[int]


def fields(needs: OutputSpec) -> list[str]:
    """The names under which what is needed is kept."""
    attention = [f"{name}-{layer}" for layer in needs.qkv for name in QKV]
    return ["logits"] * needs.logits + [f"hidden-{layer}" for layer in needs.hidden] + attention


def _by_field(trace: ModelOutputs) -> dict[str, Tensor]:
    found = {f"hidden-{layer}": x for layer, x in trace.hidden.items()}
    for layer, qkv in trace.qkv.items():
        found |= {f"{name}-{layer}": x for name, x in zip(QKV, qkv, strict=True)}
    return found if trace.logits is None else found | {"logits": trace.logits}


def _trace(found: Mapping[str, Tensor], needs: OutputSpec) -> ModelOutputs:
    qkv = {layer: tuple(found[f"{name}-{layer}"] for name in QKV) for layer in needs.qkv}
    return ModelOutputs(found.get("logits"), {layer: found[f"hidden-{layer}"] for layer in needs.hidden}, qkv)  # type: ignore[arg-type]


def cache_bytes(needs: OutputSpec, teacher: ModelDims, examples: Examples, dtype: torch.dtype) -> int:
    """What the answers take on disk."""
    states = examples.tokens * teacher.hidden_size * (len(needs.hidden) + 3 * len(needs.qkv))
    return (states + len(examples.labels) * teacher.num_outputs * needs.logits) * dtype.itemsize


def worth_caching(words: TeacherConfig, steps: int, steps_per_epoch: float) -> bool:
    """Whether examples are read more than once, or other runs read them too."""
    return words.cache is not None or steps > steps_per_epoch


class TeacherCache:
    """numbers int [B] of examples -> Trace of them, end to end, on the device."""

    def __init__(
        self,
        folder: Path,
        ask: AskTeacher,
        about: Mapping[str, Any],
        examples: Examples,
        needs: OutputSpec,
        device: torch.device,
        size: int,
    ) -> None:
        """`about` identifies the teacher, `size` is that of all answers. Asks on all processes for what is not there
        yet. Raises UserError when the folder cannot hold it, or not all processes see it."""
        self._ask, self._examples, self._needs, self._device = ask, examples, needs, device
        self._fields = fields(needs)
        self._kept: dict[tuple[str, int], _CachedColumn] = {}
        about = {
            "format": FORMAT,
            **about,
            "examples": examples.fingerprint,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            write_text(self.folder / "about.json", text)
            self._fill(size)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot keep the teacher's answers there ({error.strerror})") from None
        processes.barrier()
        for block in range(self._blocks):
            for name in self._fields:
                self._kept[name, block] = self._whole(name, block)

    def __call__(self, numbers: np.ndarray) -> ModelOutputs:
        spots = [divmod(number, BLOCK) for number in numbers.tolist()]
        found = {name: torch.cat([self._rows(name, *spot) for spot in spots]) for name in self._fields}
        return _trace({name: self._device_copy(x) for name, x in found.items()}, self._needs)

    def _rows(self, name: str, block: int, place: int) -> Tensor:
        kept = self._kept[name, block]
        return kept.values[kept.starts[place] : kept.starts[place + 1]]

    def _device_copy(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else x

    @cached_property
    def _blocks(self) -> int:
        return -(-self._examples.count // BLOCK)

    def _file(self, name: str, block: int) -> Path:
        return self.folder / f"{name}.{block:05d}.safetensors"

    def _fill(self, size: int) -> None:
        """This process's share of what is missing. Runs that fill one folder together begin at different blocks."""
        world, rank = processes.world_size(), processes.rank()
        first = processes.from_main(os.getpid())
        order = [(first + block) % self._blocks for block in range(self._blocks)]
        missing = processes.from_main([block for block in order if self._missing(block)])
        _check_room(self.folder, size * len(missing) // self._blocks)
        for block in missing[rank::world]:
            if names := self._missing(block):
                self._answer(block, names)

    def _missing(self, block: int) -> list[str]:
        return [name for name in self._fields if not self._file(name, block).exists()]

    def _answer(self, block: int, names: Iterable[str]) -> None:
        """Asks about a block, and writes these fields."""
        numbers = np.arange(block * BLOCK, min((block + 1) * BLOCK, self._examples.count))
        spans = np.diff(self._examples.batch(numbers).cu_seqlens.numpy())
        by_length = np.argsort(spans, kind="stable")
        parts: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for begin in range(0, len(numbers), BATCH):
            chosen = by_length[begin : begin + BATCH]
            batch = self._examples.batch(numbers[chosen])
            found = _by_field(self._ask(batch.to(self._device), self._needs))
            for name, rows in parts.items():
                counts = _rows_of(batch) if name == "logits" else spans[chosen].tolist()
                rows.update(zip(chosen.tolist(), found[name].cpu().split(counts), strict=True))
        for name, rows in parts.items():
            self._write(self._file(name, block), [rows[place] for place in range(len(numbers))])

    def _write(self, file: Path, rows: list[Tensor]) -> None:
        starts = torch.tensor([0, *(len(x) for x in rows)]).cumsum(0)
        draft = temporary_path(file)
        try:
            save_file({"values": torch.cat(rows), "starts": starts}, draft)
            fsync(draft)
            os.replace(draft, file)
        except SafetensorError as error:
            raise OSError(None, str(error)) from None
        finally:
            draft.unlink(missing_ok=True)

    def _whole(self, name: str, block: int) -> _CachedColumn:
        file = self._file(name, block)
        for attempt in range(2):
            try:
                tensors = load_file(file)  # mapped, not read
                return _CachedColumn(tensors["values"], tensors["starts"].tolist())
            except (SafetensorError, KeyError) as error:
                if attempt:
                    raise UserError(f"{file}: cannot be read ({error}); remove it") from None
                print(f"{file}: damaged ({error}), asking the teacher again", file=sys.stderr)
                self._answer(block, [name])
            except FileNotFoundError:
                raise UserError(
                    f"{file}: another process wrote it and this one does not see it; "
                    "set teacher.cache to a folder that all nodes share"
                ) from None
        raise AssertionError


def _rows_of(batch: Batch) -> list[int]:
    """How many rows the head reads of each sequence."""
    sequence = np.searchsorted(batch.cu_seqlens.numpy(), batch.head_positions.numpy(), side="right") - 1
    return np.bincount(sequence, minlength=len(batch.lengths)).tolist()


def _check_room(folder: Path, size: int) -> None:
    """Raises UserError when the disk has no room for `size` bytes more."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: the teacher's answers take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "set teacher.cache to a folder on another disk, or teacher.cache_gb = 0 to ask it anew at each step"
        )
