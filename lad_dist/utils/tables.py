"""Nested tables, as TOML and JSON hold them."""

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(tables: Mapping[str, Any], *, into_lists: bool = False) -> dict[str, Any]:
    """Return the values of nested tables by their dotted keys: `{"data": {"task": "rte"}}` as `{"data.task": "rte"}`.

    Args:
        tables: The tables. A key may have dots itself; of a key that occurs twice, the last value counts.
        into_lists: Whether a list of tables is flattened too, its number as a part of the key: `compression.0.name`.
    """
    values: dict[str, Any] = {}
    for key, value in _leaves(tables, "", into_lists):
        values.pop(key, None)  # the key moves to the place of its last value
        values[key] = value
    return values


def _leaves(tables: Mapping[str, Any], prefix: str, into_lists: bool) -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.", into_lists)
        elif into_lists and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from _leaves({str(number): item for number, item in enumerate(value)}, f"{prefix}{key}.", into_lists)
        else:
            yield f"{prefix}{key}", value
