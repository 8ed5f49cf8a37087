"""Datasets of the Hugging Face hub. `datasets` is imported when a config names one, not before: it takes a second."""

from collections.abc import Sequence
from typing import Any

from lad_dist.config import UserError, did_you_mean


def load(path: str, config: str | None, split: str, columns: Sequence[str], streaming: bool = False) -> Any:
    """The split as `datasets` gives it: iterable over dicts that have `columns`. Raises UserError, of one line, when
    the dataset, its configuration, the split or a column cannot be had."""
    import datasets  # noqa: PLC0415  slow, and needed only here

    try:
        data = datasets.load_dataset(path, config, split=split, streaming=streaming)
    except Exception as error:  # whatever network, cache and parsers raise: the user gets one line
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot load {config or 'the dataset'}, split {split}: {reason}") from None
    for column in columns:
        if data.column_names is not None and column not in data.column_names:
            raise UserError(f'{path}: no column "{column}": {did_you_mean(column, data.column_names)}')
    return data
