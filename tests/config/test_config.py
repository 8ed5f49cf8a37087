"""A config is strict: every misspelt key is named with the right one, every value has its type."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lad_dist.compression.registry import COMPRESSIONS
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.describe import describe_keys
from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.load import (
    apply_overrides,
    dump_config,
    keyword_parameters,
    load_config,
    parse_config,
    parse_override,
    validate_arguments,
)
from lad_dist.config.schema import CHANGEABLE_KEYS, ConfigTable, PretrainConfig, TaskConfig, TrainConfig, train_schema
from lad_dist.config.search_schema import SearchConfig
from lad_dist.objectives.registry import OBJECTIVES

TASK: dict[str, Any] = {
    "run": {"name": "n", "steps": 1},
    "teacher": {"path": "t"},
    "student": {"path": "s"},
    "data": {"task": "rte"},
    "objective": {"name": "kd"},
    "optim": {"lr": 1e-4},
}
PRETRAIN = {**TASK, "data": {"shards": "c"}}
PREPARE: dict[str, Any] = {"out": "o", "tokenizer": "t", "source": [{"kind": "text", "path": "p"}]}
EVALUATE: dict[str, Any] = {"model": {"path": "m"}, "teacher": {"path": "t"}, "data": {"task": "rte"}}
SEARCH: dict[str, Any] = {
    "search": {"name": "n", "num_samples": 1, "metric": "accuracy"},
    "stage": [{"name": "task", "base": "b"}],
    "space": {"task.optim.lr": {"uniform": [0, 1]}},
}
SCHEMAS: list[tuple[type[ConfigTable], dict[str, Any]]] = [
    (TaskConfig, TASK),
    (PretrainConfig, PRETRAIN),
    (PrepareConfig, PREPARE),
    (EvaluateConfig, EVALUATE),
    (SearchConfig, SEARCH),
]


def misspelt(name: str) -> str:
    """Two neighbours swapped, as fingers do; one letter doubled where that is not enough."""
    swapped = name[:1] + name[2:3] + name[1:2] + name[3:]
    return swapped if swapped != name else name + name[-1]


def every_key() -> list[Any]:
    """(schema, tables, path of a table, key) for every key of every schema, as `describe_keys` lists them."""
    keys = []
    for schema, tables in SCHEMAS:
        rows = [row[0] for row in describe_keys(schema)]
        names = {tuple(row.replace("[]", "").split(".")) for row in rows}
        names |= {path[:1] for path in names}
        names -= {("objective", "name"), ("compression", "name")}  # beside these, keys are arguments: tested below
        keys += [pytest.param(schema, tables, path, id=f"{schema.__name__}-{'.'.join(path)}") for path in sorted(names)]
    return keys


@pytest.mark.parametrize(("schema", "tables", "path"), every_key())
def test_every_misspelt_key_is_named_with_the_right_one(
    schema: type[ConfigTable], tables: dict[str, Any], path: tuple[str, ...]
) -> None:
    *outer, key = path
    wrong = misspelt(key)
    changed = tomllib.loads(tomli_w.dumps(tables))
    table: Any = changed
    for name in outer:
        table = table.setdefault(name, {})
    if isinstance(table, list):
        table = table[0]
    table[wrong] = table.pop(key, {"x": 1} if not outer else "x")
    with pytest.raises(UserError) as caught:
        parse_config(schema, changed, "here.toml")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("here.toml: ")
    assert wrong in line
    assert f'did you mean "{key}"?' in line


NAMED = [(f"objective {name}", kind) for name, kind in OBJECTIVES.items()]
NAMED += [(f"compression {name}", function) for name, function in COMPRESSIONS.items()]


@pytest.mark.parametrize(
    ("where", "function", "key"), [(where, f, key) for where, f in NAMED for key in keyword_parameters(f)]
)
def test_every_misspelt_argument_is_named_with_the_right_one(where: str, function: Any, key: str) -> None:
    with pytest.raises(UserError, match=f'{misspelt(key)}: no such key; did you mean "{key}"') as caught:
        validate_arguments(where, function, {misspelt(key): 1})
    assert str(caught.value).startswith(f"{where}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.steps": 0}, "run.steps: input should be greater than or equal to 1, not 0"),
        ({"run": {"steps": 1}}, "run.name: missing, and it has no default"),
        ({"run": 1}, "run: input should be a valid dictionary or instance of RunConfig, not 1"),
        ({"teacher.path": ""}, "teacher.path: string should have at least 1 character, not ''"),
        ({"student.tokenizer": ""}, "student.tokenizer: string should have at least 1 character"),
        ({"optim.lr": "fast"}, "optim.lr: input should be a valid number, not 'fast'"),
        ({"optim.lr": 0.0}, "optim.lr: input should be greater than 0, not 0.0"),
        ({"optim.betas": [0.9]}, "optim.betas: "),
        ({"optim.betas": [0.9, 1.5]}, "optim.betas.1: "),
        ({"optim.schedule": "cosinus"}, "optim.schedule: input should be 'linear', 'cosine' or 'constant'"),
        ({"optim.warmup": 1.0}, "optim.warmup: input should be less than 1"),
        ({"data.max_length": 4}, "data.max_length: input should be greater than or equal to 8"),
        ({"data.task": None}, "data: give a GLUE task, or both train and dev files"),
        ({"data.train": "a.csv"}, "data: give a GLUE task or train and dev files, not both"),
        ({"data.pad_to": 64}, "data: pad_to = 64 is shorter than max_length = 128"),
        ({"student.path": None}, "student: give exactly one of path and architecture"),
        ({"student.architecture": {}}, "student: give exactly one of path and architecture"),
        ({"student.layers": "odd"}, "student.layers: "),
        ({"student.layers": [1, 0]}, "student.layers: "),
        (
            {"student.layers": [1, 2], "student.num_hidden_layers": 3},
            "student: num_hidden_layers = 3 contradicts the 2 layers listed",
        ),
        ({"teacher.dtype": "float16"}, "teacher.dtype: input should be 'float32' or 'bfloat16', not 'float16'"),
        ({"compression": {"name": "low_rank"}}, "compression: input should be a valid list"),
        ({"compression": [{"keep": 0.5}]}, "compression.0.name: missing, and it has no default"),
        ({"model": {"path": "x"}}, "model: no such table; "),
    ],
)
def test_values_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(TaskConfig, apply_overrides(TASK, changes.items()), "here.toml")
    line = str(caught.value)
    assert line.startswith(f"here.toml: {message}")
    assert "\n" not in line


def test_what_is_frozen_stays() -> None:
    config = parse_config(TaskConfig, TASK, "x")
    with pytest.raises(ValidationError):
        config.run.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(("schema", "tables"), SCHEMAS)
def test_dump_is_read_back_as_the_same_config(schema: type[ConfigTable], tables: dict[str, Any]) -> None:
    config = parse_config(schema, tables, "x")
    text = dump_config(config)
    assert parse_config(schema, tomllib.loads(text), "dump") == config
    assert dump_config(parse_config(schema, tomllib.loads(text), "dump")) == text


def test_dump_writes_every_default_out() -> None:
    written = tomllib.loads(dump_config(parse_config(TaskConfig, TASK, "x")))
    for key, _, default, _ in describe_keys(TaskConfig):
        if default == "-" or default.startswith("required") or "[]" in key:
            continue
        value: Any = written
        for name in key.split("."):
            value = value[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a.b = 1e-4", ("a.b", 1e-4)),
        ("a=true", ("a", True)),
        ("a=rte", ("a", "rte")),
        ('a="1"', ("a", "1")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a={x = 1}", ("a", {"x": 1})),
        ("a=runs/x=y", ("a", "runs/x=y")),
        ("a=google-bert/bert-base-uncased", ("a", "google-bert/bert-base-uncased")),
        ("a=", ("a", "")),
        ("run.seed=4711", ("run.seed", 4711)),  # from here on keys of a training, of which some are strings
        ("run.name=4711", ("run.name", "4711")),
        ("run.name=1e3", ("run.name", "1e3")),
        ("run.label = 2026-11-30", ("run.label", "2026-11-30")),
        ("data.train=true", ("data.train", "true")),
        ("teacher.cache=None", ("teacher.cache", None)),
        ("compression.0.name=7", ("compression.0.name", "7")),
        ("run.name=[1]", ("run.name", [1])),
    ],
)
def test_overrides_are_toml_and_a_bare_word_is_a_string(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text, TaskConfig) == expected


@pytest.mark.parametrize("text", ["a", "=1", " =1", "--steps", "a=[1,", 'a="x', "a={x}"])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_override(text)
    assert str(caught.value).startswith(repr(text))
    assert "\n" not in str(caught.value)


words = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=3)
tables_of = st.recursive(st.integers(), lambda inner: st.dictionaries(words, inner, max_size=3), max_leaves=8)


@given(st.dictionaries(words, tables_of, max_size=3), st.lists(words, min_size=1, max_size=3), st.integers())
def test_an_override_sets_one_key_and_nothing_else(tables: dict[str, Any], path: list[str], value: int) -> None:
    before = repr(tables)
    try:
        changed = apply_overrides(tables, [(".".join(path), value)])
    except UserError:
        return  # a value stands where a table should
    finally:
        assert repr(tables) == before
    inner: Any = changed
    for name in path:
        inner = inner[name]
    assert inner == value
    assert {k: v for k, v in changed.items() if k != path[0]} == {k: v for k, v in tables.items() if k != path[0]}


def test_an_override_inside_a_list() -> None:
    tables = {"compression": [{"name": "a", "keep": 0.5}, {"name": "b"}]}
    changed = apply_overrides(tables, [("compression.0.keep", 0.25), ("compression.1.share", 1)])
    assert changed == {"compression": [{"name": "a", "keep": 0.25}, {"name": "b", "share": 1}]}
    assert tables == {"compression": [{"name": "a", "keep": 0.5}, {"name": "b"}]}
    for place in ("2", "-1", "x"):
        with pytest.raises(UserError, match=rf"compression\.{place}\.keep: no number {place} in a list of 2"):
            apply_overrides(tables, [(f"compression.{place}.keep", 0.5)])


def test_load_reads_a_file_and_applies_overrides(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(tomli_w.dumps(TASK))
    config = load_config(TaskConfig, file, ["run.steps=3", "data.task=cola", "deepspeed.bf16.enabled=true"])
    assert (config.run.steps, config.data.task, config.deepspeed) == (3, "cola", {"bf16": {"enabled": True}})


def test_every_changeable_key_exists() -> None:
    keys = {row[0] for schema, _ in SCHEMAS for row in describe_keys(schema)}
    assert CHANGEABLE_KEYS - {"deepspeed.zero_optimization.stage"} <= keys  # that one is DeepSpeed's


def test_describe_says_type_default_and_meaning_of_every_key() -> None:
    for schema, _ in SCHEMAS:
        for key, kind, default, text in describe_keys(schema):
            assert text, f"{schema.__name__} {key} has no description"
            assert kind
            assert default
            assert "typing" not in kind, key


def test_arguments_are_completed_by_their_defaults() -> None:
    def function(x: int, *, a: int, b: float = 0.5) -> None: ...

    assert validate_arguments("f", function, {"a": 1}) == {"a": 1, "b": 0.5}
    with pytest.raises(UserError, match=r"f: a: missing"):
        validate_arguments("f", function, {})
    with pytest.raises(UserError, match=r"f: x: no such key"):
        validate_arguments("f", function, {"a": 1, "x": 1})


@pytest.mark.parametrize(("data", "schema"), [({"shards": "s"}, PretrainConfig), ({}, TaskConfig), (1, TaskConfig)])
def test_the_data_of_a_training_say_what_it_is(data: Any, schema: type[TrainConfig]) -> None:
    """Also where they are no table: then the validation of the config reports the mistake."""
    assert train_schema({"data": data}) is schema
