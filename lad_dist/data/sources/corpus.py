"""Text sources: whatever a corpus is made of, as documents, their paragraphs on lines of their own.

A document of `wikiextractor` is what stands between `<doc …>` and `</doc>`, of `text` a file or a block between blank
lines, of the others a row.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lad_dist.config.corpus_schema import SourceConfig
from lad_dist.config.errors import UserError
from lad_dist.data.sources import hub, tables
from lad_dist.data.sources.text_files import DECOMPRESS, DamagedFile, FileLines, Span
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.text import is_encodable

COMPRESSED = r"(\.(gz|bz2|xz|zst))?"
FILES = {
    "wikiextractor": (re.compile(r"wiki_\d+" + COMPRESSED), "WikiExtractor files (AA/wiki_00 …)"),
    "text": (re.compile(r".+\.txt" + COMPRESSED), ".txt files"),
    "jsonl": (re.compile(r".+\.jsonl?" + COMPRESSED), ".jsonl files"),
    "parquet": (re.compile(r".+\.parquet"), ".parquet files"),
}
LINE = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*\n")
ARTICLE_END = re.compile(rb"\n</doc>\r?\n")


class UnreadableDocument(NamedTuple):
    """A document, or the rest of a file, that cannot be read: where and what, in one line."""

    message: str


Documents = Iterator[str | UnreadableDocument]


def documents(source: SourceConfig) -> Iterator[str]:
    """Yield the documents in a fixed order: files sorted by path.

    Raise UserError, with file and line, where one is damaged.
    """
    for span in spans(source):
        for document in read(source, span):
            if isinstance(document, UnreadableDocument):
                raise UserError(f"{document.message}; mend or remove it")
            yield document


def check(source: SourceConfig) -> None:
    """Raise UserError when the path is missing, holds no documents of its kind, or the first table lacks the column.

    A hub dataset is not looked at.
    """
    if source.kind == "parquet":
        tables.check_column(files(source)[0], source.column)
    elif source.kind != "hub":
        files(source)


def files(source: SourceConfig) -> list[Path]:
    """Return the files of a source of any kind but hub. Raise UserError when it has none."""
    root = Path(source.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    pattern, description = FILES[source.kind]
    matching = sorted(file for file in root.rglob("*") if pattern.fullmatch(file.name) and file.is_file())
    if not matching:
        raise UserError(f"{root}: no {description} in it")
    return matching


def spans(source: SourceConfig) -> list[Span]:
    """Return the whole source, a span for each file."""
    if source.kind == "hub":
        return [Span(Path(source.path), 0, 1)]
    return [Span(file, 0, file.stat().st_size) for file in files(source)]


def can_be_cut(source: SourceConfig, file: Path) -> bool:
    """Return whether spans of this file may begin and end anywhere in it."""
    if source.kind == "text" and source.document == "file":
        return False
    return file.suffix not in DECOMPRESS


def read(source: SourceConfig, span: Span) -> Documents:
    """Yield the documents that begin in the span, in order.

    Spans that divide a file give each of its documents once, and in order. Raise UserError for what cannot be skipped:
    a file that the system does not open, a missing column.
    """
    if source.kind == "hub":
        data = hub.load(source.path, source.config, source.split, [source.column], streaming=True)
        values = hub.values(data, source.path, source.column, span.begin, span.end)
        place = f"{source.path}, shard {span.begin + 1} of {span.end}, row"
        yield from (_text(value, source.column, f"{place} {row}") for row, value in enumerate(values, 1))
        return
    if span.end == 0:
        yield UnreadableDocument(f"{span.file}: empty")
        return
    try:
        yield from _in_file(source, span)
    except DamagedFile as error:
        yield UnreadableDocument(str(error))


def _in_file(source: SourceConfig, span: Span) -> Documents:
    if source.kind == "parquet":
        rows = tables.values(span, source.column)
        return (_text(value, source.column, f"{span.file}:{row}") for row, value in rows)
    if source.kind == "jsonl":
        lines = FileLines(span, LINE)
        return (_object(lines, number, line, source.column) for number, line in lines if line.strip())
    if source.kind == "wikiextractor":
        return _articles(FileLines(span, ARTICLE_END))
    return _blocks(FileLines(span, BLANK_LINE)) if source.document == "block" else _whole_file(FileLines(span, LINE))


def _articles(lines: FileLines) -> Documents:
    """Yield one text for each <doc>: its lines as they are, without empty ones."""
    opened = 0
    outside = False
    body: list[bytes] = []
    for number, line in lines:
        closing = line.rstrip() == b"</doc>"
        if line.startswith(b"<doc "):
            yield from _unclosed(lines, opened)
            opened, outside, body = number, False, []
        elif opened and closing:
            yield _decoded(lines, opened + 1, body, _without_empty_lines)
            opened = 0
        elif opened:
            body.append(line)
        elif line.strip():
            if not outside:
                yield UnreadableDocument(
                    f"{lines.where(number)}: text outside <doc …>; this is not WikiExtractor's output"
                )
            outside = not closing  # a span may begin after it, and would report what comes next anew
    yield from _unclosed(lines, opened)


def _unclosed(lines: FileLines, opened: int) -> Iterator[UnreadableDocument]:
    if opened:
        yield UnreadableDocument(f"{lines.where(opened)}: this <doc …> is not closed")


def _object(lines: FileLines, number: int, line: bytes, column: str) -> str | UnreadableDocument:
    try:
        row = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _decoded(lines, number, [line], str)
    except ValueError as error:
        return UnreadableDocument(f"{lines.where(number)}: not valid JSON ({error})")
    if not isinstance(row, dict):
        return UnreadableDocument(f"{lines.where(number)}: not a JSON object")
    if column not in row:
        return UnreadableDocument(f'{lines.where(number)}: no "{column}": {did_you_mean(column, row)}')
    text = row[column]  # of half a surrogate pair, parse_json has complained
    return text if isinstance(text, str) else _text(text, column, lines.where(number))


def _text(value: Any, column: str, place: str) -> str | UnreadableDocument:
    if isinstance(value, bytes):
        return UnreadableDocument(f"{place}: {column} is not UTF-8")
    if not isinstance(value, str):
        return UnreadableDocument(f"{place}: {column} is {json.dumps(value, default=str)[:50]}, not text")
    if not is_encodable(value):
        return UnreadableDocument(f"{place}: {column} holds half a surrogate pair")
    return value


def _whole_file(lines: FileLines) -> Documents:
    yield _decoded(lines, 1, (line for _, line in lines), _paragraphs)


def _blocks(lines: FileLines) -> Documents:
    """Yield one text for each block of lines between blank ones, its lines joined into one paragraph."""
    for filled, group in groupby(lines, lambda numbered: bool(numbered[1].strip())):
        if filled:
            block = list(group)
            yield _decoded(lines, block[0][0], (line for _, line in block), _paragraphs)


def _decoded(
    lines: FileLines, first: int, text: Iterable[bytes], clean: Callable[[str], str]
) -> str | UnreadableDocument:
    """Return lines of text, the first of which has number `first`, as clean text."""
    data = b"".join(text)
    try:
        return clean(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        number = first + data.count(b"\n", 0, error.start)
        return UnreadableDocument(f"{lines.where(number)}: not UTF-8 (byte 0x{data[error.start]:02x})")


def _without_empty_lines(text: str) -> str:
    return "\n".join(line.removesuffix("\r") for line in text.split("\n") if line.strip())


def _paragraphs(text: str) -> str:
    """Return hard-wrapped lines joined into paragraphs, which blank lines separate."""
    lines = map(str.strip, text.split("\n"))
    return "\n".join(" ".join(group) for filled, group in groupby(lines, bool) if filled)
