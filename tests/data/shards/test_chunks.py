"""Chunks: files are cut between documents, and a finished chunk is complete."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_text import apart, sentence

from lad_dist.config.corpus_schema import SourceConfig
from lad_dist.config.errors import UserError
from lad_dist.data.shards import chunks
from lad_dist.data.shards.chunks import Stopped, TextChunk, TokenizeJob, plan_chunks
from lad_dist.data.sources import corpus
from lad_dist.data.sources.text_files import Span

pytest_plugins = ["data_fixtures"]

ARTICLE = '{"title": "a", "text": "b"}'
FORMS = {
    "jsonl": ('{"text": "ab"}', '{"text": "é"}', '{"text": "b\\n\\nc"}', '{"tex": 1}', "[1]", "", " ", "{"),
    "text": ("one", " two", "ζωή", "", "", " \t", "\x0b", "</doc>"),
    "wikiextractor": ('<doc id="1">', '<doc id="1">', "</doc>", "</doc>", "</doc> ", "", "one", "ζωή", " ", ARTICLE),
}


@st.composite
def files(draw: st.DrawFn) -> tuple[SourceConfig, bytes]:
    """Draw text of one kind, intact or damaged, with every sort of line end."""
    kind = draw(st.sampled_from(sorted(FORMS)))
    lines = draw(st.lists(st.sampled_from(FORMS[kind]), min_size=1, max_size=30))
    ends = draw(st.lists(st.sampled_from(["\n", "\n", "\r\n", "\r"]), min_size=len(lines), max_size=len(lines)))
    text = draw(st.sampled_from(["", "\ufeff"])) + "".join(map(str.__add__, lines, ends))
    broken = text.encode().replace(b"\xce", b"\xff") if draw(st.booleans()) else text.encode()
    rest = {"document": "block"} if kind == "text" else {}
    return SourceConfig.model_validate({"kind": kind, "path": "p", **rest}), broken[: draw(st.integers(1, len(broken)))]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut") / "file"


@given(files(), st.integers(1, 50))
@settings(max_examples=500)
def test_a_file_cut_anywhere_gives_the_documents_and_errors_of_the_whole(
    scratch: Path, form: tuple[SourceConfig, bytes], size: int
) -> None:
    source, content = form
    scratch.write_bytes(content)
    whole = Span(scratch, 0, len(content))
    spans_of_file = list(chunks._cut(source, [whole], size))
    assert len(spans_of_file) == -(-len(content) // size)
    assert [d for span in spans_of_file for d in corpus.read(source, span)] == list(corpus.read(source, whole))


@given(st.integers(1, 9), st.integers(50, 3000), st.integers(0, 40))
@settings(max_examples=50)
def test_a_parquet_file_cut_anywhere_gives_the_rows_of_the_whole(
    scratch: Path, group: int, size: int, rows: int
) -> None:
    documents = [None if n % 7 == 3 else sentence(n, 20) for n in range(rows)]
    pq.write_table(
        pa.table({"id": range(rows), "text": pa.array(documents, pa.string())}), scratch, row_group_size=group
    )
    source = SourceConfig(kind="parquet", path=str(scratch))
    whole = Span(scratch, 0, scratch.stat().st_size)
    spans_of_file = chunks._cut(source, [whole], size)
    assert [d for span in spans_of_file for d in corpus.read(source, span)] == list(corpus.read(source, whole))


def test_a_damaged_parquet_file_is_reported_once(scratch: Path) -> None:
    scratch.write_bytes(b"PAR1" * 100)
    source = SourceConfig(kind="parquet", path=str(scratch))
    spans_of_file = chunks._cut(source, [Span(scratch, 0, 400)], 100)
    assert len([d for span in spans_of_file for d in corpus.read(source, span)]) == 1


def test_small_files_share_a_chunk_and_large_ones_have_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MIN_CHUNK_BYTES", 100)
    sizes = {"a": 30, "b": 30, "c": 30, "d": 450, "e": 30, "f": 0}
    for name, size in sizes.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n" * size)
        (tmp_path / f"{name}.txt").write_bytes(b"\n" * size)
    rows, books = (
        SourceConfig(kind="jsonl", path=str(tmp_path)),
        SourceConfig(kind="text", path=str(tmp_path), name="books"),
    )
    planned = plan_chunks([rows, books])
    assert [chunk.number for chunk in planned] == list(range(len(planned)))
    spans = [[(span.file.stem, span.begin, span.end) for span in chunk.spans] for chunk in planned]
    assert spans == [
        [("a", 0, 30), ("b", 0, 30), ("c", 0, 30), ("d", 0, 100)],
        [("d", 100, 200)],
        [("d", 200, 300)],
        [("d", 300, 400)],
        [("d", 400, 450), ("e", 0, 30), ("f", 0, 0)],
        [("a", 0, 30), ("b", 0, 30), ("c", 0, 30), ("d", 0, 450)],
        [("e", 0, 30), ("f", 0, 0)],
    ]
    assert [(chunk.source, chunk.first) for chunk in planned] == [
        (0, True), (0, False), (0, False), (0, False), (0, False), (1, True), (1, False)
    ]  # fmt: skip


def test_chunks_have_a_five_hundredth_of_the_text_within_limits(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(4 << 30)  # no disk is used
    planned = plan_chunks([SourceConfig(kind="jsonl", path=str(tmp_path))])
    assert {span.end - span.begin for chunk in planned for span in chunk.spans} == {8 << 20}
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(100 << 30)
    planned = plan_chunks([SourceConfig(kind="jsonl", path=str(tmp_path))])
    assert {span.end - span.begin for chunk in planned for span in chunk.spans} == {64 << 20}


def test_a_hub_dataset_has_a_chunk_for_each_shard_or_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": list("abcdef")}).to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    planned = plan_chunks([SourceConfig(kind="hub", path="w/pedia")])
    assert [chunk.spans for chunk in planned] == [(Span(Path("w/pedia"), n, 3),) for n in range(3)]

    class Unsharded:
        column_names = None

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Unsharded())
    assert [chunk.spans for chunk in plan_chunks([SourceConfig(kind="hub", path="w/pedia")])] == [
        (Span(Path("w/pedia"), 0, 1),)
    ]


def test_identity_depends_on_text_and_tokenizer_and_not_on_names_and_weights(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')

    def identity(tokenizer: str = "t", **rest: object) -> dict[str, str]:
        source = SourceConfig.model_validate({"kind": "jsonl", "path": str(tmp_path), **rest})
        return chunks.identity([source], plan_chunks([source]), tokenizer, "1.0")

    first = identity()
    assert identity(name="other", weight=2.0) == first
    assert identity(column="body") != first
    assert identity("u") != first
    file.write_text('{"text": "ab"}\n')
    assert identity() != first


@pytest.fixture
def job(tmp_path: Path, toy_tokenizer) -> TokenizeJob:
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "text.jsonl"))
    texts = [sentence(n, n % 13) for n in range(90)]
    Path(source.path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "work").mkdir()
    separator = np.array([toy_tokenizer.sep_token_id, toy_tokenizer.cls_token_id])
    return TokenizeJob([source], toy_tokenizer, tmp_path / "work", np.dtype(np.uint16), separator, False, lambda: False)


def whole(job: TokenizeJob) -> TextChunk:
    file = Path(job.sources[0].path)
    return TextChunk(0, 0, True, (Span(file, 0, file.stat().st_size),))


@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
def test_a_chunk_is_read_back_in_blocks(job: TokenizeJob, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(chunks, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(chunks, "BLOCK_DOCUMENTS", block)
    monkeypatch.setattr(chunks, "BLOCK_IDS", block)
    written = chunks.write_chunk(whole(job), job)
    assert sorted(file.name for file in job.folder.iterdir()) == ["0.documents", "0.ids", "0.json"]
    texts = list(corpus.documents(job.sources[0]))
    expected = [[*ids, *job.separator] for ids in apart(job.tokenizer, texts)]
    read = list(chunks.token_blocks(job.folder, whole(job), job.dtype))
    assert [
        list(document) for records, ids in read for document in np.split(ids, np.cumsum(records["ids"])[:-1])
    ] == expected
    assert all(len(ids) <= block or len(records) == 1 for records, ids in read)
    records = np.concatenate([records for records, _ in read])
    assert records["bytes"].tolist() == [len(text.encode()) for text in texts]
    digests = {text: (high, low) for text, high, low in zip(texts, records["high"], records["low"], strict=True)}
    assert len(set(digests.values())) == len(set(texts)) < len(texts)
    info = chunks.read_chunk_info(job.folder, whole(job), job.dtype)
    assert info == written == {"documents": 90, "ids": sum(map(len, expected)), "skipped": 0, "errors": []}


@pytest.mark.parametrize("kind", ["ids", "documents", "json"])
def test_a_chunk_that_lacks_something_is_not_finished(job: TokenizeJob, kind: str) -> None:
    chunks.write_chunk(whole(job), job)
    file = job.folder / f"0.{kind}"
    file.write_bytes(file.read_bytes()[:-1])
    assert chunks.read_chunk_info(job.folder, whole(job), job.dtype) is None
    file.unlink()
    assert chunks.read_chunk_info(job.folder, whole(job), job.dtype) is None


def test_a_chunk_that_is_stopped_or_damaged_is_not_finished(job: TokenizeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BATCH_CHARACTERS", 300)
    stop_flags = iter([False] * 50)
    with pytest.raises(Stopped):
        chunks.write_chunk(whole(job), job._replace(should_stop=lambda: next(stop_flags, True)))
    assert chunks.read_chunk_info(job.folder, whole(job), job.dtype) is None
    with open(job.sources[0].path, "a") as file:
        file.write("{\n")
    with pytest.raises(
        UserError, match=r'text\.jsonl:91: not valid JSON .*; mend or remove it, or set on_error = "skip"'
    ):
        chunks.write_chunk(whole(job), job)
    assert chunks.read_chunk_info(job.folder, whole(job), job.dtype) is None


def test_skipped_documents_are_counted_and_the_first_of_them_listed(
    job: TokenizeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MAX_MESSAGES", 3)
    with open(job.sources[0].path, "a") as file:
        file.write("[]\n" * 5)
    chunks.write_chunk(whole(job), job._replace(skip_errors=True))
    info = chunks.read_chunk_info(job.folder, whole(job), job.dtype)
    assert info is not None
    assert (info["documents"], info["skipped"]) == (90, 5)
    place = job.sources[0].path
    assert info["errors"] == [f"{place}:{line}: not a JSON object" for line in (91, 92, 93)]
