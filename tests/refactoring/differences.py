"""What two runs of a case left: equal to the bit, or where they differ.

    compare_runs(old, new)    every row of metrics.jsonl, every exported tensor, scores and sizes, the names of files
    compare_files(old, new)   files byte by byte

Nothing is compared that tells how fast a run was or where it lay.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from case_runs import rows
from safetensors.torch import load_file
from torch import Tensor

SPEED = ("tokens_per_second",)  # columns
ADDED = ("teacher/",)  # beginnings of columns that older commits do not log: the teacher's scores before the first step
RESULTS = ("metrics", "student", "teacher")  # tables of results.json: scores and loyalty, sizes, the teacher's
SIZE_ON_DISK = "bytes/"  # of a table of results.json
WITH_A_TIME = "tensorboard/"  # where files have one in their names
EXPORTED = ("config.json", "tokenizer.json", "tokenizer_config.json")  # beside the tensors


class Difference(NamedTuple):
    where: str
    size: float = math.inf  # the largest absolute one; infinite where numbers stand against none

    def __str__(self) -> str:
        return f"{self.where} ({self.size:.2g})" if math.isfinite(self.size) else self.where


class Comparison(NamedTuple):
    """How many rows, tensors and files were compared; the differences, first rows, then scores, then tensors."""

    differences: Sequence[Difference]
    rows: int = 0
    tensors: int = 0
    files: int = 0

    @property
    def verdict(self) -> str:
        if not self.differences:
            return "equal"
        numbers = [difference for difference in self.differences if math.isfinite(difference.size)]
        largest = max(numbers, key=lambda difference: difference.size, default=self.differences[0])
        return f"DIFFERENT in {len(self.differences)} places: first {self.differences[0]}; largest {largest}"


def compare_runs(old: Path, new: Path) -> Comparison:
    old_rows, new_rows = _rows(old), _rows(new)
    old_tensors, new_tensors = _tensors(old / "export"), _tensors(new / "export")
    differences = [
        *_between_rows(old_rows, new_rows),
        *_between_results(old, new),
        *_between_tensors(old_tensors, new_tensors),
        *_between_names("file", _files(old), _files(new)),
        *compare_files(old / "export", new / "export", EXPORTED).differences,
    ]
    return Comparison(differences, rows=len(old_rows), tensors=len(old_tensors))


def _rows(folder: Path) -> list[dict[str, float]]:
    """What a run logged, without the columns that newer commits log besides, and without rows of nothing else."""
    shared = [{name: x for name, x in row.items() if not name.startswith(ADDED)} for row in rows(folder)]
    return [row for row in shared if row.keys() != {"step"}]


def _between_rows(old: Sequence[Mapping[str, float]], new: Sequence[Mapping[str, float]]) -> Iterator[Difference]:
    if len(old) != len(new):
        yield Difference(f"metrics.jsonl has {len(old)} rows and {len(new)}")
    if not any("loss" in row for row in old):
        yield Difference("metrics.jsonl has no losses")
    for one, other in zip(old, new, strict=False):
        yield from _between_numbers(f" at step {one['step']}", one, other, ignored=SPEED)


def _between_results(old: Path, new: Path) -> Iterator[Difference]:
    for table in RESULTS:
        yield from _between_numbers(f" of {table} in results.json", _result(old, table), _result(new, table))


def _result(folder: Path, table: str) -> dict[str, float]:
    values = json.loads((folder / "results.json").read_text(encoding="utf-8"))[table]
    return {name: value for name, value in values.items() if not name.startswith(SIZE_ON_DISK)}


def _between_numbers(
    place: str, old: Mapping[str, Any], new: Mapping[str, Any], ignored: Iterable[str] = ()
) -> Iterator[Difference]:
    """Compare by repr, which tells all floats apart, and takes NaN for NaN."""
    yield from _between_names("column", old, new, place)
    for name, value in old.items():
        if name in new and name not in ignored and repr(value) != repr(new[name]):
            yield Difference(f"{name}{place}", _apart(value, new[name]))


def _between_names(kind: str, old: Iterable[str], new: Iterable[str], place: str = "") -> Iterator[Difference]:
    old, new = set(old), set(new)
    for name in sorted(old ^ new):
        yield Difference(f"{kind} {name}{place} is {'OLD' if name in old else 'NEW'}'s alone")


def _apart(old: Any, new: Any) -> float:
    size = abs(old - new) if isinstance(old, int | float) and isinstance(new, int | float) else math.inf
    return math.inf if math.isnan(size) else size


def _tensors(export: Path) -> dict[str, Tensor]:
    """Those of model.safetensors, and where they are there of compact.safetensors and mask.safetensors."""
    files = sorted(export.glob("*.safetensors"))
    return {f"{name} in {file.name}": tensor for file in files for name, tensor in load_file(file).items()}


def _between_tensors(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Iterator[Difference]:
    yield from _between_names("tensor", old, new)
    if not old:
        yield Difference("nothing was exported")
    for name, tensor in old.items():
        if name in new and not _same_bits(tensor, new[name]):
            yield _between_two_tensors(name, tensor, new[name])


def _same_bits(old: Tensor, new: Tensor) -> bool:
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (old, new)))


def _between_two_tensors(name: str, old: Tensor, new: Tensor) -> Difference:
    if old.shape != new.shape:
        return Difference(f"{name}: {list(old.shape)} and {list(new.shape)}")
    if old.dtype != new.dtype:
        return Difference(f"{name}: {old.dtype} and {new.dtype}")
    if not old.is_floating_point():
        return Difference(name)  # masks, packed to bytes
    size = (old.double() - new.double()).abs().max().item()
    return Difference(name, math.inf if math.isnan(size) else size)


def _files(folder: Path) -> set[str]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name for name in names if not name.startswith(WITH_A_TIME)}


def compare_files(old: Path, new: Path, patterns: Sequence[str]) -> Comparison:
    old_names, new_names = _matching(old, patterns), _matching(new, patterns)
    differences = [*_between_names("file", old_names, new_names)]
    if not old_names:
        differences.append(Difference(f"no file is called {' or '.join(patterns)}"))
    for name in sorted(old_names & new_names):
        if (old / name).read_bytes() != (new / name).read_bytes():
            differences.append(Difference(f"the bytes of {name}"))
    return Comparison(differences, files=len(old_names))


def _matching(folder: Path, patterns: Sequence[str]) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}
