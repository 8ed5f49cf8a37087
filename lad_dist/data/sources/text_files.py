"""Lines of a file with their numbers, so that every message about a file can say where."""

import bz2
import gzip
import io
import lzma
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lad_dist.config.errors import UserError
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.text import one_line

BYTE_ORDER_MARK = "\ufeff"
COUNT_BYTES = 1 << 22  # bytes

DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"),
}


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
    may begin. So neighbouring spans have every line once. A compressed file is read whole.
    """

    def __init__(self, span: Span, boundary: re.Pattern[bytes]) -> None:
        self._span, self._boundary = span, boundary
        self._skipped = 0  # bytes before the first line
        self._before: int | None = None  # lines in them, counted when a message needs it

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1 within the span, line with its end).

        Only a newline ends a line, and a byte order mark is dropped. Raise DamagedFile when the rest of the file cannot
        be read, and UserError when the system does not open it.
        """
        try:
            for number, line in self._compressed() if self._span.file.suffix in DECOMPRESS else self._plain():
                at_begin = self._skipped == 0 and number == 1
                yield number, line.removeprefix(BYTE_ORDER_MARK.encode()) if at_begin else line
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise read_error(self._span.file, error) from None

    def where(self, number: int) -> str:
        """Return FILE:LINE of a line of this span, counted in the whole file."""
        if self._before is None:
            with open(self._span.file, "rb") as stream:
                sizes = (min(COUNT_BYTES, self._skipped - at) for at in range(0, self._skipped, COUNT_BYTES))
                self._before = sum(stream.read(size).count(b"\n") for size in sizes)
        return f"{self._span.file}:{self._before + number}"

    def _compressed(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        with io.BufferedReader(DECOMPRESS[self._span.file.suffix](self._span.file)) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
        if not number:
            raise DamagedFile(f"{self._span.file}: empty")

    def _plain(self) -> Iterator[tuple[int, bytes]]:
        with open(self._span.file, "rb") as stream:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                at, end = (self._boundary_at(content, place) for place in (self._span.begin, self._span.end))
            self._skipped = at
            stream.seek(at)
            for number, line in enumerate(stream, 1):
                if at >= end:
                    return
                yield number, line
                at += len(line)

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

    A newline, with or without a carriage return, ends a line; a byte order mark is dropped. Raise UserError, with file
    and line, where the bytes are no text in UTF-8, or when the file cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
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
