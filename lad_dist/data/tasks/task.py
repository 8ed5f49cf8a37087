"""A task: examples to train and evaluate on, label names, metrics."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.load import lookup
from lad_dist.config.schema import TaskDataConfig
from lad_dist.data.tasks import files, squad, tagging
from lad_dist.data.tasks.files import ColumnNames, Texts, number_label, reader_of, texts_of_rows
from lad_dist.data.tasks.glue import GLUE, glue_files, texts_from_hub, texts_from_tsv
from lad_dist.data.tasks.label_names import class_id, label_name, sorted_names

Kind = Literal["classification", "regression", "tagging", "question_answering"]
OWN_COLUMNS = ("text", "label")
OWN_PAIR = "text_pair"
ENTITY_TAGS = re.compile(r"O|[BIMELSU](-.+)?")  # BIO (IOB1, IOB2), IOBES and BILOU


RawExamples = Texts | tagging.Sentences | squad.Questions


class Task(NamedTuple):
    """Examples, label names and metrics.

    Label names are in the order of the class ids, none where outputs are numbers. The first metric is the one to
    maximise; f1 is that of the label `positive`. With `fixed_order`, data.labels says that heads have this order.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: RawExamples
    dev: Mapping[str, RawExamples]
    positive: str | None = None
    fixed_order: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of a head's outputs: labels, a regression's number, or where an answer begins and ends."""
        return self.label_names or {"regression": ("score",), "question_answering": ("start", "end")}[self.kind]


def check_task(data: TaskDataConfig) -> None:
    """Raise UserError for an unknown task, a missing file, or a kind of file that cannot be read."""
    read: list[Path] = []
    if data.task is None:
        read = [Path(file) for file in (data.train, data.dev) if file is not None]
        for file in read:
            reader_of(file, READERS[data.kind])
    elif data.path is not None:
        read = glue_files(data.path, lookup("task", data.task, GLUE))
    else:
        lookup("task", data.task, GLUE)
    for file in read:
        if not file.is_file():
            raise UserError(f"{file}: no such file")


def load_task(data: TaskDataConfig) -> Task:
    """Return the task's data, from GLUE's files, the hub or the user's own files.

    Raise UserError, with file and line, for a mistake in one.
    """
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


def _own_files(data: TaskDataConfig) -> tuple[Path, Path]:
    assert data.train is not None
    assert data.dev is not None
    return Path(data.train), Path(data.dev)


def _own_task(kind: Kind, data: TaskDataConfig) -> Task:
    train_file, dev_file = _own_files(data)
    train, dev = (reader_of(file, files.READERS)(file, OWN_COLUMNS, OWN_PAIR) for file in (train_file, dev_file))
    if (OWN_PAIR in train.columns) != (OWN_PAIR in dev.columns):
        lacking = dev_file if OWN_PAIR in train.columns else train_file
        raise UserError(f"{lacking}: no column {OWN_PAIR}, but the other file has it")
    columns = ColumnNames("text", OWN_PAIR if OWN_PAIR in train.columns else None, "label")
    if kind == "regression":
        names: tuple[str, ...] = ()
        examples = [texts_of_rows(rows, columns, number_label, np.float32) for rows in (train, dev)]
        for file, texts in zip((train_file, dev_file), examples, strict=True):
            if not np.ptp(texts.labels):
                raise UserError(f"{file}: every label is {texts.labels[0]:g}; a regression needs at least two")
        metrics: tuple[str, ...] = ("pearson", "spearman")
    else:
        present = sorted_names(train.labels("label", label_name, object).tolist())
        if len(present) < 2:
            raise UserError(f"{train_file}: every label is {present[0]}; a classification needs at least two")
        names = tuple(data.labels or present)
        ids = {name: number for number, name in enumerate(names)}
        if data.positive is not None:
            lookup("data.positive", data.positive, ids)
        examples = [texts_of_rows(rows, columns, partial(class_id, ids), np.int64) for rows in (train, dev)]
        metrics = ("accuracy", *(["f1"] if data.positive else []), "f1_macro", "matthews")
    return Task(
        name=train_file.stem,
        kind=kind,
        label_names=names,
        metrics=metrics,
        train=examples[0],
        dev={"dev": examples[1]},
        positive=data.positive,
        fixed_order=data.labels is not None,
    )


def _own_tagging(data: TaskDataConfig) -> Task:
    train_file, dev_file = _own_files(data)
    train, dev, names = tagging.load_tagging(train_file, dev_file, data.labels)
    entities = all(ENTITY_TAGS.fullmatch(name) for name in names)
    metrics = ("f1", "precision", "recall", "accuracy") if entities else ("accuracy",)
    return Task(
        name=train_file.stem,
        kind="tagging",
        label_names=names,
        metrics=metrics,
        train=train,
        dev={"dev": dev},
        fixed_order=data.labels is not None,
    )


def _own_questions(data: TaskDataConfig) -> Task:
    train_file, dev_file = _own_files(data)
    train, dev = squad.load_squad(train_file, dev_file)
    in_dev = {"f1_answerable": any(dev.answers), "f1_unanswerable": not all(dev.answers)}
    by_kind = [name for name, present in in_dev.items() if present and dev.unanswerable]
    return Task(train_file.stem, "question_answering", (), ("f1", "exact_match", *by_kind), train, {"dev": dev})


# The user's own files by the kind of task: readers by the ending of a file, and what makes a task of two files.
READERS: dict[Kind, Mapping[str, Any]] = {
    "classification": files.READERS,
    "regression": files.READERS,
    "tagging": tagging.READERS,
    "question_answering": squad.READERS,
}
LOADERS: dict[Kind, Callable[[TaskDataConfig], Task]] = {
    "classification": partial(_own_task, "classification"),
    "regression": partial(_own_task, "regression"),
    "tagging": _own_tagging,
    "question_answering": _own_questions,
}
