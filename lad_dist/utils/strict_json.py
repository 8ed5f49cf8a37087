"""JSON that is read strictly: no repeated keys, no half surrogate pairs."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Raises ValueError also for what Python's reader lets pass: a key that stands twice, half a surrogate pair, and
    nesting that it cannot follow."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower() and not _is_text(value):
        raise ValueError("half a surrogate pair")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = [key for key, _ in pairs]
        twice = next(key for key in seen if seen.count(key) > 1)
        raise ValueError(f'"{twice}" stands twice')
    return found


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
