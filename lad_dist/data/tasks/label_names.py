"""Labels as files spell them: words or whole numbers."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lad_dist.utils.suggest import did_you_mean

WHOLE_NUMBER = re.compile(r"-?\d{1,600}")  # Python may refuse to read more digits


def label_name(value: Any) -> str:
    """Return a cell or a JSON value as a label. Raise ValueError for what is no label."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | int | np.integer) or value == "":
        raise ValueError(f"label {value!r} is neither a word nor a whole number")
    return str(value)


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in the order of their class ids: sorted, as numbers when all are, 2 before 10.

    Spellings of one number, such as 01 and 1, are labels of their own, in the order of their characters.
    """
    names = sorted(set(labels))
    are_numbers = all(map(WHOLE_NUMBER.fullmatch, names))
    return tuple(sorted(names, key=int) if are_numbers else names)


def class_id(ids: Mapping[str, int], label: Any) -> int:
    """Return the class id of a label. Raise ValueError for an unknown one."""
    name = label_name(label)
    if name not in ids:
        raise ValueError(f'label "{name}" is unknown: {did_you_mean(name, ids)}')
    return ids[name]
