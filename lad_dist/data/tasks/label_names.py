"""Labels as files spell them: words or whole numbers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lad_dist.utils.suggest import did_you_mean

SEPARATOR = "|"  # between the names of an example's labels in one text
UNCLEAR = re.compile(r"^\s|\s$|[,;\[\]]")  # of a name in such a text: it may be several names, or a list
DEFAULT_NAME = re.compile(r"LABEL_\d+")  # of an output, where transformers was given none
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
        advice = did_you_mean(name, ids)
        if all(map(DEFAULT_NAME.fullmatch, ids)):
            advice = f"the outputs of the model are {', '.join(ids)}; give data.labels, the labels in their order"
        raise ValueError(f'label "{name}" is unknown: {advice}')
    return ids[name]


def label_list(known: Sequence[str] | None, value: Any) -> list[str]:
    """Return the labels of an example: a list of names, or a text with names and | between them, "" for no name.

    `known` are all names, None where the files say them. Raise ValueError for what is no such list, for a name that is
    there twice, and for a name in a text that is not known and looks like several.
    """
    cells = value
    if isinstance(value, str):
        cells = value.split(SEPARATOR) if value else []
    if not isinstance(cells, list):
        raise ValueError(f"label {value!r} is neither a list of names nor a text with {SEPARATOR} between names")
    names = [label_name(cell) for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'label "{name}" is given twice')
        if known is None and isinstance(value, str) and UNCLEAR.search(name):
            raise ValueError(
                f'label "{name}": in a text, names have {SEPARATOR} and no blank between them; where this is one name, '
                "list it in data.labels"
            )
    return names


def is_given(column: str, value: Any) -> bool:
    """Return whether an example has the label of a column of 0 and 1. Raise ValueError for other values."""
    if value not in (0, 1, "0", "1"):
        raise ValueError(f"{column} is {value!r}, neither 0 nor 1")
    return bool(int(value))


def multi_hot(ids: Mapping[str, int], names: Iterable[str]) -> list[float]:
    """Return 1 for each class id of the names and 0 for the others, [V]. Raise ValueError for an unknown name."""
    given = {class_id(ids, name) for name in names}
    return [float(number in given) for number in range(len(ids))]
