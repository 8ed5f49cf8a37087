"""Labelled files: .csv, .tsv, .jsonl, .parquet.

The config names the columns of own files: texts, second texts of pairs, labels. In .tsv files quoting is
off, as in GLUE's: a line is a row and a quotation mark a character. In .csv files quoting is on.
"""

import csv
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lad_dist.config.errors import UserError
from lad_dist.config.load import lookup
from lad_dist.data.sources import hub
from lad_dist.data.sources.text_files import numbered_lines, numbered_objects
from lad_dist.utils.suggest import MAX_LISTED, did_you_mean
from lad_dist.utils.text import one_line

PAIR = "text_pair"  # the column of second texts unless data.text_pair names another
MAX_LABEL = float(np.finfo(np.float32).max)  # label of a regression


class Texts(NamedTuple):
    """n texts, or pairs of texts, and their labels."""

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray  # [n]: int64 class ids, or float32; float32 [n, V] of 0 and 1 where a text may have several


class ColumnNames(NamedTuple):
    """Names of the columns; pair is None where there is one text."""

    text: str
    pair: str | None
    label: str

    @property
    def present(self) -> list[str]:
        """Return the names of the columns that the task has."""
        return [name for name in self if name is not None]


class MissingColumn(UserError):
    """A column that is read is not there."""


class FileRows(NamedTuple):
    """Some columns of a file, and the line that each row begins on (in other tables the row's number, from 1)."""

    file: Path  # of a data set on the hub: its name and the split
    lines: list[int]
    columns: dict[str, list[Any]]

    def texts(self, column: str) -> list[str]:
        """Return the texts of a column. Raise UserError, with file and line, for a value that is no text."""
        values = self.columns[column]
        for line, value in zip(self.lines, values, strict=True):
            if not isinstance(value, str):
                raise UserError(f"{self.file}:{line}: {column} is {value!r}, not a text")
        return values

    def labels(self, column: str, convert: Callable[[Any], Any], dtype: Any) -> np.ndarray:
        """Return `convert` of each label. Raise UserError, with file and line, where that raises ValueError."""
        return np.array(list(convert_each(self.file, self.lines, self.columns[column], convert)), dtype=dtype)


def convert_each(
    file: Path, lines: Iterable[int], values: Iterable[Any], convert: Callable[[Any], Any]
) -> Iterator[Any]:
    """Yield `convert` of each value. Raise UserError, with file and line, where that raises ValueError."""
    for line, value in zip(lines, values, strict=True):
        try:
            yield convert(value)
        except ValueError as error:
            raise UserError(f"{file}:{line}: {error}") from None


def texts_of_rows(rows: FileRows, columns: ColumnNames, convert: Callable[[Any], Any], dtype: Any) -> Texts:
    """Return the texts of rows, and `convert` of their labels."""
    pairs = None if columns.pair is None else rows.texts(columns.pair)
    return Texts(rows.texts(columns.text), pairs, rows.labels(columns.label, convert, dtype))


def number_label(value: Any) -> float:
    """Return the label of a regression. Raise ValueError for what is no number of 32 bits."""
    is_number = not isinstance(value, bool) and isinstance(value, str | int | float) and "_" not in str(value)
    try:
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MAX_LABEL:
        raise ValueError(f"label {value!r} is not a number of 32 bits")
    return number


def reader_of(file: Path, readers: Mapping[str, Any]) -> Any:
    """Return the reader of files of this ending, in whatever case. Raise UserError when there is none."""
    return lookup(f"{file}: file type", file.suffix.lower(), readers)


def read_tsv(
    file: Path,
    required: Sequence[str],
    optional: str | None = None,
    header: Sequence[str] | None = None,
    skip_torn: bool = False,
) -> FileRows:
    """Return the required columns of a .tsv file, and the optional one where the file has it.

    `header` names all columns; None where the first line does. With `skip_torn`, rows that lack columns are left out.
    """
    return _table(file, tsv_fields(file), required, optional, header, skip_torn)


def _csv(file: Path, required: Sequence[str], optional: str | None = None) -> FileRows:
    return _table(file, csv_fields(file), required, optional)


def tsv_fields(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of each row of a .tsv file, the header among them."""
    return ((number, line.split("\t")) for number, line in numbered_lines(file) if line)


def csv_fields(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each row of a .csv file, the header among them. Raise UserError for a mistake."""
    before = csv.field_size_limit(sys.maxsize)  # of the whole process; by default a text has 131,072 characters
    reader = csv.reader((line + "\n" for _, line in numbered_lines(file)), strict=True)
    begin = 1
    try:
        for fields in reader:
            if fields:
                yield begin, fields
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{begin}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def _table(
    file: Path,
    rows: Iterator[tuple[int, list[str]]],
    required: Sequence[str],
    optional: str | None,
    header: Sequence[str] | None = None,
    skip_torn: bool = False,
) -> FileRows:
    """Return columns out of rows of fields, the first of which is the header when there is no other."""
    if header is None:
        _, header = next(rows, (0, []))
    names = present_columns(file, header, required, optional)
    return _not_empty(collect(file, names, fields_by_name(file, header, rows, skip_torn)))


def fields_by_name(
    file: Path, header: Sequence[str], rows: Iterable[tuple[int, list[str]]], skip_torn: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, fields by column) of each row. Raise UserError for one with more or fewer fields than the header."""
    for line, fields in rows:
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        elif not (skip_torn and len(fields) < len(header)):
            raise UserError(f"{file}:{line}: {len(fields)} columns, not {len(header)}")


def collect(file: Path, names: Sequence[str], rows: Iterable[tuple[int, Mapping[str, Any]]]) -> FileRows:
    """Return the columns of these names out of (line, values by column). Raise UserError for a row that lacks one."""
    result = FileRows(file, [], {name: [] for name in names})
    for line, row in rows:
        result.lines.append(line)
        for name in names:
            if name not in row:
                raise UserError(f"{file}:{line}: no {name}, which other rows have")
            result.columns[name].append(row[name])
    return result


def _jsonl(file: Path, required: Sequence[str], optional: str | None = None) -> FileRows:
    rows = dict(numbered_objects(file))  # by line
    header = list(dict.fromkeys(name for row in rows.values() for name in row))
    return collect(file, present_columns(file, header, required, optional), rows.items())


def _parquet(file: Path, required: Sequence[str], optional: str | None = None) -> FileRows:
    try:
        with pq.ParquetFile(file) as table:
            names = present_columns(file, table.schema_arrow.names, required, optional)
            columns = table.read(names).to_pydict()
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({one_line(error)})") from None
    return _not_empty(FileRows(file, list(range(1, len(columns[names[0]]) + 1)), columns))


def read_hub(
    name: str, config: str | None, split: str, required: Sequence[str], optional: str | None = None
) -> FileRows:
    """Return the required columns of a split of a data set, and the optional one where it has it.

    Numbers of classes that have names become the names.
    """
    rows = hub.load(name, config, split, ())
    where = Path(f"{name}[{split}]")
    columns = {column: list(rows[column]) for column in present_columns(where, rows.column_names, required, optional)}
    for column, values in columns.items():
        feature = rows.features[column]
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names is not None:
            columns[column] = [_named(value, names) for value in values]
    return _not_empty(FileRows(where, list(range(1, len(rows) + 1)), columns))


def _named(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class, or those of a list of classes."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def present_columns(file: Path, header: Sequence[str], required: Iterable[str], optional: str | None) -> list[str]:
    """Return the columns to read. Raise UserError for one that is missing."""
    if not header:
        raise UserError(f"{file}: empty")
    for name in required:
        if name not in header:
            columns = textwrap.shorten(", ".join(header), MAX_LISTED, placeholder=" …")
            raise MissingColumn(f'{file}: no column "{name}" among {columns}: {did_you_mean(name, header)}')
    names = list(required) if optional is None or optional not in header else [*required, optional]
    for name in names:
        if header.count(name) > 1:
            raise UserError(f'{file}: two columns are called "{name}"; rename one')
    return names


def _not_empty(rows: FileRows) -> FileRows:
    if not rows.lines:
        raise UserError(f"{rows.file}: no rows")
    return rows


READERS = {".csv": _csv, ".tsv": read_tsv, ".jsonl": _jsonl, ".parquet": _parquet}
