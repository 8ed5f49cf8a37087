"""What two runs of a case left: equal to the bit, or where they differ.

Nothing is compared that tells how fast a run was or where it lay.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from case_runs import rows
from cases import Case
from safetensors.torch import load_file
from torch import Tensor

SPEED = "tokens_per_second"  # a column
RESULTS = ("metrics", "student", "teacher")  # tables of results.json: scores and loyalty, sizes, the teacher's
SIZE_ON_DISK = "bytes/"  # of a table of results.json
WITH_A_TIME = "tensorboard/"  # where files have one in their names
EXPORTED = ("export/config.json", "export/tokenizer.json", "export/tokenizer_config.json")  # beside the tensors

Contents = Mapping[str, Any]


def contents(case: Case, folder: Path) -> Contents:
    """Return all that has to be equal, by place: numbers, tensors, the bytes of files, and the names of all files."""
    values: dict[str, Any] = {}
    for pattern in case.files or EXPORTED:
        values |= {f"the bytes of {path.relative_to(folder)}": path.read_bytes() for path in folder.glob(pattern)}
    if case.files:
        return values
    for row in rows(folder):
        values |= {f"{name} at step {row['step']}": x for name, x in row.items() if name not in ("step", SPEED)}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for table in RESULTS:
        numbers = {name: x for name, x in results[table].items() if not name.startswith(SIZE_ON_DISK)}
        values |= {f"{name} of {table} in results.json": x for name, x in numbers.items()}
    for file in sorted((folder / "export").glob("*.safetensors")):
        values |= {f"{name} in {file.name}": tensor for name, tensor in load_file(file).items()}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return values | {f"file {name}": True for name in names if not name.startswith(WITH_A_TIME)}


def differences(old: Contents, new: Contents) -> list[str]:
    """Return the places that differ, and by how much."""
    alone = [f"{place} is {'OLD' if place in old else 'NEW'}'s alone" for place in sorted(old.keys() ^ new.keys())]
    shared = [place for place in old if place in new and not _same(old[place], new[place])]
    return [*alone, *(f"{place} ({_distance(old[place], new[place])})" for place in shared)]


def _same(old: Any, new: Any) -> bool:
    """Compare numbers by repr, which tells all floats apart, and takes NaN for NaN; tensors by their bits."""
    if not isinstance(old, Tensor):
        return repr(old) == repr(new)
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (old, new)))


def _distance(old: Any, new: Any) -> str:
    if isinstance(old, Tensor) and old.shape == new.shape:
        return f"{(old.double() - new.double()).abs().max().item():.2g}"
    return f"{len(old)} and {len(new)} bytes" if isinstance(old, bytes) else f"{old} and {new}"
