"""Descriptions of config keys: what `--help` prints."""

import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lad_dist.config.load import tables_in


def describe_keys(
    schema: type[BaseModel], prefix: str = "", required: str = "required"
) -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) for every key of a schema.

    A key without a default has the text `required`, in an optional table with the name of that table.
    """
    rows = []
    for name, field in schema.model_fields.items():
        tables = tables_in(field.annotation)
        repeated = typing.get_origin(field.annotation) is list
        if tables:
            table = f"[[{name}]]" if repeated else f"[{name}]"
            inner = required if field.is_required() else f"required in {table}"
            rows += describe_keys(tables[0], f"{prefix}{name}{'[]' if repeated else ''}.", inner)
        else:
            default = required if field.is_required() else _default(field)
            rows.append((prefix + name, type_name(field.annotation), default, field.description or ""))
    return rows


def type_name(annotation: Any) -> str:
    """Return an annotation as a user reads it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in inner)
    if origin is list:
        return f"[{type_name(inner[0])}]"
    if origin is dict:
        return "table"
    if inner:
        return " | ".join(type_name(member) for member in inner if member is not type(None))
    return {"str": "string", "Any": "any"}.get(annotation.__name__, annotation.__name__)


def _default(field: FieldInfo) -> str:
    return "-" if field.default is None else repr(field.default)
