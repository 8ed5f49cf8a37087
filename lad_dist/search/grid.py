"""Trials: what a search runs, sampled and checked before anything starts.

An axis of the grid is a table of named choices. A choice is a table of overrides; the key `base` in it names another
config to start from. What a trial samples is a function of (search.seed, sample, key): each combination gets the same.

A trial's run.label, by which a report groups runs, is its choices but for tasks and seeds: lad-low of lad-rte-low-0.
Where these are all its choices, it is the label of the config. A sample is a method of its own: lad-03.
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
from lad_dist.utils.tables import flatten

DIMENSION_KEYS = ("data.task", "data.dev", "run.seed")  # of a report: its tasks and seeds

Choices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trial:
    """A run of the search; `sample` is what distinguishes it: choices by axis, values by key."""

    sample: dict[str, Any]
    config: TaskConfig


def sample_trials(config: SearchConfig) -> list[Trial]:
    """Return the trials, each with the config of its run; raise UserError for what does not fit the schema of a run."""
    options = config.search
    space = {}
    for path, values in flatten(config.space).items():
        key, _, name = path.rpartition(".")
        space[key] = _distribution(key, name, values)  # of a key that occurs twice, as by the command line, the last
    width = len(str(options.num_samples - 1))
    method_axes = [axis for axis, choices in config.grid.items() if _names_method(choices)]
    trials = []
    for choices in _combinations(config.grid):
        tables, base = _tables(config, choices)
        method = [choice for axis, choice in choices if axis in method_axes]
        for number in range(options.num_samples):
            sample = {key: draw(random.Random(f"{options.seed}/{number}/{key}")) for key, draw in space.items()}
            suffix = [f"{number:0{width}}"] if space else []
            name = "-".join([*([choice for _, choice in choices] or ["trial"]), *suffix])
            task_config = _task_config(config, apply_overrides(tables, sample.items()), name, base)
            label = "-".join([*(method or [task_config.label]), *suffix])
            run = task_config.run.model_copy(update={"label": label})
            trials.append(Trial({**dict(choices), **sample}, task_config.model_copy(update={"run": run})))
    return trials


def base_configs(config: SearchConfig) -> list[str]:
    """Return the configs that trials start from."""
    changes = [change for choices in config.grid.values() for change in choices.values()]
    return sorted({config.search.base, *(change["base"] for change in changes if "base" in change)})


def _names_method(choices: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether an axis has choices that are not just other tasks or seeds, which a report has beside the method."""
    changes = [flatten(tables) for tables in choices.values()]
    dimensions = {str([change.get(key) for key in DIMENSION_KEYS]) for change in changes}
    return len(dimensions) < len(choices) or not any(change.keys() & DIMENSION_KEYS for change in changes)


def _combinations(grid: Mapping[str, Mapping[str, Any]]) -> Iterator[Choices]:
    """Yield every combination of choices; the first axis turns fastest.

    With seeds as the last axis, a grid that was interrupted is a whole one of fewer seeds.
    """
    axes = [[(axis, choice) for choice in choices] for axis, choices in grid.items()]
    return (choices[::-1] for choices in itertools.product(*reversed(axes)))


def _tables(config: SearchConfig, choices: Choices) -> tuple[dict[str, Any], str]:
    """Return the config of a combination, and the file that it starts from."""
    changes = []
    for axis, choice in choices:
        changes.append(dict(config.grid[axis][choice]))
        for key in changes[-1]:
            lookup(f"grid.{axis}.{choice}: key", key.split(".")[0], dict.fromkeys(["base", *TaskConfig.model_fields]))
    base = [config.search.base, *(change.pop("base") for change in changes if "base" in change)][-1]
    overrides = itertools.chain.from_iterable(flatten(tables).items() for tables in (config.override, *changes))
    return apply_overrides(read_toml(base), overrides), base


def _distribution(key: str, name: str, values: Any) -> Callable[[random.Random], Any]:
    draw = lookup(f"space.{key}: distribution", name, DISTRIBUTIONS)
    if not isinstance(values, list) or not values:
        raise UserError(f"space.{key}.{name}: give a list, [low, high] or for choice the values, not {values!r}")
    kind = int if name == "randint" else (int, float)
    is_range = len(values) == 2 and all(isinstance(value, kind) for value in values) and values[0] < values[1]
    if name != "choice" and not is_range:
        raise UserError(f"space.{key}.{name}: give [low, high] with low < high, not {values!r}")
    if name == "loguniform" and values[0] <= 0:
        raise UserError(f"space.{key}.{name}: the low end must be above 0, not {values[0]!r}")
    return lambda generator: draw(generator, values)


DISTRIBUTIONS: dict[str, Callable[[random.Random, list[Any]], Any]] = {
    "uniform": lambda generator, ends: generator.uniform(*ends),
    "loguniform": lambda generator, ends: math.exp(generator.uniform(*map(math.log, ends))),
    "randint": lambda generator, ends: generator.randrange(*ends),  # without the high end, as in Tune
    "choice": lambda generator, values: generator.choice(values),
}


def _task_config(config: SearchConfig, tables: Mapping[str, Any], name: str, base: str) -> TaskConfig:
    """Return the config of a run in the search's folder, with the arguments of objective and compressions checked.

    Trials share the cache of their teachers' outputs.
    """
    folder = Path(config.search.dir) / config.search.name
    overrides: dict[str, Any] = {"run.name": name, "run.dir": str(folder)}
    if "teacher" in tables and "cache" not in tables["teacher"]:
        overrides["teacher.cache"] = str(folder / "teacher_cache")
    run = parse_config(TaskConfig, apply_overrides(tables, overrides.items()), where=base)
    run_spec.resolve_options(run)
    return run
