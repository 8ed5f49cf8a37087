"""Lines of a file with their numbers, so that every message about a file can say where."""

import bz2
import gzip
import io
import lzma
import mmap
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from lad_dist.config.errors import UserError
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.text import one_line

BYTE_ORDER_MARK = "\ufeff"
LINE_END = re.compile(rb"\n|\r(?!\r*\n)")  # also a carriage return that belongs to no newline

DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"),
}


def is_compressed(file: Path) -> bool:
    """Return whether the ending of a file says that it is compressed."""
    return file.suffix.lower() in DECOMPRESS


class DamagedFile(Exception):
    """The rest of a file cannot be read; one line says why."""


class Span(NamedTuple):
    """Bytes begin … end - 1 of a file, in which documents begin; or shard `begin` of `end` of a hub dataset."""

    file: Path
    begin: int
    end: int


class FileLines:
    """The lines of a span, moved to whole documents.

    Both ends of the span move forward to the next end of a match of `boundary`, a pattern that ends where a document
    may begin. So neighbouring spans have every line once. A compressed file is read whole. A newline ends a line, with
    `carriage_returns` also a carriage return alone.
    """

    def __init__(self, span: Span, boundary: re.Pattern[bytes], carriage_returns: bool = False) -> None:
        self._span, self._boundary, self._carriage_returns = span, boundary, carriage_returns
        self._skipped = 0  # bytes before the first line
        self._before: int | None = None  # lines in them, counted when a message needs it

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1 within the span, line with its end).

        A byte order mark is dropped. Raise DamagedFile when the rest of the file cannot be read, and UserError when the
        system does not open it.
        """
        try:
            for number, line in self._compressed() if is_compressed(self._span.file) else self._plain():
                at_begin = self._skipped == 0 and number == 1
                yield number, line.removeprefix(BYTE_ORDER_MARK.encode()) if at_begin else line
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise read_error(self._span.file, error) from None

    def where(self, number: int) -> str:
        """Return FILE:LINE of a line of this span, counted in the whole file."""
        if self._before is None:
            with open(self._span.file, "rb") as stream:
                self._before = sum(1 for _ in self._lines(stream, self._skipped))
        return f"{self._span.file}:{self._before + number}"

    def _compressed(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        with io.BufferedReader(DECOMPRESS[self._span.file.suffix.lower()](self._span.file)) as stream:
            for number, line in enumerate(self._lines(stream), 1):
                yield number, line
        if not number:
            raise DamagedFile(f"{self._span.file}: empty")

    def _plain(self) -> Iterator[tuple[int, bytes]]:
        with open(self._span.file, "rb") as stream:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                at, end = (self._boundary_at(content, place) for place in (self._span.begin, self._span.end))
            self._skipped = at
            stream.seek(at)
            yield from enumerate(self._lines(stream, end - at), 1)

    def _lines(self, stream: IO[bytes], size: int = sys.maxsize) -> Iterator[bytes]:
        """Yield the lines of the next `size` bytes."""
        while line := stream.readline(size):
            size -= len(line)
            if self._carriage_returns and b"\r" in line.removesuffix(b"\r\n"):
                begins = [0, *(match.end() for match in LINE_END.finditer(line))]
                yield from (line[begin:end] for begin, end in pairwise([*begins, len(line)]) if begin < end)
            else:
                yield line

    def _boundary_at(self, content: mmap.mmap, place: int) -> int:
        """Return the first place at or after `place` where a document may begin."""
        if place == 0:
            return 0
        match = self._boundary.search(content, place - 1)
        return match.end() if match else len(content)


def read_error(file: Path, error: Exception) -> DamagedFile | UserError:
    """Return what to raise for an exception of a reader.

    It is a UserError when the system raised it, as for a file that may not be read or a disk that fails.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{file}: cannot be read ({os.strerror(error.errno)})")
    return DamagedFile(f"{file}: damaged, the rest cannot be read ({one_line(error)})")


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) for each line of a UTF-8 file.

    A newline, with or without a carriage return, ends a line; in a file without newlines a carriage return does. A byte
    order mark is dropped. Raise UserError, with file and line, where the bytes are no text in UTF-8, or when the file
    cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(_ended_lines(stream), 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise UserError(f"{file}:{number}: not UTF-8 (byte 0x{byte:02x}); convert the file first") from None
                if "\0" in text:
                    reason = "a NUL character, so this is no text in UTF-8"
                    raise UserError(f"{file}:{number}: {reason}; convert the file first")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _ended_lines(stream: IO[bytes]) -> Iterator[bytes]:
    first = stream.readline()
    if first.endswith(b"\n"):
        yield first
        yield from stream
    elif first:  # the whole file
        yield from first.removesuffix(b"\r").split(b"\r")


def numbered_objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, object) for each line of a .jsonl file that is not blank.

    Raise UserError, with file and line, for a line that is no object.
    """
    for number, line in numbered_lines(file):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{file}:{number}: not a JSON object")
        yield number, value
