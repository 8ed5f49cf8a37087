"""Datasets of the Hugging Face hub. `datasets` is imported when a config names one, not before: it takes a second."""

from collections.abc import Iterator, Sequence
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.text import one_line


class Unavailable(UserError):
    """A data set that is neither on this machine nor to be had."""


def load(path: str, config: str | None, split: str, columns: Sequence[str], streaming: bool = False) -> Any:
    """Return the split as `datasets` gives it: iterable over dicts that have `columns`.

    Raise UserError, of one line, when the dataset, the configuration, the split or a column cannot be had.
    """
    import datasets  # noqa: PLC0415 (slow, and needed only here)

    try:
        data = datasets.load_dataset(path, config, split=split, streaming=streaming)
    except Exception as error:  # whatever network, cache and parsers raise: the user gets one line
        raise Unavailable(f"{path}: cannot load {config or 'the dataset'}, split {split}: {one_line(error)}") from None
    if data.column_names is not None:
        for column in columns:
            _require(path, column, data.column_names)
    return data


def values(data: Any, path: str, column: str, shard: int, shards: int) -> Iterator[Any]:
    """Yield the column's values in shard number `shard` of a streamed split.

    Raise UserError when reading fails on the way.
    """
    try:
        for row in data.shard(shards, shard) if shards > 1 else data:
            _require(path, column, row)
            yield row[column]
    except UserError:
        raise
    except Exception as error:  # whatever network and parsers raise: the user gets one line
        raise UserError(f"{path}: reading stopped ({one_line(error)}); run again to go on") from None


def _require(path: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise UserError(f'{path}: no column "{column}": {did_you_mean(column, names)}')
