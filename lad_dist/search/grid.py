"""Trials: what a search runs, drawn and checked before anything starts.

    draw(config)    every combination of the grid's choices, each with as many samples of the space
    bases(config)   the files that they start from
    dotted(tables)  nested tables by dotted keys

An axis of the grid is a table of named choices, a choice a table of overrides; the key `base` in it names another
config to start from. What a trial samples is a function of (search.seed, sample, key): each combination gets the same.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.config.load import apply_overrides, lookup, parse_config, read_toml
from lad_dist.config.schema import SearchConfig, TaskConfig
from lad_dist.training import run_spec

Choices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trial:
    """`sample` is what tells it from other trials: choices by axis, values by key."""

    sample: dict[str, Any]
    config: TaskConfig


def sample_trials(config: SearchConfig) -> list[Trial]:
    """The trials, each with the config of its run. Raises UserError for what does not fit the schema of a run."""
    words = config.search
    space = {key: _distribution(key, name, values) for key, name, values in _distributions(config.space)}
    width = len(str(words.num_samples - 1))
    trials = []
    for choices in _combinations(config.grid):
        tables, base = _tables(config, choices)
        for number in range(words.num_samples):
            sample = {key: law(random.Random(f"{words.seed}/{number}/{key}")) for key, law in space.items()}
            numbered = [f"{number:0{width}}"] if space else []
            name = "-".join([*(choice for _, choice in choices), *numbered] if choices else ["trial", *numbered])
            run = _run(config, apply_overrides(tables, sample.items()), name, base)
            trials.append(Trial({**dict(choices), **sample}, run))
    return trials


def base_configs(config: SearchConfig) -> list[str]:
    """The configs that trials start from."""
    changes = [change for choices in config.grid.values() for change in choices.values()]
    return sorted({config.search.base, *(change["base"] for change in changes if "base" in change)})


def _combinations(grid: Mapping[str, Mapping[str, Any]]) -> Iterator[Choices]:
    """The first axis turns fastest: with seeds last, a grid that was interrupted is a whole one of fewer seeds."""
    axes = [[(axis, choice) for choice in choices] for axis, choices in grid.items()]
    return (choices[::-1] for choices in itertools.product(*reversed(axes)))


def _tables(config: SearchConfig, choices: Choices) -> tuple[dict[str, Any], str]:
    """The config of a combination, and the file that it starts from."""
    changes = [_choice(config, axis, choice) for axis, choice in choices]
    base = [config.search.base, *(change.pop("base") for change in changes if "base" in change)][-1]
    return apply_overrides(read_toml(base), itertools.chain(dotted(config.override), *map(dotted, changes))), base


def _choice(config: SearchConfig, axis: str, choice: str) -> dict[str, Any]:
    changes = config.grid[axis][choice]
    for key in changes:
        lookup(f"grid.{axis}.{choice}: key", key.split(".")[0], dict.fromkeys(["base", *TaskConfig.model_fields]))
    return dict(changes)


def dotted(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in nested tables, by dotted keys: `"data.task" = …` and `data.task = …` say the same."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _distributions(space: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Key, distribution and its values; of a key given twice, as by the command line, the last."""
    for path, values in dotted(space):
        key, _, name = path.rpartition(".")
        yield key, name, values


def _distribution(key: str, name: str, values: Any) -> Callable[[random.Random], Any]:
    law = lookup(f"space.{key}: distribution", name, DISTRIBUTIONS)
    if not isinstance(values, list) or not values:
        raise UserError(f"space.{key}.{name}: give a list, [low, high] or for choice the values, not {values!r}")
    if name != "choice":
        _check_range(f"space.{key}.{name}", values, int if name == "randint" else (int, float))
    if name == "loguniform" and values[0] <= 0:
        raise UserError(f"space.{key}.{name}: the low end must be above 0, not {values[0]!r}")
    return lambda chance: law(chance, values)


def _check_range(where: str, values: list[Any], kind: Any) -> None:
    if len(values) != 2 or not all(isinstance(value, kind) for value in values) or values[0] >= values[1]:
        raise UserError(f"{where}: give [low, high] with low < high, not {values!r}")


DISTRIBUTIONS: dict[str, Callable[[random.Random, list[Any]], Any]] = {
    "uniform": lambda chance, ends: chance.uniform(*ends),
    "loguniform": lambda chance, ends: math.exp(chance.uniform(*map(math.log, ends))),
    "randint": lambda chance, ends: chance.randrange(*ends),  # without the high end, as Tune's
    "choice": lambda chance, values: chance.choice(values),
}


def _run(config: SearchConfig, tables: Mapping[str, Any], name: str, base: str) -> TaskConfig:
    """A run in the search's folder, its objective's and surgeries' arguments checked too. Trials share what their
    teachers say."""
    folder = Path(config.search.dir) / config.search.name
    place: dict[str, Any] = {"run.name": name, "run.dir": str(folder)}
    if "teacher" in tables and "cache" not in tables["teacher"]:
        place["teacher.cache"] = str(folder / "teacher_cache")
    run = parse_config(TaskConfig, apply_overrides(tables, place.items()), where=base)
    run_spec.resolve_options(run)
    return run
