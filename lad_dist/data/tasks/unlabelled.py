"""Texts without labels, which a student learns from the teacher alone: .txt with a text a line, tables, splits."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.labels import UNLABELLED
from lad_dist.data.sources.text_files import numbered_lines
from lad_dist.data.tasks import files
from lad_dist.data.tasks.files import PAIR, FileRows, MissingColumn, Texts, read_hub, reader_of
from lad_dist.distributed.logs import get_logger

logger = get_logger(__name__)


def unlabelled_reader(file: str) -> Any:
    """Return the reader of a file. Raise UserError when there is none for its ending."""
    return reader_of(Path(file), {".txt": _text_lines, **files.READERS})


def load_unlabelled(data: TaskDataConfig, labelled: Texts) -> Texts:
    """Return the texts of data.unlabelled, pairs where the labelled ones are; blank ones are left out.

    The labels are UNLABELLED or NaN. Raise UserError, with file and line, for a mistake in the file.
    """
    assert data.unlabelled is not None
    columns = [data.text] if labelled.pairs is None else [data.text, data.text_pair or PAIR]
    try:
        if data.hub is None:
            rows = unlabelled_reader(data.unlabelled)(Path(data.unlabelled), columns)
        else:
            rows = read_hub(data.hub, data.hub_config, data.unlabelled, columns)
    except MissingColumn as error:
        raise UserError(f"{error}; data.text and data.text_pair name the columns") from None
    examples = [row for row in zip(*(rows.texts(name) for name in columns), strict=True) if any(map(str.strip, row))]
    if not examples:
        raise UserError(f"{rows.file}: no texts; remove data.unlabelled")
    texts, *pairs = (list(column) for column in zip(*examples, strict=True))
    label = np.nan if labelled.labels.dtype.kind == "f" else UNLABELLED
    labels = np.full((len(texts), *labelled.labels.shape[1:]), label, dtype=labelled.labels.dtype)
    return Texts(texts, pairs[0] if pairs else None, labels)


def warn_of_held_out_texts(name: str, unlabelled: Texts, held_out: Iterable[Any]) -> None:
    """Log how many unlabelled texts are in the sets to evaluate on: the student would learn the teacher's answers."""
    evaluated = {text for texts in held_out for text in _examples(texts)}
    if count := sum(text in evaluated for text in _examples(unlabelled)):
        message = "%s: %d of %d texts are in the dev or test set too, where scores may come out too good; remove them"
        logger.warning(message, name, count, len(unlabelled.texts))


def _examples(texts: Texts) -> Iterator[tuple[str, str | None]]:
    return zip(map(str.strip, texts.texts), map(str.strip, texts.pairs) if texts.pairs else repeat(None))  # noqa: B905


def _text_lines(file: Path, columns: Sequence[str]) -> FileRows:
    """Return the lines of a file as the only column."""
    if len(columns) > 1:
        raise UserError(f"{file}: the task reads pairs, of which a .txt file has no second texts; give a table")
    lines = dict(numbered_lines(file))
    return FileRows(file, list(lines), {columns[0]: list(lines.values())})
