"""The text column of Parquet and Arrow files, a few rows at a time.

values(span, column, kind)          (row from 1, value) for the rows of a span of a file
check_column(file, column, kind)    whether the table has the column, and it holds text
"""

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
ARROW_FILE = b"ARROW1"  # how a file with an index begins; a stream has none
BROKEN = (OSError, pa.ArrowException)

Columns = Iterator[tuple[int, Any]]  # number of the first row, the rows' values as an Arrow array


def values(span: Span, column: str, kind: str) -> Iterator[tuple[int, Any]]:
    """Yield (row from 1, value): a str, None, or bytes where the text is not UTF-8.

    A Parquet file gives the row groups that begin in the span; an Arrow file is read whole.

    Raises:
        DamagedFile: The rest of the file cannot be read.
        UserError: The column is missing or holds no text.
    """
    columns = _row_groups(span, column) if kind == "parquet" else _record_batches(span.file, column)
    try:
        for first, rows in columns:
            yield from enumerate(_texts(rows), first)
    except BROKEN as error:
        raise read_error(span.file, error) from None


def check_column(file: Path, column: str, kind: str) -> None:
    """Raise UserError, with the nearest name, when the table has no such column of text.

    A damaged file passes: that shows when it is read.
    """
    try:
        schema = pq.read_schema(file) if kind == "parquet" else _open_arrow(pa.OSFile(str(file))).schema
    except BROKEN as error:
        user_error = read_error(file, error)
        if isinstance(user_error, UserError):
            raise user_error from None
        return
    _require_text(file, column, schema)


def _row_groups(span: Span, column: str) -> Columns:
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
                yield from _numbered(row, table.iter_batches(ROWS_AT_ONCE, [group], [column], use_threads=False))
            row += rows.num_rows


def _begin(rows: Any, file: Path) -> int:
    """Return where a row group begins in the file."""
    first = rows.column(0)
    begin = first.dictionary_page_offset or first.data_page_offset
    return min(int(begin), file.stat().st_size - 1)  # inside some span, whatever a damaged footer says


def _record_batches(file: Path, column: str) -> Columns:
    with pa.OSFile(str(file)) as stream:
        table = _open_arrow(stream)
        _require_text(file, column, table.schema)
        batches = map(table.get_batch, range(table.num_record_batches)) if hasattr(table, "get_batch") else table
        yield from _numbered(1, (batch.select([column]) for batch in batches))


def _open_arrow(stream: Any) -> Any:
    begin = stream.read(len(ARROW_FILE))
    stream.seek(0)
    return pa.ipc.open_file(stream) if begin == ARROW_FILE else pa.ipc.open_stream(stream)


def _numbered(row: int, batches: Iterator[Any]) -> Columns:
    for batch in batches:
        yield row, batch.column(0)
        row += batch.num_rows


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
