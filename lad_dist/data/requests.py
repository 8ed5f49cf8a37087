"""The requests that finished folders were written for: JSON tables, compared with the request of today."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.utils.strict_json import parse_json


def read_json_table(file: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raise UserError, which ends in `remedy`, where it is damaged."""
    try:
        return dict(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); {remedy}") from None


def differing_keys(stored: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """Return the keys of the request whose stored values are missing or others, sorted."""
    return sorted(key for key in request if stored.get(key) != request[key])


def require_same_request(out: Path, stored: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Raise UserError where the finished folder `out` was written for another request."""
    differing = differing_keys(stored, request)
    if differing:
        raise UserError(f"{out}: written with another {', '.join(differing)}; remove it or give another folder for out")


def require_unused(out: Path, content: str) -> None:
    """Raise UserError where `out` holds anything; `content` names what is about to be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and holds no {content}; give another folder for out")
