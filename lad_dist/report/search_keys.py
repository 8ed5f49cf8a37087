"""The keys that a search draws: where their values stand on an axis."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lad_dist.config.search_schema import LOGARITHMIC_RANGES, RANGES, SearchConfig
from lad_dist.report.settings import format_setting
from lad_dist.utils.tables import flatten


@dataclass(frozen=True)
class SearchKey:
    """A key, or an axis of choices.

    Attributes:
        name: of the key or axis.
        categories: The texts of all values; None of a key with a range of numbers.
        logarithmic: Whether the range is drawn from by its logarithm.
        is_whole: Whether the range is one of whole numbers.
    """

    name: str
    categories: list[str] | None
    logarithmic: bool = False
    is_whole: bool = False

    def position(self, sample: Mapping[str, Any]) -> float:
        """Return where a sample stands: its number or the logarithm of it, or its category; NaN without the key."""
        if self.name not in sample:
            return math.nan
        value = sample[self.name]
        if self.categories is not None:
            return float(self.categories.index(format_setting(value)))
        return math.log10(value) if self.logarithmic else float(value)

    def text(self, position: float) -> str:
        """Return the value at a position, for a person."""
        if self.categories is not None:
            return self.categories[round(position)]
        return f"{10**position if self.logarithmic else position:.3g}"


def search_keys(config: SearchConfig, samples: Iterable[Mapping[str, Any]]) -> list[SearchKey]:
    """Return the keys of the samples, in the order in which they occur first."""
    values: dict[str, list[Any]] = {}
    for sample in samples:
        for name, value in sample.items():
            values.setdefault(name, []).append(value)
    distributions: dict[str, dict[str, Any]] = {}
    for name, distribution, arguments in _distributions(config):
        distributions.setdefault(name, {}).setdefault(distribution, []).extend(arguments)
    return [_search_key(name, drawn, distributions.get(name, {})) for name, drawn in values.items()]


def _search_key(name: str, values: list[Any], distributions: Mapping[str, list[Any]]) -> SearchKey:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers and distributions and distributions.keys() <= set(RANGES):
        is_logarithmic = not distributions.keys().isdisjoint(LOGARITHMIC_RANGES) and min(values) > 0
        return SearchKey(name, None, is_logarithmic, all(isinstance(value, int) for value in values))
    texts = dict.fromkeys(map(format_setting, [*distributions.get("choice", []), *values]))
    return SearchKey(name, list(texts))


def _distributions(config: SearchConfig) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield key, distribution and arguments of what `[space]` draws, and each choice of an axis."""
    for path, value in flatten(config.space).items():
        parts = path.split(".")
        while parts[0] not in config.stages and len(parts) > 2:
            axis, choice, *parts = parts
            yield axis, "choice", [choice]
        key, distribution = ".".join(parts[:-1]), parts[-1]
        if distribution in (*RANGES, "choice") and isinstance(value, list):
            yield key, distribution, value
