"""Documents out of files and hub datasets, intact and damaged."""

import bz2
import gzip
import html
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from toy_text import sentence

from lad_dist.config.corpus_schema import SourceConfig
from lad_dist.config.errors import UserError
from lad_dist.data.sources import corpus
from lad_dist.data.sources.corpus import UnreadableDocument
from lad_dist.data.sources.text_files import Span

pytest_plugins = ["data_fixtures"]


def source(kind: str, path: Path | str, **rest: str) -> SourceConfig:
    return SourceConfig(kind=kind, path=str(path), **rest)


def everything(source: SourceConfig) -> list[str | UnreadableDocument]:
    return [document for span in corpus.spans(source) for document in corpus.read(source, span)]


def error_messages(source: SourceConfig) -> list[str]:
    return [document.message for document in everything(source) if isinstance(document, UnreadableDocument)]


def texts(source: SourceConfig) -> list[str]:
    return [document for document in everything(source) if isinstance(document, str)]


def wiki_file(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def article(title: str, *paragraphs: str) -> str:
    return f'<doc id="1" url="u" title="{title}">\n{title}\n\n' + "".join(f"{p}\n" for p in paragraphs) + "</doc>\n"


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def test_wikiextractor_folders_are_walked_in_sorted_order(tmp_path: Path) -> None:
    wiki_file(tmp_path, "AB/deep/wiki_00", article("Last", "x"))
    for link in ("AC", "AB/deep/again"):
        (tmp_path / link).symlink_to(tmp_path / "AB")  # the first one is read already, the other leads in a circle
    wiki_file(tmp_path, "AA/wiki_10", article("Third", "x"))
    wiki_file(tmp_path, "AA/wiki_02", article("First", "one", "two") + "\n" + article("Second"))
    wiki_file(tmp_path, "AA/notes.txt", "not a part of it")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path)
    texts = list(corpus.documents(source("wikiextractor", tmp_path / "root")))
    assert texts == ["First\none\ntwo", "Second", "Third\nx", "Last\nx"]


def test_a_book_is_a_document_with_hard_wrapped_lines_joined(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffCHAPTER I\r\n\r\n\r\nIt was\r\na dark night.\r\n \r\nThe end\r\n".encode())
    (tmp_path / "a.txt").write_text("\n")
    assert list(corpus.documents(source("text", tmp_path))) == ["", "CHAPTER I\nIt was a dark night.\nThe end"]
    assert len(list(corpus.documents(source("text", tmp_path / "b.txt")))) == 1


def test_a_block_is_a_document_where_the_config_says_so(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeff\r\n\r\nIt was\r\n a dark night.\r\n \t\r\n\nThe end".encode())
    assert texts(source("text", tmp_path, document="block")) == ["It was a dark night.", "The end"]


def test_only_newlines_and_carriage_returns_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028still one\x0cstill\n\ntwo\r\r\ntoo\rtoo\r\rthree".encode())
    assert texts(source("text", tmp_path)) == ["one\u2028still one\x0cstill\ntwo too too\nthree"]


def write_all(folder: Path, documents: list[str]) -> dict[str, SourceConfig]:
    """Write the documents in every form."""
    escaped = [html.escape(text, quote=False) for text in documents]  # as WikiExtractor does
    json_articles = [json.dumps({"title": text, "text": n % 2 * text}) for n, text in enumerate(escaped)]
    content = {
        ("wikiextractor", "wiki_00"): "\n".join(f'<doc id="1">\n{text}\n</doc>\n' for text in escaped),
        ("wikiextractor", "wiki_01"): "\n".join(json_articles),
        ("jsonl", "a.jsonl"): "\n\n".join(json.dumps({"id": 1, "text": text}) for text in documents),
        ("text", "a.txt"): "\n\n".join(documents),
        ("text", "B.TXT"): "\r\r".join(documents),
    }
    sources = {}
    for (kind, name), text in content.items():
        for ending, compress in {"": bytes, **COMPRESS}.items():
            place = folder / f"{name}{ending}"
            place.mkdir()
            (place / f"{name}{ending.upper() if name.isupper() else ending}").write_bytes(compress(text.encode()))
            rest = {"document": "block"} if kind == "text" else {}
            sources[place.name] = source(kind, place, **rest)
    table = pa.table({"text": documents, "id": range(len(documents))})
    large = pa.table({"text": pa.array(documents, pa.large_string()).dictionary_encode()})
    pq.write_table(table, folder / "a.parquet", row_group_size=4)
    pq.write_table(large, folder / "large.parquet")
    (folder / "arrow").mkdir()
    with pa.OSFile(str(folder / "arrow" / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    sources |= {name: source("parquet", folder / f"{name}.parquet") for name in ("a", "large")}
    return sources | {"arrow": source("hub", folder / "arrow")}


def test_all_kinds_and_compressions_give_the_same_documents(tmp_path: Path) -> None:
    documents = [f"{sentence(n, n + 1)} ζωή {n} < 99 &amp; &c." for n in range(20)]
    forms = write_all(tmp_path, documents)
    assert len(forms) == 5 * 5 + 3
    for name, form in forms.items():
        corpus.check(form)
        assert list(corpus.documents(form)) == documents, name


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_archive_of_several_frames_is_read_whole_and_a_truncated_one_reported(tmp_path: Path, ending: str) -> None:
    compress = COMPRESS[ending]
    lines = [json.dumps({"text": sentence(n, 30)}) for n in range(3000)]
    halves = [compress("".join(f"{line}\n" for line in part).encode()) for part in (lines[:100], lines[100:])]
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(b"".join(halves))
    whole = texts(source("jsonl", tmp_path))
    assert len(whole) == 3000
    file.write_bytes(b"".join(halves)[:-20])
    *read, last = everything(source("jsonl", tmp_path))
    assert isinstance(last, UnreadableDocument)
    assert last.message.startswith(f"{file}: damaged, the rest cannot be read (")
    assert read == whole[: len(read)]
    with pytest.raises(UserError, match="damaged"):
        list(corpus.documents(source("jsonl", tmp_path)))


def fake_hub(monkeypatch: pytest.MonkeyPatch, shards: int = 1, **columns: list[Any]) -> dict[str, Any]:
    import datasets

    request: dict[str, Any] = {}

    def load_dataset(path: str, config: str, **options: Any) -> Any:
        request.update(path=path, config=config, **options)
        return datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=shards)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return request


def test_hub_rows_come_from_the_named_column(monkeypatch: pytest.MonkeyPatch) -> None:
    request = fake_hub(monkeypatch, id=[1, 2, 3], body=["a", None, "b"])
    hub_source = source("hub", "w/pedia", config="20231101.en", split="train", column="body")
    assert everything(hub_source) == [
        "a",
        UnreadableDocument("w/pedia, shard 1 of 1, row 2: body is null, not text"),
        "b",
    ]
    assert request == {"path": "w/pedia", "config": "20231101.en", "split": "train", "streaming": True}
    with pytest.raises(UserError, match=r'w/pedia: no column "bodi": did you mean "body"\?'):
        everything(source("hub", "w/pedia", column="bodi"))


def test_shards_of_a_hub_dataset_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [str(n) for n in range(17)]
    fake_hub(monkeypatch, shards=3, text=rows)
    hub_source = source("hub", "w/pedia")
    parts = [list(corpus.read(hub_source, Span(Path("w/pedia"), shard, 3))) for shard in range(3)]
    assert all(parts)
    assert [row for part in parts for row in part] == rows == texts(hub_source)


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> SimpleNamespace:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match="w/pedia: cannot load the dataset, split train: no route to host"):
        list(corpus.documents(source("hub", "w/pedia")))


def test_a_hub_that_fails_on_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "a"}
        raise ConnectionError("reset\nby peer")

    class Data:
        column_names = None

        def __iter__(self) -> Any:
            return rows()

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Data())
    documents = corpus.documents(source("hub", "w/pedia"))
    assert next(documents) == "a"
    with pytest.raises(UserError, match=r"w/pedia: reading stopped \(reset by peer\); run again to go on"):
        next(documents)


@pytest.mark.parametrize("kind", ["wikiextractor", "text", "jsonl", "parquet"])
def test_check_refuses_what_is_missing_or_empty(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        corpus.check(source(kind, tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no .* in it"):
        corpus.check(source(kind, tmp_path))


def test_check_does_not_read_but_names_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind, name in NAMES.items():
        (tmp_path / name).write_bytes(b"\xff")
        corpus.check(source(kind, tmp_path))
    corpus.check(source("hub", "no/such"))
    left_out = [f"{n} of {n + 1} files are not read" for n in (1, 2, 3)]
    assert [message.removeprefix(f"{tmp_path}: ").partition(",")[0] for message in caplog.messages] == left_out


def test_a_missing_column_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["a"], "texts": ["b"], "id": [1]}), tmp_path / "a.parquet")
    for read in (corpus.check, everything):
        with pytest.raises(UserError, match=r'a\.parquet: no column "text": did you mean "texts"\?'):
            read(source("parquet", tmp_path))
        with pytest.raises(UserError, match=r"column id is int64, not text"):
            read(source("parquet", tmp_path, column="id"))


WIKI, ROW = article("A", "x").encode(), b'{"text": "a"}\n'
LONE = json.dumps({"text": "\ud800"}).encode()
DAMAGED = [
    ("wikiextractor", WIKI + b'<doc id="2">\ntext\n', ["A\nx"], [":6: this <doc …> is not closed"]),
    ("wikiextractor", b'<doc id="2">\ntext\n' + WIKI, ["A\nx"], [":1: this <doc …> is not closed"]),
    (
        "wikiextractor",
        b"\nplain text\nmore\n" + WIKI + b"rest",
        ["A\nx"],
        [":2: text outside <doc …>; this is not WikiExtractor's output", ":9: text outside"],
    ),
    ("wikiextractor", b'<doc id="1">\na\nb\xff\n</doc>\n' + WIKI, ["A\nx"], [":3: not UTF-8 (byte 0xff)"]),
    (
        "wikiextractor",
        b'{"title": "A", "text": "x"}\n{"title": 3, "text": "y"}',
        ["A\nx"],
        [":2: title is 3, not text"],
    ),
    ("text", b"fine\nfine\nna\xefve\n", [], [":3: not UTF-8 (byte 0xef)"]),
    ("text", b"fine\r\r\nfine\rna\xefve\r", [], [":3: not UTF-8 (byte 0xef)"]),
    ("jsonl", ROW + b'\n{"text": "b"\n' + ROW, ["a", "a"], [":3: not valid JSON ("]),
    ("jsonl", ROW + b'["b"]\n', ["a"], [":2: not a JSON object"]),
    ("jsonl", ROW + b'{"texts": "b"}\n', ["a"], [':2: no "text": did you mean "texts"?']),
    ("jsonl", ROW + b'{"text": 3}\n', ["a"], [":2: text is 3, not text"]),
    ("jsonl", ROW + b'{"text": "\xff"}\n', ["a"], [":2: not UTF-8 (byte 0xff)"]),
    ("jsonl", ROW + LONE, ["a"], [":2: not valid JSON (half a surrogate pair)"]),
    ("jsonl", ROW + b"[" * 100_000, ["a"], [":2: not valid JSON ("]),
    ("jsonl", b"", [], [": empty"]),
    ("parquet", b"", [], [": empty"]),
    ("parquet", b"PAR1" * 100, [], [": damaged, the rest cannot be read ("]),
]
NAMES = {"wikiextractor": "wiki_00", "text": "a.txt", "jsonl": "a.jsonl", "parquet": "a.parquet"}


@pytest.mark.parametrize(("kind", "content", "intact", "expected"), DAMAGED)
def test_what_is_damaged_is_named_with_the_line_and_the_rest_is_read(
    tmp_path: Path, kind: str, content: bytes, intact: list[str], expected: list[str]
) -> None:
    file = tmp_path / NAMES[kind]
    file.write_bytes(content)
    messages = error_messages(source(kind, tmp_path))
    assert len(messages) == len(expected)
    for message, ending in zip(messages, expected, strict=True):
        assert message.startswith(f"{file}{ending}")
        assert "\n" not in message
    assert texts(source(kind, tmp_path)) == intact
    with pytest.raises(UserError, match="mend or remove it"):
        list(corpus.documents(source(kind, tmp_path)))


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["wikiextractor", "text", "jsonl"])
def test_a_compressed_file_of_nothing_is_empty(tmp_path: Path, kind: str, ending: str) -> None:
    file = tmp_path / (NAMES[kind] + ending)
    file.write_bytes(COMPRESS[ending](b""))
    assert error_messages(source(kind, tmp_path)) == [f"{file}: empty"]


def test_rows_of_a_table_that_are_no_text(tmp_path: Path) -> None:
    raw = pa.array([b"fine", None, b"\xff", b"fine too"], pa.binary())
    rows = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0], 1)
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=2)
    assert everything(source("parquet", tmp_path)) == [
        "fine",
        UnreadableDocument(f"{tmp_path}/a.parquet:2: text is null, not text"),
        UnreadableDocument(f"{tmp_path}/a.parquet:3: text is not UTF-8"),
        "fine too",
    ]


def test_a_file_that_may_not_be_read_is_never_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    span = Span(tmp_path / "gone.jsonl", 0, 10)
    for kind in ("jsonl", "parquet"):
        with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read \(No such file or directory\)"):
            list(corpus.read(source(kind, tmp_path), span))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/wikipedia", "wikipedia"),
        ("a/b.jsonl.gz", "b"),
        ("wiki_00.bz2", "wiki_00"),
        ("wikimedia/wikipedia", "wikipedia"),
        ("data/20231101.en/", "20231101.en"),
    ],
)
def test_the_last_part_of_the_path_names_a_source(path: str, name: str) -> None:
    assert source("text", path).folder == name
    assert source("text", path, name="own").folder == "own"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "text", "column": "body"}, 'column does not go with kind = "text", only with jsonl, parquet'),
        ({"kind": "jsonl", "config": "en"}, 'config does not go with kind = "jsonl", only with hub'),
        ({"kind": "wikiextractor", "document": "block"}, 'document does not go with kind = "wikiextractor"'),
        ({"kind": "text", "path": "."}, "set name"),
        ({"kind": "text", "path": "data/tokenizer"}, '"tokenizer" cannot be the name of a source; set name'),
        ({"kind": "text", "name": "a/b"}, "pattern"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceConfig.model_validate({"path": "p"} | keys)


@pytest.mark.data
def test_real_wikipedia_and_books_are_read_whole(real_data: Path) -> None:
    folder = real_data / "wikipedia"
    opened = sum(file.read_text().count("\n<doc id=") + 1 for file in folder.glob("AA/wiki_*"))
    texts = list(corpus.documents(source("wikiextractor", folder)))
    assert len(texts) == opened
    assert sum(map(len, texts)) > 20_000_000
    assert not any("<doc " in text or "</doc>" in text for text in texts)
    books = list(corpus.documents(source("text", real_data / "books")))
    assert len(books) == 10
    assert "Alice was beginning to get very tired of sitting by her sister on the bank, and of" in "".join(books)
