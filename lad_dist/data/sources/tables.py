"""The text column of Parquet files, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lad_dist.config.errors import UserError
from lad_dist.data.sources.text_files import Span, read_error
from lad_dist.utils.suggest import did_you_mean

ROWS_AT_ONCE = 1000
BUFFER = 1 << 20  # bytes: without one, Parquet reads a whole row group's column into memory
BROKEN = (OSError, pa.ArrowException)


def values(span: Span, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (row from 1, value) of the row groups that begin in the span: a str, None, or bytes where it is not UTF-8.

    Raise DamagedFile when the rest cannot be read, and UserError when the column is missing or holds no text.
    """
    try:
        yield from _row_groups(span, column)
    except BROKEN as error:
        raise read_error(span.file, error) from None


def check_column(file: Path, column: str) -> None:
    """Raise UserError, with the nearest name, when the table has no such column of text.

    A damaged file passes: that shows when it is read.
    """
    try:
        schema = pq.read_schema(file)
    except BROKEN as error:
        user_error = read_error(file, error)
        if isinstance(user_error, UserError):
            raise user_error from None
        return
    _require_text(file, column, schema)


def _row_groups(span: Span, column: str) -> Iterator[tuple[int, Any]]:
    try:
        table = pq.ParquetFile(span.file, buffer_size=BUFFER)
    except BROKEN as error:
        if span.begin > 0 and not isinstance(read_error(span.file, error), UserError):
            return  # the file's first span reports it
        raise
    with table:
        _require_text(span.file, column, table.schema_arrow)
        row = 1
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group)
            if span.begin <= _begin(rows, span.file) < span.end:
                batches = table.iter_batches(ROWS_AT_ONCE, [group], [column], use_threads=False)
                yield from enumerate((value for batch in batches for value in _texts(batch.column(0))), row)
            row += rows.num_rows


def _begin(rows: Any, file: Path) -> int:
    """Return where a row group begins in the file."""
    first = rows.column(0)
    begin = first.dictionary_page_offset or first.data_page_offset
    return min(int(begin), file.stat().st_size - 1)  # inside some span, whatever a damaged footer says


def _require_text(file: Path, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise UserError(f'{file}: no column "{column}": {did_you_mean(column, schema.names)}')
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{file}: column {column} is {kind}, not text; name another column")


def _texts(rows: Any) -> list[Any]:
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        return [_text(value) for value in rows]


def _text(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()
