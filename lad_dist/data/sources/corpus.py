"""Text sources: whatever a corpus is made of, as documents, their paragraphs on lines of their own.

A document of `wikiextractor` is what stands between `<doc …>` and `</doc>`, or a line of its `--json` output: title and
text, in which `&lt;`, `&gt;` and `&amp;` are the characters that they stand for. Of `text` it is a file or a block
between blank lines, of the others a row.
"""

import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lad_dist.config.corpus_schema import SourceConfig
from lad_dist.config.errors import UserError
from lad_dist.data.sources import hub, tables
from lad_dist.data.sources.text_files import LINE_END, DamagedFile, FileLines, Span, is_compressed
from lad_dist.distributed.logs import get_logger
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.text import is_encodable

COMPRESSED = r"(\.(gz|bz2|xz|zst))?"
FILES = {
    "wikiextractor": (r"wiki_\d+" + COMPRESSED, "WikiExtractor files (AA/wiki_00 …)"),
    "text": (r".+\.txt" + COMPRESSED, ".txt files"),
    "jsonl": (r".+\.jsonl?" + COMPRESSED, ".jsonl files"),
    "parquet": (r".+\.parquet", ".parquet files"),
}
READING = "2"  # counts the changes of what text the readers make of a file
LINE = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"(?:%b)[ \t\r\v\f]*(?:%b)" % (LINE_END.pattern, LINE_END.pattern))
ARTICLE_END = re.compile(rb"\n</doc>\r?\n")
ESCAPED = re.compile("&(lt|gt|amp);")  # as WikiExtractor writes < > &; in one pass, so that &amp;lt; becomes &lt;

logger = get_logger(__name__)


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

    Other files in the folder are named in a warning. A hub dataset is not looked at.
    """
    if source.kind == "hub":
        return
    read = files(source)
    if source.kind == "parquet":
        tables.check_column(read[0], source.column)
    others = sorted(set(_files_below(Path(source.path))).difference(read))
    if others:
        message = "%s: %d of %d files are not read, for they are no %s; the first is %s"
        kind, first = FILES[source.kind][1], others[0].relative_to(source.path)
        logger.warning(message, source.path, len(others), len(others) + len(read), kind, first)


def files(source: SourceConfig) -> list[Path]:
    """Return the files of a source of any kind but hub. Raise UserError when it has none."""
    root = Path(source.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    pattern, description = FILES[source.kind]
    matching = [file for file in _files_below(root) if re.fullmatch(pattern, file.name, re.I)]
    if not matching:
        raise UserError(f"{root}: no {description} in it")
    return matching


def _files_below(root: Path) -> list[Path]:
    """Return the files of a folder and those below it, sorted; a folder that several links lead to counts once."""
    files: list[Path] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()  # so that of several links the same one is followed everywhere
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        files += [Path(folder, name) for name in names]
    return sorted(file for file in files if file.is_file())


def spans(source: SourceConfig) -> list[Span]:
    """Return the whole source, a span for each file."""
    if source.kind == "hub":
        return [Span(Path(source.path), 0, 1)]
    return [Span(file, 0, file.stat().st_size) for file in files(source)]


def can_be_cut(source: SourceConfig, file: Path) -> bool:
    """Return whether spans of this file may begin and end anywhere in it."""
    if source.kind == "text" and source.document == "file":
        return False
    return not is_compressed(file)


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
        values = tables.values(span, source.column)
        return (_text(value, source.column, f"{span.file}:{row}") for row, value in values)
    if source.kind == "jsonl":
        rows = _rows(FileLines(span, LINE), [source.column])
        return (row if isinstance(row, UnreadableDocument) else row[0] for row in rows)
    if source.kind == "wikiextractor":
        if not _begins_with_json(span.file):
            return _articles(FileLines(span, ARTICLE_END))
        rows = _rows(FileLines(span, LINE), ["title", "text"])
        return (row if isinstance(row, UnreadableDocument) else _json_article(*row) for row in rows)
    if source.document == "block":
        return _blocks(FileLines(span, BLANK_LINE, carriage_returns=True))
    return _whole_file(FileLines(span, LINE, carriage_returns=True))


def _begins_with_json(file: Path) -> bool:
    lines = FileLines(Span(file, 0, sys.maxsize), LINE)
    return next((line.lstrip()[:1] for _, line in lines if line.strip()), b"") == b"{"


def _articles(lines: FileLines) -> Documents:
    """Yield one text for each <doc>: its lines, without empty ones."""
    opened = 0
    outside = False
    body: list[bytes] = []
    for number, line in lines:
        closing = line.rstrip() == b"</doc>"
        if line.startswith(b"<doc "):
            yield from _unclosed(lines, opened)
            opened, outside, body = number, False, []
        elif opened and closing:
            yield _decoded(lines, opened + 1, body, _article)
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


def _rows(lines: FileLines, columns: Sequence[str]) -> Iterator[list[str] | UnreadableDocument]:
    """Yield the texts of these columns of each JSON line."""
    for number, line in lines:
        if line.strip():
            yield _row(lines, number, line, columns)


def _row(lines: FileLines, number: int, line: bytes, columns: Sequence[str]) -> list[str] | UnreadableDocument:
    try:
        row = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(lines, number, error)
    except ValueError as error:
        return UnreadableDocument(f"{lines.where(number)}: not valid JSON ({error})")
    if not isinstance(row, dict):
        return UnreadableDocument(f"{lines.where(number)}: not a JSON object")
    texts = []
    for column in columns:
        if column not in row:
            return UnreadableDocument(f'{lines.where(number)}: no "{column}": {did_you_mean(column, row)}')
        text = row[column]  # of half a surrogate pair, parse_json has complained
        if not isinstance(text, str):
            return _not_text(text, column, lines.where(number))
        texts.append(text)
    return texts


def _text(value: Any, column: str, place: str) -> str | UnreadableDocument:
    if isinstance(value, bytes):
        return UnreadableDocument(f"{place}: {column} is not UTF-8")
    if not isinstance(value, str):
        return _not_text(value, column, place)
    if not is_encodable(value):
        return UnreadableDocument(f"{place}: {column} holds half a surrogate pair")
    return value


def _not_text(value: Any, column: str, place: str) -> UnreadableDocument:
    return UnreadableDocument(f"{place}: {column} is {json.dumps(value, default=str)[:50]}, not text")


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
        return _not_utf8(lines, first, error)


def _not_utf8(lines: FileLines, first: int, error: UnicodeDecodeError) -> UnreadableDocument:
    """Return what is wrong with text whose first line has number `first`."""
    number = first + len(LINE_END.findall(error.object, 0, error.start))
    return UnreadableDocument(f"{lines.where(number)}: not UTF-8 (byte 0x{error.object[error.start]:02x})")


def _json_article(title: str, text: str) -> str:
    """Return the article as the default output has it; some versions repeat the title in the text."""
    return _article(text if text.split("\n", 1)[0] == title else f"{title}\n{text}")


def _article(text: str) -> str:
    """Return the text without empty lines and escapes."""
    lines = "\n".join(line.removesuffix("\r") for line in text.split("\n") if line.strip())
    return ESCAPED.sub(lambda match: html.unescape(match[0]), lines)


def _paragraphs(text: str) -> str:
    """Return hard-wrapped lines joined into paragraphs, which blank lines separate."""
    lines = map(str.strip, re.split(r"\r*\n|\r", text))
    return "\n".join(" ".join(group) for filled, group in groupby(lines, bool) if filled)
