"""Reading configs: TOML files, dotted overrides, checks. Every mistake is a UserError of one line.

load_config(schema, path, overrides)   TOML file + ["optim.lr=1e-4", ...] -> a frozen config
apply_overrides(tables, overrides)     the same change on plain tables: command line, search and tests share it
parse_config(schema, tables, where)    plain tables -> a frozen config
dump_config(config)                    TOML text with every default written out
validate_arguments(...)                keyword arguments checked against a signature
"""

import inspect
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import PydanticUndefined

from lad_dist.config.errors import UserError
from lad_dist.config.schema import ConfigTable
from lad_dist.utils.suggest import did_you_mean, nearest

MAX_DEPTH = 16  # tables in tables
MAX_SHOWN = 60  # characters of a wrong value


Schema = TypeVar("Schema", bound=ConfigTable)


def load_config(schema: type[Schema], path: str | Path, overrides: Iterable[str] = ()) -> Schema:
    """The config in the TOML file `path` after the overrides. Raises UserError, naming file, key and nearest right
    key."""
    return parse_config(schema, apply_overrides(read_toml(path), map(parse_override, overrides)), where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The plain tables of a TOML file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (at byte {error.start}); a config is TOML, a text in UTF-8") from None
    except (ValueError, RecursionError) as error:  # of its own, and of a number with thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}; mend the file") from None


def parse_override(text: str) -> tuple[str, Any]:
    """`"a.b=value"` as `("a.b", value)`: the value in TOML, a bare word as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r}: an override is written key.subkey=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError) as error:
        if value.lstrip()[:1] in ("[", "{", '"', "'"):
            raise UserError(f"{text!r}: not a TOML value: {error}") from None
        return key.strip(), value


def apply_overrides(tables: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A copy of the tables with each `("a.b", value)` set; `("a.0.b", value)`: in the first of a list of tables."""
    result = dict(tables)
    for key, value in changes:
        result = _with_value(result, key.split("."), value, key)
    return result


def _with_value(tables: Any, path: list[str], value: Any, key: str) -> Any:
    """A copy of a table, or of a list of them, with the value set."""
    head, *rest = path
    if isinstance(tables, list):
        numbered = {str(number): table for number, table in enumerate(tables)}
        if head not in numbered:
            meant = 'did you mean "0"?' if len(tables) == 1 else did_you_mean(head, numbered)
            raise UserError(f"{key}: there is no {head} in a list of {len(tables)}, counted from 0; {meant}")
        return list(_with_value(numbered, path, value, key).values())
    if not rest:
        return {**tables, head: value}
    inner = tables.get(head, {})
    if not isinstance(inner, dict | list):
        raise UserError(f"{key}: {head} is not a table, nothing can be set inside it")
    return {**tables, head: _with_value(inner, rest, value, key)}


def parse_config(schema: type[Schema], tables: Mapping[str, Any], where: str) -> Schema:
    """Plain tables as a config. Raises UserError for the first mistake, `where` in front."""
    _check_values(tables, where)
    try:
        return schema.model_validate(dict(tables))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(schema, error)}") from None


def _check_values(tables: Mapping[str, Any], where: str) -> None:
    """Refuses what TOML allows and nothing here can use: tables in tables without end, and texts that no file has."""
    level: list[tuple[str, Any]] = [("", tables)]
    for _ in range(MAX_DEPTH):
        level = [inner for place, value in level for inner in _items(place, value)]
        for place, value in level:
            if isinstance(value, str) and not _is_text(value):
                raise UserError(f"{where}: {place}: {_shown(value)} holds a character that no text can; write it anew")
    if level:
        raise UserError(f"{where}: {level[0][0][:40]}…: more than {MAX_DEPTH} tables deep; no key stands there")


def _items(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        yield from ((f"{place}.{key}" if place else str(key), inner) for key, inner in items)


def _is_text(value: str) -> bool:
    """Whether it can be written down, and handed to the system as a path."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def dump_config(config: ConfigTable) -> str:
    """TOML with every default written out; what is None is left away."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def with_defaults(schema: type[ConfigTable], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a config as an earlier version wrote it, with the keys that it did not know at their defaults."""
    found = dict(tables)
    for name, field in schema.model_fields.items():
        inner = tables_in(field.annotation)
        if inner and isinstance(found.get(name), Mapping):
            found[name] = with_defaults(inner[0], found[name])
        elif not inner and field.default is not PydanticUndefined and field.default is not None:
            found.setdefault(name, field.default)
    return found


def check_writable(key: str, folder: str | Path) -> None:
    """Raises UserError where no such folder can be made or written to."""
    place = Path(folder)
    try:
        while not place.exists():
            place = place.parent
        fit = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a name that is too long
        fit = False
    if not fit:
        raise UserError(f"{key} = {_shown(str(folder))}: {place} is no folder that can be written; give another")


def lookup(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    """choices[name], or UserError with the nearest name."""
    if name not in choices:
        raise UserError(f'{what} "{name}" is unknown: {did_you_mean(name, choices)}')
    return choices[name]


def validate_arguments(where: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword-only arguments of `function` with `options` filled in, checked against its signature and completed
    by its defaults. Raises UserError naming `where`."""
    fields = {name: _field_of(parameter) for name, parameter in keyword_parameters(function).items()}
    schema: type[ConfigTable] = create_model(where, __base__=ConfigTable, **fields)  # type: ignore[call-overload]
    return parse_config(schema, options, where).model_dump()


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function or of a class's constructor."""
    signature = inspect.signature(function, eval_str=True)
    return {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def _field_of(parameter: inspect.Parameter) -> tuple[Any, Any]:
    return parameter.annotation, ... if parameter.default is parameter.empty else parameter.default


def _explain(schema: type[ConfigTable], error: ValidationError) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    path = [str(part) for part in first["loc"] if not _is_union_tag(part)]
    place = ".".join(path)
    if first["type"] == "extra_forbidden":
        names = _key_names(schema, path[:-1])
        kind = "table" if first["loc"][:-1] == () and isinstance(first.get("input"), dict) else "key"
        return f"{place}: no such {kind}; {did_you_mean(path[-1], names)}"
    if first["type"] == "missing":
        *outer, name = path
        like = nearest(
            name, first["input"].keys() - _key_names(schema, outer)
        )  # where a name may stand beside any other
        said = f'{like[0]}: no such key; did you mean "{name}"?' if like else f"{name}: missing, and it has no default"
        return ".".join([*outer, said])
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | BaseModel) else f", not {_shown(first['input'])}"
    return f"{place}: {message[0].lower() + message[1:]}{given}" if place else message


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool"))


def _key_names(schema: Any, path: list[str]) -> list[str]:
    for part in path:
        if not part.isdigit():
            schema = tables_in(schema.model_fields[part].annotation)[0]
    return list(schema.model_fields)


def tables_in(annotation: Any) -> list[type[ConfigTable]]:
    """The tables named in an annotation: X, X | None, list[X]."""
    if inspect.isclass(annotation) and issubclass(annotation, ConfigTable):
        return [annotation]
    return [table for inner in typing.get_args(annotation) for table in tables_in(inner)]
