"""Reading configs: TOML files, dotted overrides, checks. Every mistake is a UserError of one line."""

import contextlib
import importlib
import inspect
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import PydanticUndefined

from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.schema import ConfigTable, train_schema
from lad_dist.config.search_schema import SearchConfig
from lad_dist.config.shipped import config_file
from lad_dist.utils.suggest import did_you_mean, nearest
from lad_dist.utils.text import is_encodable, one_line

UNSET = "none"  # the value of an override that unsets its key
MAX_DEPTH = 16  # tables in tables
MAX_SHOWN = 60  # characters of a wrong value
OWN_CLASS = "my_package.module:Class"

Schema = TypeVar("Schema", bound=ConfigTable)
Base = TypeVar("Base")


def load_config(schema: type[Schema], path: str | Path, overrides: Iterable[str] = ()) -> Schema:
    """Return the config in a TOML file after the overrides.

    Raises:
        UserError: The file or a key is wrong; the message names the nearest right key.
    """
    tables = read_toml(path)
    changes = [parse_override(text, schema) for text in overrides]
    for key in [key for key, value in changes if value is None]:
        _check_set(tables, key, str(path))
    return parse_config(schema, apply_overrides(tables, changes), where=str(path))


def _check_set(tables: Any, key: str, where: str) -> None:
    """Raise UserError where the tables hold no such key: to unset a misspelt one would do nothing in silence."""
    for name in key.split("."):
        if isinstance(tables, list):
            tables = {str(number): table for number, table in enumerate(tables)}
        if not isinstance(tables, dict) or name not in tables:
            hint = did_you_mean(name, tables) if isinstance(tables, dict) else ""
            raise UserError(f"{key}={UNSET}: {where} does not set this key; {hint}".rstrip("; "))
        tables = tables[name]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the plain tables of a TOML file, or of a shipped config; raise UserError where it cannot be read."""
    file = config_file(path)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (at byte {error.start}); a config is TOML, a text in UTF-8") from None
    except (ValueError, RecursionError) as error:  # tomllib's own, and int's for thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}; fix the file") from None


def schema_of(tables: Mapping[str, Any]) -> type[ConfigTable]:
    """Return the schema that a config is written for, by its tables."""
    schemas: dict[str, type[ConfigTable]] = {
        "search": SearchConfig,
        "model": EvaluateConfig,
        "vocab_size": TokenizerConfig,
        "source": PrepareConfig,
    }
    return next((schema for key, schema in schemas.items() if key in tables), train_schema(tables))


def parse_override(text: str, schema: type[ConfigTable] | None = None) -> tuple[str, Any]:
    """Return `"a.b=value"` as `("a.b", value)`.

    The value is TOML, a bare word for a string, or `none`, which is None: the key is to be unset. Where the key is a
    string of the schema, a number, a date or `true` is a word too, as written: 007 stays 007.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{text!r}: an override is written key.subkey=value")
    if value in (UNSET, "None"):  # as Python spells it
        return key, None
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError) as error:
        if value.lstrip()[:1] in ("[", "{", '"', "'"):
            raise UserError(f"{text!r}: not a TOML value: {error}") from None
        return key, value
    is_word = schema is not None and not isinstance(parsed, str | list | dict) and _is_string(schema, key)
    return key, value.strip() if is_word else parsed


def _is_string(schema: type[ConfigTable], key: str) -> bool:
    """Return whether the schema has a dotted key that is a string, or a string or none."""
    *outer, name = key.split(".")
    table = _table_at(schema, outer)
    field = table.model_fields.get(name) if table is not None else None
    return field is not None and str in (field.annotation, *typing.get_args(field.annotation))


def apply_overrides(tables: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a copy of the tables with each `("a.b", value)` set; None unsets the key.

    `("a.0.b", value)` sets the key in the first table of a list.
    """
    result = dict(tables)
    for key, value in changes:
        result = _with_value(result, key.split("."), value, key)
    return result


def _with_value(tables: Any, path: list[str], value: Any, key: str) -> Any:
    """Return a copy of a table, or of a list of tables, with the value set."""
    head, *rest = path
    if isinstance(tables, list):
        numbered = {str(number): table for number, table in enumerate(tables)}
        if head not in numbered:
            hint = 'did you mean "0"?' if len(tables) == 1 else did_you_mean(head, numbered)
            raise UserError(f"{key}: no number {head} in a list of {len(tables)}, counted from 0; {hint}")
        return list(_with_value(numbered, path, value, key).values())
    if not rest:
        others = {name: other for name, other in tables.items() if name != head}
        return others if value is None else {**tables, head: value}
    inner = tables.get(head, {})
    if not isinstance(inner, dict | list):
        raise UserError(f"{key}: {head} is not a table, nothing can be set inside it")
    return {**tables, head: _with_value(inner, rest, value, key)}


def parse_config(schema: type[Schema], tables: Mapping[str, Any], where: str) -> Schema:
    """Return plain tables as a config; raise UserError for the first mistake, with `where` in front."""
    _check_values(tables, where)
    try:
        return schema.model_validate(dict(tables))
    except ValidationError as error:
        raise UserError(f"{where}: {first_mistake(error, schema)}") from None


def _check_values(tables: Mapping[str, Any], where: str) -> None:
    """Raise UserError for valid TOML that no config can hold: deep tables, and texts that no file or path can hold."""
    level: list[tuple[str, Any]] = [("", tables)]
    for _ in range(MAX_DEPTH):
        level = [inner for place, value in level for inner in _items(place, value)]
        for place, value in level:
            if isinstance(value, str) and ("\0" in value or not is_encodable(value)):
                raise UserError(f"{where}: {place}: {_shown(value)} holds a character that no text can; retype it")
    if level:
        raise UserError(f"{where}: {level[0][0][:40]}…: more than {MAX_DEPTH} tables deep; no key is so deep")


def _items(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each item of a table or list."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        yield from ((f"{place}.{key}" if place else str(key), inner) for key, inner in items)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def dump_config(config: ConfigTable) -> str:
    """Return the config as TOML, with every default written out; TOML has no None."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def with_defaults(schema: type[ConfigTable], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of a stored config, with keys that are new since at their defaults."""
    result = dict(tables)
    for name, field in schema.model_fields.items():
        inner = tables_in(field.annotation)
        if inner and isinstance(result.get(name), Mapping):
            result[name] = with_defaults(inner[0], result[name])
        elif not inner and field.default is not PydanticUndefined and field.default is not None:
            result.setdefault(name, field.default)
    return result


def is_of_earlier_version(tables: Mapping[str, Any]) -> bool:
    """Return whether a training's config, as its run wrote it, has keys that the schema does not know."""
    try:
        train_schema(tables).model_validate(tables)
    except ValidationError as error:
        return any(mistake["type"] == "extra_forbidden" for mistake in error.errors())
    return False


def check_writable(key: str, folder: str | Path) -> None:
    """Raise UserError where the folder cannot be created or written to."""
    existing = Path(folder)
    try:
        while not existing.exists():
            existing = existing.parent
        writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except OSError:  # a name that is too long
        writable = False
    if not writable:
        raise UserError(f"{key} = {_shown(str(folder))}: {existing} is no folder that can be written; give another")


def lookup(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    """Return choices[name]; raise UserError with the nearest name where there is none."""
    if name not in choices:
        raise UserError(f'{what} "{name}" is unknown: {did_you_mean(name, choices)}')
    return choices[name]


def find_class(what: str, name: str, choices: Mapping[str, type[Base]], base: type[Base]) -> type[Base]:
    """Return choices[name], or import the class that a name "my_package.module:Class" means.

    The module is an installed one, or stands in the working directory, to which relative paths of a config belong too.
    The working directory becomes the last entry of `sys.path`, so a file in it hides no installed module. Processes of
    launchers and trials of a search run in the working directory of the command, so they find the same module.

    Raises:
        UserError: The name is not registered, the import fails, or the module has no such subclass of `base`; the
            message begins with `what`, the key that has the name.
    """
    if name in choices:
        return choices[name]
    if ":" not in name:
        hint = f'{did_you_mean(name, choices)} (a class of your own: "{OWN_CLASS}")'
        raise UserError(f'{what} "{name}" is unknown: {hint}')
    module_name, _, class_name = name.partition(":")
    where = f'{what} "{name}"'
    if not all(map(str.isidentifier, [*module_name.split("."), class_name])):
        raise UserError(f'{where}: write a class of your own as "{OWN_CLASS}"')
    module = _import_module(where, module_name)
    kind = getattr(module, class_name, None)
    if kind is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        place = getattr(module, "__file__", None) or module_name
        raise UserError(f"{where}: {place} has no {class_name}; {did_you_mean(class_name, classes)}")
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise UserError(f"{where}: {class_name} is no subclass of {base.__module__}.{base.__qualname__}")
    return kind


@contextlib.contextmanager
def own_code(where: str, name: str) -> Iterator[None]:
    """Turn what a class of the user raises in this context into UserError; `name`: the class, as a config names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or ":" not in name:
            raise
        raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}; mend the class") from error


def _import_module(where: str, name: str) -> ModuleType:
    """Import an installed module or one of the working directory; raise UserError where that fails."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{where}: no module {error.name}, neither installed nor in {os.getcwd()}") from None
        reason = f"{type(error).__name__}: {one_line(error)}"
        command = f'python -c "import {name}" shows where'
        raise UserError(f"{where}: the import of {name} fails ({reason}); {command}") from error


def validate_arguments(where: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword-only arguments of a function: the options, and its defaults for the others.

    Raises:
        UserError: An option does not fit the function's signature; the message begins with `where`.
    """
    fields = {name: _field_of(parameter) for name, parameter in keyword_parameters(function).items()}
    schema: type[ConfigTable] = create_model(where, __base__=ConfigTable, **fields)  # type: ignore[call-overload]
    return parse_config(schema, options, where).model_dump()


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a function or of a class's constructor."""
    signature = inspect.signature(function, eval_str=True)
    return {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def _field_of(parameter: inspect.Parameter) -> tuple[Any, Any]:
    """Return a parameter as pydantic's create_model takes it; without an annotation it may be anything."""
    annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
    return annotation, ... if parameter.default is parameter.empty else parameter.default


def first_mistake(error: ValidationError, schema: type[BaseModel] | None = None) -> str:
    """Return the first mistake of a validation in one line: the dotted key, what is wrong, and the value.

    With the schema of the config, a misspelt key is answered with the nearest right one.
    """
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    path = [str(key) for key in first["loc"] if not _is_union_tag(key)]
    if schema is not None and first["type"] == "extra_forbidden":
        kind = "table" if first["loc"][:-1] == () and isinstance(first.get("input"), dict) else "key"
        return f"{'.'.join(path)}: no such {kind}; {did_you_mean(path[-1], _key_names(schema, path[:-1]))}"
    if schema is not None and first["type"] == "missing":
        *outer, name = path
        # A name may stand beside any other, so only the unknown ones are candidates.
        similar = nearest(name, first["input"].keys() - _key_names(schema, outer))
        reason = "missing, and it has no default"
        reason = f'{similar[0]}: no such key; did you mean "{name}"?' if similar else f"{name}: {reason}"
        return ".".join([*outer, reason])
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict | BaseModel) else f", not {_shown(first['input'])}"
    if first["type"] == "bool_type" and first["input"] in ("True", "False"):
        value += f"; write {first['input'].lower()}"
    return f"{'.'.join(path)}: {message[0].lower() + message[1:]}{value}" if path else message


def _is_union_tag(key: Any) -> bool:
    """Return whether a piece of an error's place names a type of a union, not a key."""
    return isinstance(key, str) and ("[" in key or key in ("int", "float", "str", "constrained-str", "bool"))


def _key_names(schema: type[BaseModel], path: list[str]) -> list[str]:
    """Return the keys of the table at a path."""
    table = _table_at(schema, path)
    assert table is not None
    return [name for key, field in table.model_fields.items() for name in (key, field.alias) if name]


def _table_at(schema: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """Return the schema of the table at a path, None where the schema has no such table."""
    table: type[BaseModel] | None = schema
    for key in path:
        if table is not None and not key.isdigit():
            field = table.model_fields.get(key)
            table = next(iter(tables_in(field.annotation)), None) if field is not None else None
    return table


def tables_in(annotation: Any) -> list[type[Any]]:
    """Return the tables that an annotation names: X, X | None, list[X]."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for inner in typing.get_args(annotation) for table in tables_in(inner)]
