"""Texts of a file a chunk at a time, with or without labels: what predictions read, however large the file is."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lad_dist.config.errors import UserError
from lad_dist.data.sources.tables import BUFFER, ROWS_AT_ONCE
from lad_dist.data.sources.text_files import numbered_lines, numbered_objects
from lad_dist.data.tasks.files import (
    FileRows,
    collect,
    csv_fields,
    fields_by_name,
    present_columns,
    reader_of,
    tsv_fields,
)
from lad_dist.utils.text import one_line

TEXT = "text"  # the column of a .txt file
READ_BYTES = 1 << 20

Rows = Iterator[tuple[int, Mapping[str, Any]]]  # the line, in Parquet the number of the row, and the values by column


def stream_columns(
    file: Path, required: Sequence[str], optional: Sequence[str], chunk_rows: int
) -> tuple[list[str], Iterator[FileRows]]:
    """Return the columns to read, the `optional` ones that the file has among them, and chunks of its rows.

    Raises:
        MissingColumn: A required column is not there.
        UserError: The file cannot be read; of a mistake in a row, once the chunks come to it.
    """
    header, rows_of = reader_of(file, READERS)(file)
    names = present_columns(file, header, [*required, *(name for name in optional if name in header)], None)
    return names, _chunks(file, names, rows_of(names), chunk_rows)


def _chunks(file: Path, names: Sequence[str], rows: Rows, chunk_rows: int) -> Iterator[FileRows]:
    is_empty = True
    while (chunk := collect(file, names, itertools.islice(rows, chunk_rows))).lines:
        is_empty = False
        yield chunk
    if is_empty:
        raise UserError(f"{file}: no rows")


def count_lines(file: Path) -> int:
    """Return the number of lines, of a Parquet file that of its rows: at least as many as a file has examples."""
    if file.suffix.lower() == ".parquet":
        return int(pq.read_metadata(file).num_rows)
    with file.open("rb") as stream:
        return 1 + sum(block.count(b"\n") for block in iter(lambda: stream.read(READ_BYTES), b""))


# What a file is read by: its columns, and a function from those that are wanted to the rows.
Source = tuple[Sequence[str], Callable[[Sequence[str]], Rows]]


def _csv(file: Path) -> Source:
    return _with_header(file, csv_fields(file))


def _tsv(file: Path) -> Source:
    return _with_header(file, tsv_fields(file))


def _with_header(file: Path, rows: Iterator[tuple[int, list[str]]]) -> Source:
    _, header = next(rows, (0, []))
    return header, lambda _: fields_by_name(file, header, rows)


def _jsonl(file: Path) -> Source:
    """Read objects; the first one says which columns all of them have."""
    rows: Rows = numbered_objects(file)
    first = list(itertools.islice(rows, 1))
    return [name for _, row in first for name in row], lambda _: itertools.chain(first, rows)


def _txt(file: Path) -> Source:
    return [TEXT], lambda _: ((number, {TEXT: line}) for number, line in numbered_lines(file))


def _parquet(file: Path) -> Source:
    try:
        with pq.ParquetFile(file) as table:
            return table.schema_arrow.names, lambda names: _parquet_rows(file, names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_parquet(file, error) from None


def _parquet_rows(file: Path, names: Sequence[str]) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=list(names), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _not_parquet(file, error) from None


def _not_parquet(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as Parquet ({one_line(error)})")


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}
