"""Whatever bytes a file holds, reading it ends well or in a UserError: nothing else, and in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lad_dist.cli.errors import MAX_LINE, printable_line
from lad_dist.config.errors import UserError
from lad_dist.config.load import load_config
from lad_dist.config.schema import TaskConfig, TaskDataConfig
from lad_dist.data.shards.reader import Shards
from lad_dist.data.tasks.task import load_task

# Pieces of the formats, put together in any order, beside bytes of any kind.
TOKENS = [
    *"[ ] { } \" ' , : = . # - [[ ]] \\ \\u \\ud800 null true NaN 1e999 0x 1979-05-27 \ufeff \0 \x85 ä 𝄞".split(" "),
    *"text label tokens tags data context qas answers run name steps format sources dtype".split(),
    *("\n", "\r", "\t", " "),
]
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(TOKENS), max_size=40).map(lambda parts: "".join(parts).encode()),
    st.lists(st.sampled_from(TOKENS), max_size=20).map(lambda parts: ("text,label\n" + "".join(parts)).encode()),
)
Reader = Callable[[Path, World], Any]


def labelled(kind: str) -> Reader:
    def read(file: Path, world: World) -> None:
        load_task(TaskDataConfig.model_validate({"train": str(file), "dev": str(file), "kind": kind}))

    return read


READERS: dict[str, Reader] = {
    "a.toml": lambda file, world: load_config(TaskConfig, file),
    "a.csv": labelled("classification"),
    "b.csv": labelled("regression"),
    "a.tsv": labelled("classification"),
    "a.jsonl": labelled("classification"),
    "b.jsonl": labelled("tagging"),
    "a.parquet": labelled("classification"),
    "a.conll": labelled("tagging"),
    "a.json": labelled("question_answering"),
    "manifest.json": lambda file, world: Shards(file.parent),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES)
def test_it_is_read_or_refused(name: str, content: bytes, world: World, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        READERS[name](tmp_path / name, world)
    except UserError as error:
        message = printable_line(str(error))
        assert message.isprintable()
        assert len(message) <= MAX_LINE
        assert name in message


MEMBERS = st.sampled_from(["format", "dtype", "vocabulary", "tokenizer", "sources", "request"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(member=MEMBERS, value=VALUES)
def test_a_manifest_with_another_value(member: str, value: Any, world: World, tmp_path: Path) -> None:
    import json

    manifest = json.loads((world.corpus / "manifest.json").read_text()) | {member: value}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "books").exists() or (tmp_path / "books").symlink_to(world.corpus / "books")
    message = member
    try:
        Shards(tmp_path)
    except UserError as error:
        message = str(error)
    assert member in message
