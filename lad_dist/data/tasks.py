"""Labelled data: GLUE's nine tasks in one table, and the user's own files.

    GLUE               where each task's texts and labels stand, in GLUE's own .tsv files and on the hub
    load_task(data)    -> Task: examples to train and evaluate on, label names, metrics
    check_task(data)   the mistakes that can be seen without reading the data

Own files have columns text, text_pair (optional) and label. In .tsv files, the user's too, quoting is off: a line is
a row and a quotation mark a character, as in GLUE's. In .csv files quoting is on. Those for tagging are read in
`tagging.py`, those for question answering in `squad.py`.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lad_dist.config.errors import UserError
from lad_dist.config.load import lookup
from lad_dist.config.schema import TaskDataConfig
from lad_dist.data import hub, squad, tagging
from lad_dist.data.labels import class_id, label_name, sorted_names
from lad_dist.data.lines import numbered_lines, numbered_objects
from lad_dist.utils.suggest import did_you_mean

Kind = Literal["classification", "regression", "tagging", "question_answering"]
HUB = "nyu-mll/glue"
OWN_COLUMNS = ("text", "label")
OWN_PAIR = "text_pair"
LARGEST = float(np.finfo(np.float32).max)  # label of a regression
PARTS_OF_ENTITIES = re.compile(r"O|[BIMELSU](-.+)?")  # BIO (IOB1, IOB2), IOBES and BILOU


class Texts(NamedTuple):
    """n texts, or pairs of texts, and their labels."""

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray  # [n]: int64 class ids, or float32


Raw = Texts | tagging.Sentences | squad.Questions


class Task(NamedTuple):
    """Label names are in the order of the class ids, none where outputs are numbers; the first metric is the one to
    maximise."""

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Raw
    dev: Mapping[str, Raw]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of a head's outputs: the labels, a regression's one number, or where an answer begins and ends."""
        return self.label_names or {"regression": ("score",), "question_answering": ("start", "end")}[self.kind]


class Columns(NamedTuple):
    """Names of the columns; pair is None where there is one text."""

    text: str
    pair: str | None
    label: str

    @property
    def present(self) -> list[str]:
        return [name for name in self if name is not None]


class GlueTask(NamedTuple):
    folder: str
    tsv: Columns
    hub: Columns
    label_names: tuple[str, ...]  # in the hub's order; none for regression
    metrics: tuple[str, ...]
    header: tuple[str, ...] | None = None  # the columns of .tsv files that do not name them
    dev: tuple[tuple[str, str, str], ...] = (("dev", "dev.tsv", "validation"),)  # name, file, the hub's split
    torn_rows: bool = False  # the official file has rows that lack columns; the hub leaves them out too


SENTENCE = Columns("sentence", None, "label")
SENTENCES = Columns("sentence1", "sentence2", "label")
ENTAILED = ("entailment", "not_entailment")
GLUE = {
    "cola": GlueTask(
        "CoLA",
        SENTENCE,
        SENTENCE,
        ("unacceptable", "acceptable"),
        ("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask("SST-2", SENTENCE, SENTENCE, ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(
        "MRPC",
        Columns("#1 String", "#2 String", "Quality"),
        SENTENCES,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    "stsb": GlueTask("STS-B", SENTENCES._replace(label="score"), SENTENCES, (), ("pearson", "spearman")),
    "qqp": GlueTask(
        "QQP",
        Columns("question1", "question2", "is_duplicate"),
        Columns("question1", "question2", "label"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        torn_rows=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        SENTENCES._replace(label="gold_label"),
        Columns("premise", "hypothesis", "label"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        dev=(
            ("dev", "dev_matched.tsv", "validation_matched"),
            ("dev_mismatched", "dev_mismatched.tsv", "validation_mismatched"),
        ),
    ),
    "qnli": GlueTask(
        "QNLI",
        Columns("question", "sentence", "label"),
        Columns("question", "sentence", "label"),
        ENTAILED,
        ("accuracy",),
    ),
    "rte": GlueTask("RTE", SENTENCES, SENTENCES, ENTAILED, ("accuracy",)),
    "wnli": GlueTask("WNLI", SENTENCES, SENTENCES, ("not_entailment", "entailment"), ("accuracy",)),
}


def check_task(data: TaskDataConfig) -> None:
    """Raises UserError for an unknown task, a missing file, or a kind of file that cannot be read."""
    if data.task is None:
        for file in _own_files(data):
            OWN_KINDS[data.kind].reader(file)
            _require_file(file)
    else:
        task = lookup("task", data.task, GLUE)
        for file in _glue_files(data.path, task) if data.path is not None else []:
            _require_file(file)


def load_task(data: TaskDataConfig) -> Task:
    """The task's data, from GLUE's files, the hub or the user's own files. Raises UserError naming file and line."""
    check_task(data)
    if data.task is None:
        return OWN_KINDS[data.kind].load(*_own_files(data))
    task = GLUE[data.task]
    if data.path is None:
        train, *dev = [_from_hub(task, data.task, split) for split in ("train", *(split for *_, split in task.dev))]
    else:
        train, *dev = [_from_tsv(task, file) for file in _glue_files(data.path, task)]
    kind: Kind = "classification" if task.label_names else "regression"
    names = [name for name, *_ in task.dev]
    return Task(data.task, kind, task.label_names, task.metrics, train, dict(zip(names, dev, strict=True)))


def _glue_files(path: str, task: GlueTask) -> list[Path]:
    """The training file, then those to evaluate on."""
    return [Path(path) / task.folder / name for name in ("train.tsv", *(file for _, file, _ in task.dev))]


def _own_files(data: TaskDataConfig) -> tuple[Path, Path]:
    assert data.train is not None
    assert data.dev is not None
    return Path(data.train), Path(data.dev)


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: no such file")


class _Rows(NamedTuple):
    """A file's wanted columns, and the line that each row begins on (in a .parquet the row's number, from 1)."""

    file: Path
    lines: list[int]
    columns: dict[str, list[Any]]

    def texts(self, column: str) -> list[str]:
        values = self.columns[column]
        for line, value in zip(self.lines, values, strict=True):
            if not isinstance(value, str):
                raise UserError(f"{self.file}:{line}: {column} is {value!r}, not a text")
        return values

    def labels(self, column: str, convert: Callable[[Any], Any], dtype: Any) -> np.ndarray:
        """`convert` of each label; what its ValueError says is given with file and line."""
        result = []
        for line, value in zip(self.lines, self.columns[column], strict=True):
            try:
                result.append(convert(value))
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.file}:{line}: {error}") from None
        return np.array(result, dtype=dtype)


def _from_tsv(task: GlueTask, file: Path) -> Texts:
    rows = _tsv(file, task.tsv.present, header=task.header, skip_torn=task.torn_rows)
    if not task.label_names:
        return _examples(rows, task.tsv, _number, np.float32)
    ids = {str(number): number for number in range(len(task.label_names))}
    ids |= {name: number for number, name in enumerate(task.label_names)}
    return _examples(rows, task.tsv, partial(class_id, ids), np.int64)


def _examples(rows: _Rows, columns: Columns, convert: Callable[[Any], Any], dtype: Any) -> Texts:
    pairs = None if columns.pair is None else rows.texts(columns.pair)
    return Texts(rows.texts(columns.text), pairs, rows.labels(columns.label, convert, dtype))


def _from_hub(task: GlueTask, name: str, split: str) -> Texts:
    rows = hub.load(HUB, name, split, task.hub.present)
    pairs = None if task.hub.pair is None else list(rows[task.hub.pair])
    dtype = np.int64 if task.label_names else np.float32
    return Texts(list(rows[task.hub.text]), pairs, np.array(rows[task.hub.label], dtype=dtype))


def _own_task(kind: Kind, train_file: Path, dev_file: Path) -> Task:
    train, dev = (_reader(file)(file, OWN_COLUMNS, optional=OWN_PAIR) for file in (train_file, dev_file))
    if (OWN_PAIR in train.columns) != (OWN_PAIR in dev.columns):
        lacking = dev_file if OWN_PAIR in train.columns else train_file
        raise UserError(f"{lacking}: no column {OWN_PAIR}, but the other file has it")
    columns = Columns("text", OWN_PAIR if OWN_PAIR in train.columns else None, "label")
    if kind == "regression":
        names: tuple[str, ...] = ()
        examples = [_examples(rows, columns, _number, np.float32) for rows in (train, dev)]
    else:
        names = sorted_names(train.labels("label", label_name, object).tolist())
        if len(names) < 2:
            raise UserError(f"{train_file}: every label is {names[0]}; a classification needs at least two")
        ids = {name: number for number, name in enumerate(names)}
        examples = [_examples(rows, columns, partial(class_id, ids), np.int64) for rows in (train, dev)]
    metrics = ("pearson", "spearman") if kind == "regression" else ("accuracy", "f1", "matthews")
    return Task(train_file.stem, kind, names, metrics, examples[0], {"dev": examples[1]})


def _own_tagging(train_file: Path, dev_file: Path) -> Task:
    train, dev, names = tagging.load_tagging(train_file, dev_file)
    entities = all(PARTS_OF_ENTITIES.fullmatch(name) for name in names)
    metrics = ("f1", "precision", "recall", "accuracy") if entities else ("accuracy",)
    return Task(train_file.stem, "tagging", names, metrics, train, {"dev": dev})


def _own_questions(train_file: Path, dev_file: Path) -> Task:
    train, dev = squad.load_squad(train_file, dev_file)
    both = ("f1_answerable", "f1_unanswerable") if train.unanswerable else ()
    return Task(train_file.stem, "question_answering", (), ("f1", "exact_match", *both), train, {"dev": dev})


def _number(value: Any) -> float:
    written = not isinstance(value, bool) and isinstance(value, str | int | float) and "_" not in str(value)
    try:
        number = float(value) if written else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise ValueError(f"label {value!r} is not a number of 32 bits")
    return number


def _reader(file: Path) -> Callable[..., _Rows]:
    return lookup(
        f"{file}: file type", file.suffix, {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    )


def _tsv(
    file: Path,
    wanted: Sequence[str],
    optional: str | None = None,
    header: Sequence[str] | None = None,
    skip_torn: bool = False,
) -> _Rows:
    fields = ((number, line.split("\t")) for number, line in numbered_lines(file) if line)
    return _table(file, fields, wanted, optional, header, skip_torn)


def _csv(file: Path, wanted: Sequence[str], optional: str | None = None) -> _Rows:
    reader = csv.reader((line + "\n" for _, line in numbered_lines(file)), strict=True)
    return _table(file, _csv_fields(file, reader), wanted, optional)


def _csv_fields(file: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    begin = 1
    try:
        for fields in reader:
            if fields:
                yield begin, fields
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{begin}: not valid CSV: {error}") from None


def _table(
    file: Path,
    rows: Iterator[tuple[int, list[str]]],
    wanted: Sequence[str],
    optional: str | None,
    header: Sequence[str] | None = None,
    skip_torn: bool = False,
) -> _Rows:
    """Columns out of rows of fields, the first of which is the header when none is given."""
    if header is None:
        _, header = next(rows, (0, []))
    columns = {name: header.index(name) for name in _present(file, header, wanted, optional)}
    result = _Rows(file, [], {name: [] for name in columns})
    for line, fields in rows:
        if len(fields) != len(header):
            if skip_torn and len(fields) < len(header):
                continue
            raise UserError(f"{file}:{line}: {len(fields)} columns, not {len(header)}")
        result.lines.append(line)
        for name, place in columns.items():
            result.columns[name].append(fields[place])
    return _not_empty(result)


def _jsonl(file: Path, wanted: Sequence[str], optional: str | None = None) -> _Rows:
    rows = numbered_objects(file)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{file}: empty")
    names = _present(file, list(first[1]), wanted, optional)
    result = _Rows(file, [], {name: [] for name in names})
    for line, row in chain([first], rows):
        result.lines.append(line)
        for name in names:
            if name not in row:
                raise UserError(f"{file}:{line}: no {name}")
            result.columns[name].append(row[name])
    return result


def _parquet(file: Path, wanted: Sequence[str], optional: str | None = None) -> _Rows:
    try:
        with pq.ParquetFile(file) as table:
            names = _present(file, table.schema_arrow.names, wanted, optional)
            columns = table.read(names).to_pydict()
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({' '.join(str(error).split())[:100]})") from None
    return _not_empty(_Rows(file, list(range(1, len(columns[names[0]]) + 1)), columns))


def _present(file: Path, found: Sequence[str], wanted: Iterable[str], optional: str | None) -> list[str]:
    """The columns to read. Raises UserError for one that is missing."""
    if not found:
        raise UserError(f"{file}: empty")
    for name in wanted:
        if name not in found:
            raise UserError(f'{file}: no column "{name}" among {", ".join(found)}: {did_you_mean(name, found)}')
    names = list(wanted) if optional is None or optional not in found else [*wanted, optional]
    for name in names:
        if found.count(name) > 1:
            raise UserError(f'{file}: two columns are called "{name}"; rename one')
    return names


def _not_empty(rows: _Rows) -> _Rows:
    if not rows.lines:
        raise UserError(f"{rows.file}: no rows")
    return rows


class OwnKind(NamedTuple):
    reader: Callable[[Path], Any]  # of a file; raises UserError where none reads files of that ending
    load: Callable[[Path, Path], Task]


OWN_KINDS: dict[Kind, OwnKind] = {
    "classification": OwnKind(_reader, partial(_own_task, "classification")),
    "regression": OwnKind(_reader, partial(_own_task, "regression")),
    "tagging": OwnKind(tagging.reader, _own_tagging),
    "question_answering": OwnKind(squad.reader, _own_questions),
}
