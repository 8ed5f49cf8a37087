"""Token shards are read as one stream a source, and verified against their manifest."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from toy_shards import write_shards

from lad_dist.config.errors import UserError
from lad_dist.data.shards import reader
from lad_dist.data.shards.reader import Shards, verify
from lad_dist.utils import progress

pytest_plugins = ["data_fixtures"]
DOCUMENTS = {"a": [list(range(5, 5 + n)) for n in (4, 1, 7, 2, 3, 9, 1)], "b": [[30, 31], [32]]}


@pytest.fixture
def folder(tmp_path: Path, toy_tokenizer) -> Path:
    return write_shards(tmp_path / "shards", toy_tokenizer, DOCUMENTS, [[7, 8]], {"b": 2.5})


def test_a_source_is_one_stream_over_all_files(folder: Path) -> None:
    streams = Shards(folder).streams
    assert [(s.name, s.weight, s.tokens) for s in streams] == [("a", 1.0, 27), ("b", 2.5, 3)]
    for stream, documents in zip(streams, DOCUMENTS.values(), strict=True):
        ids = [token for document in documents for token in (*document, 3, 2)]
        assert stream.length == len(ids)
        for begin in range(len(ids)):
            for end in range(begin + 1, len(ids) + 1):
                assert stream.read(begin, end).tolist() == ids[begin:end]


def test_a_split_has_the_sources_with_documents_in_it(folder: Path) -> None:
    (held_out,) = Shards(folder, "held_out").streams
    assert (held_out.name, held_out.read(0, 4).tolist()) == ("a", [7, 8, 3, 2])


def test_verify_reports_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, float, float]] = []
    monkeypatch.setattr(progress, "_reporter", lambda task, done, total, detail: reports.append((task, done, total)))
    verify(folder)
    assert reports == [(f"verifying {folder}", done, 5) for done in range(1, 6)]


def test_verify_reports_every_kind_of_damage(folder: Path) -> None:
    files = [*folder.glob("*/*.bin"), *folder.glob("*/*.npy")]
    assert verify(folder) == sum(file.stat().st_size for file in files)
    for file in files:
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(UserError, match=rf"{file.name}: damaged, not the sha256"):
                verify(folder)
        file.write_bytes(content[:-1])
        with pytest.raises(UserError, match=rf"{file.name}: \d+ bytes, not \d+"):
            verify(folder)
        file.unlink()
        with pytest.raises(UserError, match=rf"{file.name}: missing"):
            Shards(folder, file.name.split("-")[0])
        file.write_bytes(content)
    verify(folder)


def test_verify_checks_ids_and_offsets_beyond_the_sums(folder: Path, tmp_path: Path, toy_tokenizer) -> None:
    other = write_shards(tmp_path / "other", toy_tokenizer, {"a": [[5, 60_000]]})
    with pytest.raises(UserError, match=r"train-00000\.bin: holds id 60000, the vocabulary has \d+"):
        verify(other)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sources"][0]["splits"]["train"]["shards"][1]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"a/train-00001\.offsets\.npy: does not fit the \.bin"):
        verify(folder)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    stream = Shards(folder).streams[0]
    with open(folder / "a" / "train-00000.bin", "r+b") as file:
        file.truncate(4)
    with pytest.raises(UserError, match="has become shorter"):
        stream.read(0, 5)
    assert stream.read(0, 2).dtype == np.uint16


def test_few_files_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    stream = Shards(folder).streams[0]
    for begin in [0, 20, 39, 1, 21, 38, 0]:
        stream.read(begin, begin + 1)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    del stream
    assert len(os.listdir("/proc/self/fd")) == before
