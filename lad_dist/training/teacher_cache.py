"""Teacher cache: the outputs of a frozen teacher for each training example of a task, computed once, stored on disk.

An output is a function of the teacher and the example, not of the run: the teacher runs block by block, in batches of
its own. So a run that reads all outputs and one that has to compute them learn from the same numbers, to the bit,
whatever the seed, the batches and the number of processes.

    <folder>/<digest>/about.json                    what the digest was taken of
                      hidden-4.00003.safetensors    one field of one block: `values` [N or R, …] and `starts`
                                                    [examples + 1], where each example's rows begin

The digest is over the teacher's weights and settings, the tokenized examples, and what computes them. A field has files
of its own, so runs that need other layers share those that they have in common. Files appear whole, so runs may fill
one folder at the same time. A file that cannot be read is computed again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import QKV, ModelDims, ModelOutputs, OutputSpec
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.data.tasks.examples import TaskExamples
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.logs import EVERY_RANK, get_logger
from lad_dist.models.frozen import FrozenModel
from lad_dist.training.run_spec import RunSpec
from lad_dist.utils import progress
from lad_dist.utils.atomic_io import fsync, temporary_path, write_text

FORMAT = 2
BLOCK_SIZE = 256  # examples of a file
BATCH_SIZE = 32  # examples of a forward of the teacher

logger = get_logger(__name__)


def field_names(output_spec: OutputSpec) -> list[str]:
    """Return the names of the fields that are stored."""
    attention = [f"{name}-{layer}" for layer in output_spec.qkv for name in QKV]
    return ["logits"] * output_spec.logits + [f"hidden-{layer}" for layer in output_spec.hidden] + attention


def _to_fields(outputs: ModelOutputs) -> dict[str, Tensor]:
    fields = {f"hidden-{layer}": x for layer, x in outputs.hidden.items()}
    for layer, qkv in outputs.qkv.items():
        fields |= {f"{name}-{layer}": x for name, x in zip(QKV, qkv, strict=True)}
    return fields if outputs.logits is None else fields | {"logits": outputs.logits}


def _from_fields(fields: Mapping[str, Tensor], output_spec: OutputSpec) -> ModelOutputs:
    hidden = {layer: fields[f"hidden-{layer}"] for layer in output_spec.hidden}
    qkv = {layer: tuple(fields[f"{name}-{layer}"] for name in QKV) for layer in output_spec.qkv}
    return ModelOutputs(fields.get("logits"), hidden, qkv)  # type: ignore[arg-type]


def count_values(output_spec: OutputSpec, teacher: ModelDims, tokens: int, head_rows: int) -> int:
    """Return how many numbers the teacher's outputs are, for so many tokens and rows that the head reads."""
    states = tokens * teacher.hidden_size * (len(output_spec.hidden) + 3 * len(output_spec.qkv))
    return states + head_rows * teacher.num_outputs * output_spec.logits


def decide_cache(
    spec: RunSpec, output_spec: OutputSpec, teacher_dataset: CorpusDataset | TaskDataset, scale: float = 1.0
) -> tuple[bool, int]:
    """Return whether the run uses a cache, and the bytes of all outputs: 0 where a cache saves nothing.

    There are `scale` times as many examples as in the dataset.

    It is used where it is read more than once and not larger than teacher.cache_gb. It is read again where the run
    reads more examples than there are, or where other runs read the same folder.
    """
    config = spec.config.teacher
    if config is None or not isinstance(teacher_dataset, TaskDataset):
        return False, 0
    if config.cache is None and spec.num_steps(teacher_dataset) <= teacher_dataset.steps_per_pass:
        return False, 0
    assert spec.teacher_dims is not None
    examples, dtype = teacher_dataset.train, getattr(torch, config.dtype or spec.precision)
    values = count_values(output_spec, spec.teacher_dims, examples.tokens, len(examples.labels))
    size = round(values * dtype.itemsize * scale)
    return size <= config.cache_gb * 1e9, size


class TeacherCache:
    """Maps numbers of examples, int [B], to the teacher's outputs for them, end to end, on the device."""

    def __init__(
        self, *, folder: Path, teacher: FrozenModel, examples: TaskExamples, output_spec: OutputSpec, size: int
    ) -> None:
        """Compute what is missing, shared out over all processes, and map all files into memory.

        Args:
            folder: The folder of all caches.
            teacher: Computes the outputs for a batch.
            examples: The examples.
            output_spec: Which outputs are stored.
            size: The bytes of all outputs.

        Raises:
            UserError: The folder cannot hold the outputs, or not all processes see it.
        """
        self._teacher, self._examples, self._output_spec = teacher, examples, output_spec
        self._device = processes.device()
        self._fields = field_names(output_spec)
        # By field and block: values and starts; these are Python integers, because they are read one by one.
        self._columns: dict[tuple[str, int], tuple[Tensor, list[int]]] = {}
        about = {
            "format": FORMAT,
            **teacher.identity,
            "examples": examples.fingerprint,
            "torch": torch.__version__,
            "device": processes.device_name(),
        }
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            write_text(self.folder / "about.json", text)
            self._fill(size)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot store the teacher's outputs in this folder ({error.strerror})"
            ) from None
        processes.barrier()
        for block in range(self._blocks):
            for name in self._fields:
                self._columns[name, block] = self._load(name, block)

    def __call__(self, numbers: np.ndarray) -> ModelOutputs:
        indices = [divmod(number, BLOCK_SIZE) for number in numbers.tolist()]
        fields = {name: torch.cat([self._rows(name, *index) for index in indices]) for name in self._fields}
        return _from_fields({name: self._device_copy(x) for name, x in fields.items()}, self._output_spec)

    def _rows(self, name: str, block: int, index: int) -> Tensor:
        values, starts = self._columns[name, block]
        return values[starts[index] : starts[index + 1]]

    def _device_copy(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else x

    @cached_property
    def _blocks(self) -> int:
        return -(-self._examples.count // BLOCK_SIZE)

    def _file(self, name: str, block: int) -> Path:
        return self.folder / f"{name}.{block:05d}.safetensors"

    def _fill(self, size: int) -> None:
        """Compute this process's share of what is missing.

        Runs that fill one folder at the same time begin at different blocks.
        """
        world, rank = ranks.world_size(), ranks.rank()
        first = processes.from_main(os.getpid())
        order = [(first + block) % self._blocks for block in range(self._blocks)]
        missing = processes.from_main([block for block in order if self._missing(block)])
        _check_room(self.folder, size * len(missing) // self._blocks)
        share = missing[rank::world]
        for done, block in enumerate(share):
            progress.report("asking the teacher", done, len(share), f"{BLOCK_SIZE} examples each")
            if names := self._missing(block):
                self._compute(block, names)
        progress.report("asking the teacher", len(share), len(share))

    def _missing(self, block: int) -> list[str]:
        return [name for name in self._fields if not self._file(name, block).exists()]

    def _compute(self, block: int, names: Iterable[str]) -> None:
        """Run the teacher on a block, and write these fields."""
        numbers = np.arange(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, self._examples.count))
        lengths = np.diff(self._examples.batch(numbers).cu_seqlens.numpy())
        by_length = np.argsort(lengths, kind="stable")
        rows_by_field: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for begin in range(0, len(numbers), BATCH_SIZE):
            indices = by_length[begin : begin + BATCH_SIZE]
            batch = self._examples.batch(numbers[indices])
            fields = _to_fields(self._teacher(batch.to(self._device), self._output_spec))
            for name, rows in rows_by_field.items():
                counts = _head_rows_per_sequence(batch) if name == "logits" else lengths[indices].tolist()
                rows.update(zip(indices.tolist(), fields[name].cpu().split(counts), strict=True))
        for name, rows in rows_by_field.items():
            self._write(self._file(name, block), [rows[index] for index in range(len(numbers))])

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

    def _load(self, name: str, block: int) -> tuple[Tensor, list[int]]:
        file = self._file(name, block)
        for attempt in range(2):
            try:
                tensors = load_file(file)  # mapped, not read
                return tensors["values"], tensors["starts"].tolist()
            except (SafetensorError, KeyError) as error:
                if attempt:
                    raise UserError(f"{file}: cannot be read ({error}); remove it") from None
                logger.warning("%s: damaged (%s), computing the teacher's outputs again", file, error, extra=EVERY_RANK)
                self._compute(block, [name])
            except FileNotFoundError:
                raise UserError(
                    f"{file}: another process wrote it and this one does not see it; "
                    "set teacher.cache to a folder that all nodes share"
                ) from None
        raise AssertionError


def _head_rows_per_sequence(batch: Batch) -> list[int]:
    """Return how many rows the head reads of each sequence."""
    sequence = np.searchsorted(batch.cu_seqlens.numpy(), batch.head_positions.numpy(), side="right") - 1
    return np.bincount(sequence, minlength=len(batch.lengths)).tolist()


def _check_room(folder: Path, size: int) -> None:
    """Raise UserError where the disk has no room for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: the teacher's outputs take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "set teacher.cache to a folder on another disk, or teacher.cache_gb = 0 to run the teacher at each step"
        )
