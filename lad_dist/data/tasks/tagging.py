"""Sentences whose words have tags, as for named entities and parts of speech.

A .jsonl file has a sentence a line: {"tokens": ["Ada", …], "tags": ["B-PER", …]}. A CoNLL file (.conll, .bio, .iob,
.txt or .tsv) has a word a line, its columns separated by tabs or else blanks, the word first and its tag last, and an
empty line between sentences. Lines that begin with -DOCSTART- are left out, and before a sentence those that begin with
a # and a blank, unless they have the columns and a tag of words.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.data.sources.text_files import numbered_lines, numbered_objects
from lad_dist.data.tasks.files import convert_each, reader_of
from lad_dist.data.tasks.label_names import class_id, label_name, sorted_names
from lad_dist.distributed.logs import get_logger

DOCUMENT = "-DOCSTART-"
COMMENT = "#"  # as the first column

logger = get_logger(__name__)


class Sentences(NamedTuple):
    """n sentences, none without words."""

    words: list[list[str]]
    tags: list[np.ndarray]  # int64 class ids, one for each word


class TaggedSentence(NamedTuple):
    """A sentence as a file spells it."""

    lines: list[int]  # where each word stands
    words: list[str]
    tags: list[Any]  # None of words without one


def load_tagging(files: Sequence[Path], labels: Sequence[str] | None = None) -> tuple[list[Sentences], tuple[str, ...]]:
    """Return the sentences of each file, and the names of the tags in the order of the class ids.

    These are `labels`, by default the tags of the first file, sorted.

    Raises:
        UserError: A file has a mistake; the message names its line.
    """
    read = {file: list(reader_of(file, READERS)(file)) for file in files}
    for file, sentences in read.items():
        if not sentences:
            raise UserError(f"{file}: no sentences")
    present = sorted_names(_each(files[0], read[files[0]], label_name))
    if len(present) < 2:
        raise UserError(f"{files[0]}: every tag is {present[0]}; tagging needs at least two")
    names = tuple(labels or present)
    ids = {name: number for number, name in enumerate(names)}
    return [_numbered(file, read[file], ids) for file in files], names


def _numbered(file: Path, sentences: list[TaggedSentence], ids: dict[str, int]) -> Sentences:
    numbers = np.array(list(_each(file, sentences, lambda tag: class_id(ids, tag))), dtype=np.int64)
    ends = np.cumsum([len(sentence.words) for sentence in sentences])
    return Sentences([sentence.words for sentence in sentences], np.split(numbers, ends[:-1]))


def _each(file: Path, sentences: list[TaggedSentence], convert: Any) -> Iterator[Any]:
    for sentence in sentences:
        yield from convert_each(file, sentence.lines, sentence.tags, convert)


def _conll(file: Path, labelled: bool = True) -> Iterator[TaggedSentence]:
    """Yield the sentences; unless `labelled`, words alone are enough, and their tags are None."""
    columns = 0
    sentence = TaggedSentence([], [], [])
    for number, fields in _words(file):
        if not fields:
            if sentence.words:
                yield sentence
            sentence = TaggedSentence([], [], [])
            continue
        columns = columns or len(fields)
        if len(fields) != columns:
            raise UserError(f"{file}:{number}: {len(fields)} columns, not {columns}")
        if columns < 2 and labelled:
            raise UserError(f"{file}:{number}: one column, not two: a word and a tag")
        sentence.lines.append(number)
        sentence.words.append(fields[0])
        sentence.tags.append(fields[-1] if columns > 1 else None)
    if sentence.words:
        yield sentence


def _words(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, columns) of each word, and (line, []) between sentences."""
    columns, tags = 0, set()
    for _, fields in _lines(file):
        if fields and fields[0] != COMMENT:
            columns = columns or len(fields)
            tags.add(fields[-1])
    begins = True
    doubtful = []
    for number, fields in _lines(file):
        if begins and fields[:1] == [COMMENT] and (len(fields) != columns or fields[-1] not in tags):
            if len(fields) == columns:
                doubtful.append((number, fields[-1]))
            continue
        begins = not fields
        yield number, fields
    if doubtful:
        number, tag = doubtful[0]
        message = '%s:%d: a comment, for no other word has the tag "%s"; so are %d more such lines'
        logger.warning(message, file, number, tag, len(doubtful) - 1)


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, columns) of each line that begins no document."""
    return ((number, _fields(line)) for number, line in numbered_lines(file) if not line.startswith(DOCUMENT))


def _fields(line: str) -> list[str]:
    """Return the columns of a line; only tabs and blanks part them, for a word may hold other spaces."""
    if not line.strip():
        return []
    line = line.rstrip(" \t\r")
    return line.split("\t") if "\t" in line else re.split(" +", line.lstrip(" "))


def _jsonl(file: Path, labelled: bool = True) -> Iterator[TaggedSentence]:
    """Yield the sentences; unless `labelled`, tokens alone are enough, and their tags are None."""
    for number, row in numbered_objects(file):
        names = ("tokens", "tags") if labelled or "tags" in row else ("tokens",)
        for name in names:
            if not isinstance(row.get(name), list):
                raise UserError(f"{file}:{number}: {name} is {row.get(name)!r}, not a list")
        words, tags = row["tokens"], row.get("tags", [None] * len(row["tokens"]))
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{file}:{number}: tokens are not all texts")
        if len(words) != len(tags) or not words:
            raise UserError(f"{file}:{number}: {len(words)} tokens and {len(tags)} tags")
        yield TaggedSentence([number] * len(words), words, tags)


READERS = dict.fromkeys((".conll", ".bio", ".iob", ".txt", ".tsv"), _conll) | {".jsonl": _jsonl}
