"""Labels as files spell them: words or whole numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lad_dist.utils.suggest import did_you_mean


def label_name(value: Any) -> str:
    """Return a cell or a JSON value as a label. Raise ValueError for what is no label."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | int | np.integer) or value == "":
        raise ValueError(f"label {value!r} is neither a word nor a whole number")
    return str(value)


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in the order of their class ids: sorted, as numbers when all are, 2 before 10."""
    names = set(labels)
    are_numbers = all(name.lstrip("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if are_numbers else None))


def class_id(ids: Mapping[str, int], label: Any) -> int:
    """Return the class id of a label. Raise ValueError for an unknown one."""
    name = label_name(label)
    if name not in ids:
        raise ValueError(f'label "{name}" is unknown: {did_you_mean(name, ids)}')
    return ids[name]
