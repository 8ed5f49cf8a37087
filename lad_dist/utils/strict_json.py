"""JSON that is read strictly: no repeated keys, no half surrogate pairs."""

import json
from typing import Any

from lad_dist.utils.text import is_encodable


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError also where Python's own reader does not: for a repeated key, half a surrogate pair, and nesting
    that is too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower() and not is_encodable(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half a surrogate pair")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{repeated}" stands twice')
    return table
