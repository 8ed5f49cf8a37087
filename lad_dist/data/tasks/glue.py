"""GLUE's nine tasks as one table: where texts and labels stand, in GLUE's own .tsv files and on the hub."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lad_dist.data.sources import hub
from lad_dist.data.tasks.files import ColumnNames, Texts, number_label, read_tsv, texts_of_rows
from lad_dist.data.tasks.label_names import class_id

HUB_NAME = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """Where a task's texts and labels stand."""

    folder: str
    tsv: ColumnNames
    hub: ColumnNames
    label_names: tuple[str, ...]  # in the hub's order; none for regression
    metrics: tuple[str, ...]
    header: tuple[str, ...] | None = None  # the columns of .tsv files that do not name them
    dev: tuple[tuple[str, str, str], ...] = (("dev", "dev.tsv", "validation"),)  # name, file, the hub's split
    num_examples: int = 0  # to train on
    torn_rows: bool = False  # the official file has rows that lack columns; the hub leaves them out too


SENTENCE = ColumnNames("sentence", None, "label")
SENTENCES = ColumnNames("sentence1", "sentence2", "label")
ENTAILED = ("entailment", "not_entailment")
GLUE = {
    "cola": GlueTask(
        "CoLA",
        SENTENCE,
        SENTENCE,
        ("unacceptable", "acceptable"),
        ("matthews",),
        header=("source", "label", "star", "sentence"),
        num_examples=8_551,
    ),
    "sst2": GlueTask("SST-2", SENTENCE, SENTENCE, ("negative", "positive"), ("accuracy",), num_examples=67_349),
    "mrpc": GlueTask(
        "MRPC",
        ColumnNames("#1 String", "#2 String", "Quality"),
        SENTENCES,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        num_examples=3_668,
    ),
    "stsb": GlueTask(
        "STS-B", SENTENCES._replace(label="score"), SENTENCES, (), ("pearson", "spearman"), num_examples=5_749
    ),
    "qqp": GlueTask(
        "QQP",
        ColumnNames("question1", "question2", "is_duplicate"),
        ColumnNames("question1", "question2", "label"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        torn_rows=True,
        num_examples=363_846,
    ),
    "mnli": GlueTask(
        "MNLI",
        SENTENCES._replace(label="gold_label"),
        ColumnNames("premise", "hypothesis", "label"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        dev=(
            ("dev", "dev_matched.tsv", "validation_matched"),
            ("dev_mismatched", "dev_mismatched.tsv", "validation_mismatched"),
        ),
        num_examples=392_702,
    ),
    "qnli": GlueTask(
        "QNLI",
        ColumnNames("question", "sentence", "label"),
        ColumnNames("question", "sentence", "label"),
        ENTAILED,
        ("accuracy",),
        num_examples=104_743,
    ),
    "rte": GlueTask("RTE", SENTENCES, SENTENCES, ENTAILED, ("accuracy",), num_examples=2_490),
    "wnli": GlueTask("WNLI", SENTENCES, SENTENCES, ("not_entailment", "entailment"), ("accuracy",), num_examples=635),
}


def glue_files(path: str, task: GlueTask) -> list[Path]:
    """Return the training file, then those to evaluate on."""
    return [Path(path) / task.folder / name for name in ("train.tsv", *(file for _, file, _ in task.dev))]


def texts_from_tsv(task: GlueTask, file: Path) -> Texts:
    """Return the texts and labels of one of GLUE's own files."""
    rows = read_tsv(file, task.tsv.present, header=task.header, skip_torn=task.torn_rows)
    if not task.label_names:
        return texts_of_rows(rows, task.tsv, number_label, np.float32)
    ids = {str(number): number for number in range(len(task.label_names))}
    ids |= {name: number for number, name in enumerate(task.label_names)}
    return texts_of_rows(rows, task.tsv, partial(class_id, ids), np.int64)


def texts_from_hub(task: GlueTask, name: str, split: str) -> Texts:
    """Return the texts and labels of a split on the hub."""
    rows = hub.load(HUB_NAME, name, split, task.hub.present)
    pairs = None if task.hub.pair is None else list(rows[task.hub.pair])
    dtype = np.int64 if task.label_names else np.float32
    return Texts(list(rows[task.hub.text]), pairs, np.array(rows[task.hub.label], dtype=dtype))
