"""Every key that can be written, misspelt by each kind of typing error: refused, and the right one named."""

import random
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from config_schemas import schema_of
from launching import ROOT
from pydantic import BaseModel

from lad_dist.compression.registry import COMPRESSIONS
from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.errors import UserError
from lad_dist.config.load import (
    apply_overrides,
    keyword_parameters,
    lookup,
    parse_config,
    parse_override,
    read_toml,
    validate_arguments,
)
from lad_dist.config.schema import (
    ConfigTable,
    EvaluateConfig,
    PretrainConfig,
    SearchConfig,
    TaskConfig,
    TrainConfig,
)
from lad_dist.models.families import FAMILIES
from lad_dist.models.hf_config import architecture_config
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.search.grid import sample_trials
from lad_dist.training import deepspeed_schema, run_spec

NAMED = 0.98  # share of the typing errors whose key must be named
KINDS = ("drop", "double", "swap", "replace")
Path_ = tuple[str | int, ...]
Check = Callable[[Any], Any]


def misspelt(word: str, kind: str, others: Iterable[str]) -> str | None:
    """Return the word with one typing error, the same in each run.

    None where every such error gives one of `others`, or the word itself.
    """
    chance = random.Random(f"{word} {kind}")
    for place in chance.sample(range(len(word)), len(word)):
        before, letter, after = word[:place], word[place], word[place + 1 :]
        wrong = {
            "drop": before + after,
            "double": before + 2 * letter + after,
            "swap": before + after[:1] + letter + after[1:],
            "replace": before + chance.choice(string.ascii_lowercase.replace(letter, "")) + after,
        }[kind]
        if wrong and wrong != word and wrong not in others:
            return wrong
    return None


@dataclass(frozen=True)
class Slip:
    """A typing error in the last key of a path."""

    path: Path_
    wrong: str
    others: frozenset[str]  # the keys of that table

    @property
    def right(self) -> str:
        return str(self.path[-1])

    @property
    def dotted(self) -> str:
        return ".".join([*map(str, self.path[:-1]), self.wrong])


def slips(path: Path_, others: Iterable[str]) -> Iterator[Slip]:
    for kind in KINDS:
        wrong = misspelt(str(path[-1]), kind, set(others))
        if wrong is not None:
            yield Slip(path, wrong, frozenset(others))


def renamed(tables: dict[str, Any], slip: Slip, value: Any = 1) -> dict[str, Any]:
    """A copy in which the key is misspelt; a key that is absent is added, with the value."""
    tables = deepcopy(tables)
    table: Any = tables
    for key in slip.path[:-1]:
        table = table[key] if isinstance(table, list) else table.setdefault(key, {})
    table[slip.wrong] = table.pop(slip.right, value)
    return tables


def complaint(check: Check, tables: Any) -> str | None:
    """Return the message of a check, None where it accepts."""
    try:
        check(tables)
    except UserError as error:
        return str(error)
    return None


@dataclass
class Count:
    """How many were tried, and those that failed."""

    tried: int
    accepted: list[str]
    unnamed: list[str]


def count(check: Check, slips_and_tables: Iterable[tuple[Slip, Any]]) -> Count:
    result = Count(0, [], [])
    for slip, tables in slips_and_tables:
        message = complaint(check, tables)
        result.tried += 1
        if message is None:
            result.accepted.append(slip.dotted)
        elif not _names(message, slip):
            result.unnamed.append(f"{slip.dotted}: {message}")
    return result


def _names(message: str, slip: Slip) -> bool:
    """Whether the right key is what is suggested, at most beside another that is as near."""
    _, separator, suggestion = message.rpartition("did you mean ")
    near = suggestion.rstrip("?").split(" or ")
    return slip.wrong in message and bool(separator) and f'"{slip.right}"' in near and len(near) <= 2


def assert_named(result: Count) -> None:
    assert result.tried > 0
    assert not result.accepted
    assert len(result.unnamed) <= (1 - NAMED) * result.tried, result.unnamed
    print(f"{result.tried - len(result.unnamed)} of {result.tried} named")


SOURCE = {"kind": "text", "path": "books"}
TRAINED = {"student": {"path": "s", "num_hidden_layers": 2}, "teacher": {"path": "teacher"}, "optim": {"lr": 1e-3}}
RUN = {
    "run": {"name": "toy", "steps": 1},
    "objective": {"name": "kd"},
    "compression": [{"name": "scale_position_embeddings", "scale": 0.5}],
}
TABLES: dict[type[ConfigTable], dict[str, Any]] = {
    TaskConfig: {**RUN, **TRAINED, "data": {"task": "rte"}, "deepspeed": {}},
    PretrainConfig: {**RUN, **TRAINED, "data": {"shards": "shards"}, "deepspeed": {}},
    PrepareConfig: {"out": "out", "tokenizer": "words", "source": [SOURCE]},
    TokenizerConfig: {"out": "out", "kind": "unigram", "vocab_size": 100, "lowercase": True, "source": [SOURCE]},
    EvaluateConfig: {"model": {"path": "m"}, "teacher": {"path": "t"}, "data": {"task": "rte"}},
    SearchConfig: {"search": {"name": "s", "base": "b"}, "space": {"optim.lr": {"uniform": [0.1, 0.2]}}},
}


def paths(schema: type[BaseModel], tables: Any, prefix: Path_ = ()) -> Iterator[tuple[Path_, list[str]]]:
    """Every key that a schema has, and those beside it."""
    names = list(schema.model_fields)
    for name in names:
        yield (*prefix, name), names
        inner = tables.get(name)
        if isinstance(inner, list):
            yield from paths(_model(schema, name), inner[0], (*prefix, name, 0))
        elif (model := _model(schema, name)) is not None:
            yield from paths(model, inner, (*prefix, name))


def _model(schema: type[BaseModel], name: str) -> Any:
    from lad_dist.config.load import tables_in

    return next(iter(tables_in(schema.model_fields[name].annotation)), None)


def of_schema(schema: type[ConfigTable]) -> Check:
    def check(tables: dict[str, Any]) -> None:
        config = parse_config(schema, tables, where="toy.toml")
        if isinstance(config, TrainConfig):
            run_spec.resolve_options(config)
            deepspeed_schema.check_keys(config.deepspeed)
            if config.student.architecture is not None:
                architecture_config(config.student.architecture, 100)
        elif isinstance(config, SearchConfig) and Path(config.search.base).exists():
            sample_trials(config)

    return check


@pytest.mark.parametrize("schema", TABLES, ids=lambda schema: schema.__name__)
def test_keys_of_schemas(schema: type[ConfigTable]) -> None:
    tables = TABLES[schema]
    assert complaint(of_schema(schema), tables) is None
    tried = [(slip, renamed(tables, slip)) for path, others in paths(schema, tables) for slip in slips(path, others)]
    assert_named(count(of_schema(schema), tried))


@pytest.mark.parametrize("schema", TABLES, ids=lambda schema: schema.__name__)
def test_keys_of_overrides(schema: type[ConfigTable]) -> None:
    tables = TABLES[schema]
    tried = [
        (slip, apply_overrides(tables, [parse_override(f"{slip.dotted}=1")]))
        for path, others in paths(schema, tables)
        if not any(isinstance(key, int) for key in path)
        for slip in slips(path, others)
    ]
    assert_named(count(of_schema(schema), tried))


@pytest.mark.parametrize(
    ("where", "choices"), [("objective", OBJECTIVES), ("compression", COMPRESSIONS)], ids=["objectives", "compressions"]
)
def test_arguments(where: str, choices: Mapping[str, Any]) -> None:
    tried = []
    for function in choices.values():
        names = keyword_parameters(function)
        required = {key: 0.5 for key, parameter in names.items() if parameter.default is parameter.empty}
        tried += [(slip, (function, renamed(required, slip))) for key in names for slip in slips((key,), names)]
    assert_named(count(lambda pair: validate_arguments(where, *pair), tried))


@pytest.mark.parametrize(
    "choices", [OBJECTIVES, COMPRESSIONS, FAMILIES], ids=["objective", "compression", "model_type"]
)
def test_names(choices: Mapping[str, Any]) -> None:
    tried = [(slip, slip.wrong) for name in choices for slip in slips((name,), choices)]
    assert_named(count(lambda wrong: lookup("name", wrong, choices), tried))


@pytest.mark.parametrize("place", deepspeed_schema.KEYS)
def test_keys_of_deepspeed(place: str) -> None:
    path = tuple(place.split(".")) if place else ()
    others = deepspeed_schema.KEYS[place]
    tried = [
        (slip, renamed({}, slip, {} if key in deepspeed_schema.KEYS else 1))
        for key in sorted(others)
        for slip in slips((*path, key), others)
    ]
    assert_named(count(deepspeed_schema.check_keys, tried))


def test_deepspeed_has_these_keys() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    keys: dict[str, frozenset[str]] = {"": deepspeed_schema.KEYS[""]}
    inside = [("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config), ("fp16", DeepSpeedFP16Config)]
    while inside:
        place, schema = inside.pop()
        fields = schema.model_fields
        keys[place] = frozenset(fields) | {field.alias for field in fields.values() if field.alias}
        inside += [(f"{place}.{name}", inner) for name, field in fields.items() for inner in _blocks(field.annotation)]
    assert keys == deepspeed_schema.KEYS


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    from typing import get_args

    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_keys_in_shipped_configs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tables = read_toml(file)
    schema = schema_of(tables)
    for axis, choices in tables.get("grid", {}).items():
        tables["grid"][axis] = {str(sorted(written(choice))): choice for choice in choices.values()}  # alike ones once
        tables["grid"][axis] = {f"{n}": choice for n, choice in enumerate(tables["grid"][axis].values())}
    keys = [path for path in written(tables) if not _is_free(path)]
    assert_named(count(of_schema(schema), [(slip, renamed(tables, slip)) for path in keys for slip in slips(path, ())]))


def written(tables: Any, prefix: Path_ = ()) -> Iterator[Path_]:
    """The keys in tables and in lists of tables."""
    for key, value in tables.items() if isinstance(tables, dict) else enumerate(tables):
        path = (*prefix, key)
        if isinstance(key, str):
            yield path
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            yield from written(value, path)


def _is_free(path: Path_) -> bool:
    """Names that the user gives: axes and choices of a grid."""
    return path[0] == "grid" and len(path) in (2, 3)
