"""Names are the field's: a word list stays out of identifiers, keys, file names and messages."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

WORDS = frozenset(
    "surgery Moment Needs Trace Shape Part Outcome Fate Verdict Guard Judge Answers slots tokens_per_slot "
    "examples_per_slot agreement topology ledger its mine theirs found made told said kept there".split()
)
IDENTIFIERS = ("id", "arg", "attr", "name", "asname", "rest")
SOURCES = sorted(path for folder in ("lad_dist", "launch") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


def forbidden(name: str) -> set[str]:
    """The listed words that a name is, or has between its underscores."""
    return WORDS & {name, *name.split("_")}


def in_identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names = [getattr(node, field, None) for field in IDENTIFIERS]
        names += node.names if isinstance(node, ast.Global | ast.Nonlocal) else []
        for name in names:
            if isinstance(name, str) and any(forbidden(piece) for piece in name.split(".")):
                yield getattr(node, "lineno", 0), name


def in_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Listed words in string constants that are no docstrings: messages and keys."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = re.findall(r"[A-Za-z_]+", node.value)
            yield from ((node.lineno, f"{word!r} in {node.value!r}") for word in words if forbidden(word))


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from re.split(r"[.\s]", key)
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


@pytest.mark.parametrize("file", [*SOURCES, *TESTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_no_listed_word_is_a_name(file: Path) -> None:
    tree = ast.parse(file.read_text())
    places = list(in_identifiers(tree)) + (list(in_texts(tree)) if file in SOURCES else [])
    assert [f"{file.relative_to(ROOT)}:{line}: {text}" for line, text in places] == []
    assert not any(forbidden(piece) for piece in re.split(r"[/.]", str(file.relative_to(ROOT))))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_listed_word_is_a_key(file: Path) -> None:
    assert [key for key in keys_of(tomllib.loads(file.read_text())) if forbidden(key)] == []
    assert not any(forbidden(piece) for piece in re.split(r"[/.]", str(file.relative_to(ROOT))))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("found = 1", 1),
        ("def its_own(mine): return mine", 3),
        ("class Part: pass", 1),
        ("class UpdateGuard: part = 1", 0),
        ("x.kept = 1", 1),
        ("import a.ledger as b", 1),
        ('"""It is made of its parts."""', 0),
        ("raise ValueError('none there')", 1),
        ("key = {'slots': 1}", 1),
        ("def f():\n    global told", 1),
    ],
)
def test_the_list_is_held(text: str, count: int) -> None:
    tree = ast.parse(text)
    assert len([*in_identifiers(tree), *in_texts(tree)]) == count
