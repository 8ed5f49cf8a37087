"""A table of malformed inputs and what runs it: the real command in this process, in a folder of its own."""

import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toy
from conftest import World
from launching import ROOT

from lad_dist.cli.main import main
from lad_dist.config.load import apply_overrides

LONGEST = 300  # characters of a complaint
SECONDS = 5.0  # of a process that has imported what it needs
Make = Callable[[Path, World], None]


@dataclass(frozen=True)
class Case:
    """A command that has to fail.

    `files` are written into its folder `here`, `changes` into the config of `command`, where None removes a key. `make`
    does whatever else is needed. `words` follow the config, or replace it in a command without one. In texts, {here},
    {teacher} and so on stand for those paths.
    """

    name: str
    command: str
    expected: str
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    make: Make | None = None
    config: bytes | None = None  # the file itself, instead of tables
    words: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    code: int = 2


def tables(command: str, here: Path, world: World) -> dict[str, Any]:
    """The config of a command that would succeed."""
    work, words = here / "runs", str(world.tokenizer)
    source = {"kind": "text", "path": str(world.books)}
    task = {**world.files, "max_length": 32}
    if command == "pretrain":
        return toy.corpus_config(work, world.corpus, world.pretrained, world.pretrained)
    if command in ("distill", "benchmark"):
        return toy.task_config(work, world.files, world.teacher, world.pretrained)
    if command == "finetune":
        config = toy.task_config(work, world.files, world.teacher, world.pretrained, objective={"name": "supervised"})
        return {key: value for key, value in config.items() if key != "teacher"}
    return {
        "evaluate": {"model": {"path": str(world.teacher)}, "data": task, "out": str(here / "result.json")},
        "prepare": {"out": str(here / "out"), "tokenizer": words, "num_workers": 1, "source": [source]},
        "train-tokenizer": {
            "out": str(here / "out"), "kind": "wordpiece", "vocab_size": 200, "lowercase": True, "source": [source],
        },
        "tune": {
            "search": {"name": "search", "dir": str(work), "num_samples": 2},
            "stage": [{"name": "task", "base": str(here / "base.toml")}],
            "override": {"task.run.eval_every": 4},
            "space": {"task.optim.lr": {"uniform": [1e-4, 1e-3]}},
        },
    }[command]  # fmt: skip


# What a command imports when it has read its config: seconds that are not its work.
IMPORTS = {
    "evaluate": "evaluation.evaluate",
    "prepare": "data.shards.prepare",
    "tune": "search.tune",
    "report": "report",
}
TALKING = ("prepare", "train-tokenizer")  # say what they do, on standard output
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WITHOUT_CONFIG = ("report", "quickstart", "verify")


def complaint(
    case: Case, here: Path, world: World, monkeypatch: pytest.MonkeyPatch, capfd: Any, more: Mapping[str, Path] = {}
) -> str:
    """What the command says on standard error. Asserts the code, and that nothing is written or changed.

    `more`: paths that texts name besides.
    """
    places = {"here": here, "root": ROOT, **vars(world), **more}
    for name, content in case.files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.command == "tune":
        base = toy.task_config(here / "runs", world.files, world.teacher, world.pretrained)
        (here / "base.toml").write_text(tomli_w.dumps(base))
    if case.make is not None:
        case.make(here, world)
    words = [word.format_map(places) for word in case.words]
    if case.command not in WITHOUT_CONFIG:
        words = [*(["step"] if case.command == "benchmark" else []), str(_config(case, here, world, places)), *words]
    for name in LAUNCHERS_OWN:  # an earlier test's run has set them for its process
        monkeypatch.delenv(name, raising=False)
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value.format_map(places))
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["lad-dist", case.command, *words])
    importlib.import_module(f"lad_dist.{IMPORTS.get(case.command, 'training.train')}")
    before, begin = tree(here), time.monotonic()
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    seconds, seen = time.monotonic() - begin, capfd.readouterr()
    assert ended.value.code == case.code, seen.err
    assert seen.out == "" or case.command in TALKING
    assert sorted(tree(here).items() ^ before.items()) == []
    assert seconds < SECONDS
    return seen.err


def _config(case: Case, here: Path, world: World, places: Mapping[str, Path]) -> Path:
    file = here / "config.toml"
    if case.config is not None:
        file.write_bytes(case.config)
        return file
    changes = {key: _filled(value, places) for key, value in case.changes.items()}
    file.write_text(
        tomli_w.dumps(toy.without_none(apply_overrides(tables(case.command, here, world), changes.items())))
    )
    return file


def _filled(value: Any, places: Mapping[str, Path]) -> Any:
    if isinstance(value, str):
        return value.format_map(places)
    if isinstance(value, dict):
        return {key: _filled(inner, places) for key, inner in value.items()}
    return [_filled(inner, places) for inner in value] if isinstance(value, list) else value


def tree(folder: Path) -> dict[str, str]:
    """Everything below the folder, with a sum of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(error: str, expected: str) -> None:
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert len(error) <= LONGEST, error
    assert error.isprintable() or error[:-1].isprintable()
    assert expected in error


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
