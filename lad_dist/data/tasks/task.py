"""A task: examples to train and evaluate on, label names, metrics."""

import re
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.load import lookup
from lad_dist.config.schema import TaskDataConfig
from lad_dist.data.tasks import files, multilabel, squad, tagging
from lad_dist.data.tasks.files import (
    PAIR,
    ColumnNames,
    FileRows,
    MissingColumn,
    Texts,
    convert_each,
    number_label,
    read_hub,
    reader_of,
    texts_of_rows,
)
from lad_dist.data.tasks.glue import GLUE, glue_files, texts_from_hub, texts_from_tsv
from lad_dist.data.tasks.label_names import class_id, is_given, label_list, label_name, multi_hot, sorted_names
from lad_dist.data.tasks.unlabelled import load_unlabelled, unlabelled_reader, warn_of_held_out_texts
from lad_dist.utils.suggest import MAX_LISTED

Kind = Literal["classification", "multilabel", "regression", "tagging", "question_answering"]
SAMPLE_WORD = "the"  # stands for each word of a text that is not here
ENTITY_TAGS = re.compile(r"O|[BIMELSU](-.+)?")  # BIO (IOB1, IOB2), IOBES and BILOU


RawExamples = Texts | tagging.Sentences | squad.Questions


class Task(NamedTuple):
    """Examples, label names and metrics.

    Label names are in the order of the class ids, none where outputs are numbers. The first metric is the one to
    maximise; f1 is that of the label `positive`. With `fixed_order`, data.labels says that heads have this order.
    `dev` is evaluated on the way and at the end, `test` at the end alone. `unlabelled` is trained on beside `train`.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: RawExamples
    dev: Mapping[str, RawExamples]
    test: RawExamples | None = None
    unlabelled: Texts | None = None
    positive: str | None = None
    fixed_order: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of a head's outputs: labels, a regression's number, or where an answer begins and ends."""
        return self.label_names or {"regression": ("score",), "question_answering": ("start", "end")}[self.kind]


def check_task(data: TaskDataConfig) -> None:
    """Raise UserError for an unknown task, a missing file, or a kind of file that cannot be read."""
    read: list[Path] = []
    if data.hub is not None:
        return
    if data.unlabelled is not None:
        unlabelled_reader(data.unlabelled)
    if data.task is None:
        read = _own_files(data)
        for file in read:
            reader_of(file, READERS[data.kind])
    elif data.path is not None:
        read = glue_files(data.path, lookup("task", data.task, GLUE))
    else:
        lookup("task", data.task, GLUE)
    for file in [*read, *([Path(data.unlabelled)] if data.unlabelled is not None else [])]:
        if not file.is_file():
            raise UserError(f"{file}: no such file")


def load_task(data: TaskDataConfig) -> Task:
    """Return the task's data, from GLUE's files, the hub or the user's own files.

    Raise UserError, with file and line, for a mistake in one.
    """
    task = _read_task(data)
    _check_class_weights(data, task)
    if data.unlabelled is None:
        return task
    assert isinstance(task.train, Texts)
    unlabelled = load_unlabelled(data, task.train)
    warn_of_held_out_texts(data.unlabelled, unlabelled, [*task.dev.values(), *([task.test] if task.test else [])])
    return task._replace(unlabelled=unlabelled)


def _check_class_weights(data: TaskDataConfig, task: Task) -> None:
    if data.class_weights is not None and not task.label_names:
        raise UserError(f"data.class_weights: the labels of {task.name} are numbers")
    if isinstance(data.class_weights, list) and len(data.class_weights) != len(task.label_names):
        names = textwrap.shorten(", ".join(task.label_names), MAX_LISTED, placeholder=" …")
        count = len(data.class_weights)
        raise UserError(f"data.class_weights: {count} weights for the {len(task.label_names)} labels {names}")


def longest_examples(data: TaskDataConfig, count: int) -> Task:
    """Return a GLUE task with `count` texts of max_length tokens or more, in place of a data set that is not here."""
    assert data.task is not None
    task = GLUE[data.task]
    texts = [" ".join([SAMPLE_WORD] * data.max_length)] * count
    labels = np.arange(count) % 2
    examples = Texts(texts, None, labels if task.label_names else labels.astype(np.float32))
    longest = Task(
        name=data.task,
        kind="classification" if task.label_names else "regression",
        label_names=tuple(data.labels or task.label_names),
        metrics=task.metrics,
        train=examples,
        dev={"dev": examples},
        positive=task.label_names[1] if "f1" in task.metrics else None,
        fixed_order=data.labels is not None,
    )
    _check_class_weights(data, longest)
    return longest


def _read_task(data: TaskDataConfig) -> Task:
    check_task(data)
    if data.task is None:
        return LOADERS[data.kind](data)
    task = GLUE[data.task]
    if data.path is None:
        train, *dev = [
            texts_from_hub(task, data.task, split) for split in ("train", *(split for *_, split in task.dev))
        ]
    else:
        train, *dev = [texts_from_tsv(task, file) for file in glue_files(data.path, task)]
    kind: Kind = "classification" if task.label_names else "regression"
    if data.labels is not None:
        if sorted(data.labels) != sorted(task.label_names):
            raise UserError(f"data.labels: the labels of {data.task} are {', '.join(task.label_names) or 'numbers'}")
        ids = np.array([data.labels.index(name) for name in task.label_names])
        train, *dev = [texts._replace(labels=ids[texts.labels]) for texts in (train, *dev)]
    return Task(
        name=data.task,
        kind=kind,
        label_names=tuple(data.labels or task.label_names),
        metrics=task.metrics,
        train=train,
        dev=dict(zip((name for name, *_ in task.dev), dev, strict=True)),
        positive=task.label_names[1] if "f1" in task.metrics else None,
        fixed_order=data.labels is not None,
    )


def _own_files(data: TaskDataConfig) -> list[Path]:
    """Return the files, or the names of the splits, to train on, for dev, and for the test where there is one.

    An evaluation without a training set has the dev set in its place, on which nothing trains.
    """
    return [Path(name) for name in (data.train or data.dev, data.dev, data.test) if name is not None]


def _own_rows(data: TaskDataConfig) -> tuple[list[FileRows], ColumnNames]:
    """Return the rows of the own files, and the names of the columns; of several columns of labels the first."""
    labels = [data.label] if isinstance(data.label, str) else data.label
    required = [name for name in (data.text, data.text_pair, *labels) if name is not None]
    optional = PAIR if data.text_pair is None else None
    try:
        if data.hub is None:
            rows = [reader_of(file, files.READERS)(file, required, optional) for file in _own_files(data)]
        else:
            splits = map(str, _own_files(data))
            rows = [read_hub(data.hub, data.hub_config, split, required, optional) for split in splits]
    except MissingColumn as error:
        raise UserError(f"{error}; data.text, data.text_pair and data.label name the columns") from None
    with_pair = [each for each in rows if PAIR in each.columns]
    if optional is not None and 0 < len(with_pair) < len(rows):
        lacking = next(each.file for each in rows if PAIR not in each.columns)
        raise UserError(f"{lacking}: no column {PAIR}, but {with_pair[0].file} has it")
    return rows, ColumnNames(data.text, data.text_pair or (PAIR if with_pair else None), labels[0])


def _own_task(kind: Kind, data: TaskDataConfig) -> Task:
    rows, columns = _own_rows(data)
    train = rows[0]
    if kind == "regression":
        names: tuple[str, ...] = ()
        examples = [texts_of_rows(each, columns, number_label, np.float32) for each in rows]
        for each, texts in zip(rows, examples, strict=True):
            if not np.ptp(texts.labels):
                raise UserError(f"{each.file}: every label is {texts.labels[0]:g}; a regression needs at least two")
        metrics: tuple[str, ...] = ("pearson", "spearman")
    else:
        present = sorted_names(train.labels(columns.label, label_name, object).tolist())
        if len(present) < 2 and data.train is not None:
            raise UserError(f"{train.file}: every label is {present[0]}; a classification needs at least two")
        names = tuple(data.labels or present)
        ids = {name: number for number, name in enumerate(names)}
        if data.positive is not None:
            lookup("data.positive", data.positive, ids)
        examples = [texts_of_rows(each, columns, partial(class_id, ids), np.int64) for each in rows]
        metrics = ("accuracy", *(["f1"] if data.positive else []), "f1_macro", "matthews")
    return Task(
        name=Path(data.hub).name if data.hub else train.file.stem,
        kind=kind,
        label_names=names,
        metrics=metrics,
        train=examples[0],
        dev={"dev": examples[1]},
        test=examples[2] if data.test else None,
        positive=data.positive,
        fixed_order=data.labels is not None,
    )


def _own_multilabel(data: TaskDataConfig) -> Task:
    rows, columns = _own_rows(data)
    lists = [_label_lists(each, data) for each in rows]
    if data.labels is not None or isinstance(data.label, str):
        names = tuple(data.labels or sorted_names(name for given in lists[0] for name in given))
    else:
        names = tuple(data.label)
    if len(names) < 2:
        listed = ", ".join(names) or "none"
        raise UserError(
            f"{rows[0].file}: labels are {listed}; multilabel needs at least two, data.labels may name them"
        )
    to_labels = partial(multi_hot, {name: number for number, name in enumerate(names)})
    examples = []
    for each, given in zip(rows, lists, strict=True):
        with_lists = each._replace(columns={**each.columns, columns.label: given})
        examples.append(texts_of_rows(with_lists, columns, to_labels, np.float32))
        if not examples[-1].labels.any():
            raise UserError(f"{each.file}: no example has a label")
    if data.train is not None and not np.ptp(examples[0].labels, axis=0).any():
        raise UserError(f"{rows[0].file}: all examples have the same labels")
    return Task(
        name=Path(data.hub).name if data.hub else rows[0].file.stem,
        kind="multilabel",
        label_names=names,
        metrics=multilabel.METRICS,
        train=examples[0],
        dev={"dev": examples[1]},
        test=examples[2] if data.test else None,
        fixed_order=data.labels is not None,
    )


def _label_lists(rows: FileRows, data: TaskDataConfig) -> list[list[str]]:
    """Return the names of each row's labels. Raise UserError, with file and line, for a mistake in one."""
    if isinstance(data.label, str):
        values = rows.columns[data.label]
        return list(convert_each(rows.file, rows.lines, values, partial(label_list, data.labels)))
    given = [rows.labels(column, partial(is_given, column), bool) for column in data.label]
    return [[name for name, has in zip(data.label, row, strict=True) if has] for row in zip(*given, strict=True)]


def _own_tagging(data: TaskDataConfig) -> Task:
    paths = _own_files(data)
    sentences, names = tagging.load_tagging(paths, data.labels)
    entities = all(ENTITY_TAGS.fullmatch(name) for name in names)
    metrics = ("f1", "precision", "recall", "accuracy") if entities else ("accuracy",)
    return Task(
        name=paths[0].stem,
        kind="tagging",
        label_names=names,
        metrics=metrics,
        train=sentences[0],
        dev={"dev": sentences[1]},
        test=sentences[2] if data.test else None,
        fixed_order=data.labels is not None,
    )


def _own_questions(data: TaskDataConfig) -> Task:
    paths = _own_files(data)
    train, dev, *test = squad.load_squad(paths)
    in_dev = {"f1_answerable": any(dev.answers), "f1_unanswerable": not all(dev.answers)}
    by_kind = [name for name, present in in_dev.items() if present and dev.unanswerable]
    metrics = ("f1", "exact_match", *by_kind)
    return Task(paths[0].stem, "question_answering", (), metrics, train, {"dev": dev}, test=test[0] if test else None)


# The user's own files by the kind of task: readers by the ending of a file, and what makes a task of two files.
READERS: dict[Kind, Mapping[str, Any]] = {
    "classification": files.READERS,
    "multilabel": files.READERS,
    "regression": files.READERS,
    "tagging": tagging.READERS,
    "question_answering": squad.READERS,
}
LOADERS: dict[Kind, Callable[[TaskDataConfig], Task]] = {
    "classification": partial(_own_task, "classification"),
    "multilabel": _own_multilabel,
    "regression": partial(_own_task, "regression"),
    "tagging": _own_tagging,
    "question_answering": _own_questions,
}
