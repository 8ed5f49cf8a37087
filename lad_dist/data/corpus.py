"""Text sources: whatever the corpus is made of, as one stream of documents.

    documents(source)   the texts, one after another: paragraphs on lines of their own
    check(source)       the mistakes that can be seen without reading the text

A document of `wikiextractor` is what stands between `<doc …>` and `</doc>`, of `text` a .txt file, of `hub` a row.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lad_dist.config import Source, UserError
from lad_dist.data import hub
from lad_dist.data.lines import numbered_lines

WIKIEXTRACTOR_FILE = re.compile(r"wiki_\d+")


def documents(source: Source) -> Iterator[str]:
    """The documents in a fixed order: files sorted by path. Raises UserError naming file and line where one is
    damaged."""
    if source.kind == "hub":
        for row in hub.load(source.path, source.config, source.split, [source.column], streaming=True):
            yield row[source.column] or ""
    else:
        for file in _files(source):
            yield from _articles(file) if source.kind == "wikiextractor" else [_text(file)]


def check(source: Source) -> None:
    """Raises UserError when the path is missing or holds no documents of its kind; asks nothing of a hub dataset."""
    if source.kind != "hub":
        _files(source)


def _files(source: Source) -> list[Path]:
    root = Path(source.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder")
    if source.kind == "text":
        files = [root] if root.is_file() else sorted(root.rglob("*.txt"))
        wanted = ".txt files"
    else:
        files = sorted(file for file in root.rglob("wiki_*") if WIKIEXTRACTOR_FILE.fullmatch(file.name))
        wanted = "WikiExtractor files (AA/wiki_00 …)"
    if not files:
        raise UserError(f"{root}: no {wanted} in it")
    return files


def _articles(file: Path) -> Iterator[str]:
    """One text per <doc>, its lines as they are, empty ones left out."""
    opened = 0
    lines: list[str] = []
    for number, line in numbered_lines(file):
        if line.startswith("<doc "):
            _require_closed(file, opened)
            opened, lines = number, []
        elif line == "</doc>":
            opened = 0
            yield "\n".join(lines)
        elif line.strip():
            if not opened:
                raise UserError(f"{file}:{number}: text outside <doc …>; this is not WikiExtractor's output")
            lines.append(line)
    _require_closed(file, opened)


def _require_closed(file: Path, opened: int) -> None:
    if opened:
        raise UserError(f"{file}:{opened}: this <doc …> is not closed; the file is damaged")


def _text(file: Path) -> str:
    return "\n".join(_paragraphs(line for _, line in numbered_lines(file)))


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Hard-wrapped lines joined into paragraphs, which blank lines separate."""
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)
