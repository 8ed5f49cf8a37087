"""Trials: the trainings that a sample or a combination of choices stands for, checked before they run.

An axis of a grid is a table of named choices. A choice is a table of overrides: `task.objective.soft = 0.5`; the key
`task.base` names another config for the stage to start from. A stage that no one gives a base is left out. The value
"none" unsets a key.

A trial's run.label, by which a report groups runs, is its choices but for tasks and seeds: lad-low of lad-rte-low-0.
Where these are all its choices, it is the label of the config. A sample is a method of its own: lad-003.

The run of a last stage has the trial's name. The run of any other stage is named by its content, in stages/: trials
whose configs are equal there share it.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.config.load import UNSET, apply_overrides, dump_config, lookup, parse_config, read_toml
from lad_dist.config.schema import TaskConfig, TrainConfig, train_schema
from lad_dist.config.search_schema import SearchConfig
from lad_dist.search.trial import Trial
from lad_dist.training import run_spec
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.tables import flatten

DIMENSION_KEYS = ("data.task", "data.dev", "run.seed")  # of a report: its tasks and seeds
STAGE_PATH = "stage:"  # before the name of the stage whose student is meant
SHARED = "stages"  # folder of the runs that trials share
HASH_DIGITS = 12

Choices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TrialBuilder:
    """Makes the trials of a search from changes to its configs."""

    config: SearchConfig

    def build(
        self,
        name: str,
        sample: Mapping[str, Any],
        changes: Iterable[tuple[str, Any]],
        *,
        seed: int = 0,
    ) -> Trial:
        """Return a trial whose options are checked; nothing but configs is read.

        Args:
            name: of the trial.
            sample: What distinguishes it.
            changes: Values by key; of a key that occurs twice the last one counts.
            seed: is added to the seed of each stage.

        Raises:
            UserError: A key or a value does not fit.
        """
        by_stage = self._by_stage([*flatten(self.config.override).items(), *changes])
        stages: dict[str, TrainConfig] = {}
        exports: dict[str, str] = {}
        names = [stage for stage in self.config.stages if by_stage[stage].get("base") is not None]
        if not names:
            raise UserError(f"{name}: no stage has a base; set stage.base, or NAME.base in a choice")
        for stage in names:
            changed = dict(by_stage[stage])
            base = changed.pop("base")
            tables = apply_overrides(_read(base), changed.items())
            tables = _with_exports(tables, exports, f"stage {stage}")
            run = dict(tables.get("run", {}))
            if seed:
                run["seed"] = run.get("seed", 0) + seed
            tables = {**tables, "run": run}
            config = self._stage_config(tables, base, stage, trial=name if stage == names[-1] else None)
            exports[stage] = str(config.run.folder / "export")
            stages[stage] = config
        return Trial(name, dict(sample), stages)

    def _by_stage(self, changes: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the changes by stage and by key of its config."""
        by_stage: dict[str, dict[str, Any]] = {stage.name: {"base": stage.base} for stage in self.config.stage}
        for key, value in changes:
            stage, _, rest = key.partition(".")
            if stage not in by_stage or not rest:
                raise UserError(
                    f"{key}: begin a key with the name of a stage, as in {self.config.stages[-1]}.{key}; "
                    f"{did_you_mean(stage, by_stage)}"
                )
            by_stage[stage].pop(rest, None)
            by_stage[stage][rest] = None if value == UNSET else value
        return by_stage

    def _stage_config(self, tables: Mapping[str, Any], base: str, stage: str, trial: str | None) -> TrainConfig:
        """Return the config of a run in the search's folder, with the arguments of objective and compressions checked.

        Trials share the cache of their teachers' outputs, and save whenever they evaluate.
        """
        folder = self.config.search.folder
        schema = train_schema(tables)
        overrides: dict[str, Any] = {
            "run.name": trial or "shared",
            "run.dir": str(folder if trial else folder / SHARED),
        }
        if schema is TaskConfig and "teacher" in tables and "cache" not in tables["teacher"]:
            overrides["teacher.cache"] = str(folder / "teacher_cache")
        if "save_every" not in tables["run"] and tables["run"].get("eval_every"):
            overrides["run.save_every"] = tables["run"]["eval_every"]
        config = parse_config(schema, apply_overrides(tables, overrides.items()), where=base)
        run_spec.resolve_options(config)
        if trial is not None:
            return config
        digest = hashlib.sha256(dump_config(config).encode()).hexdigest()[:HASH_DIGITS]
        return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{stage}-{digest}"})})


@lru_cache(maxsize=256)
def _read(base: str) -> dict[str, Any]:
    return read_toml(base)


def _with_exports(tables: Any, exports: Mapping[str, str], where: str) -> Any:
    """Return the tables with each path `stage:NAME` replaced by the folder of that stage's student."""
    if isinstance(tables, Mapping):
        return {key: _with_exports(value, exports, where) for key, value in tables.items()}
    if not isinstance(tables, str) or not tables.startswith(STAGE_PATH):
        return tables
    name = tables.removeprefix(STAGE_PATH)
    if name not in exports:
        raise UserError(f"{where}: {tables}: no stage before it has this name; {did_you_mean(name, exports)}")
    return exports[name]


def grid_trials(config: SearchConfig) -> list[Trial]:
    """Return the trials of a grid; raise UserError for what does not fit the schema of a run."""
    builder = TrialBuilder(config)
    method_axes = [axis for axis, choices in config.grid.items() if _names_method(choices, config.stages)]
    trials = []
    for choices in _combinations(config.grid):
        changes = itertools.chain.from_iterable(flatten(_choice(config, *choice)).items() for choice in choices)
        label = "-".join(choice for axis, choice in choices if axis in method_axes)
        name = "-".join(choice for _, choice in choices)
        trial = builder.build(name, dict(choices), changes)
        trials.append(trial.labelled(label) if label else trial)
    return trials


def _choice(config: SearchConfig, axis: str, choice: str) -> dict[str, Any]:
    tables = config.grid[axis][choice]
    for key in tables:
        lookup(f"grid.{axis}.{choice}: stage", key.partition(".")[0], dict.fromkeys(config.stages))
    return tables


def base_configs(config: SearchConfig) -> list[str]:
    """Return the configs that stages start from."""
    bases = {stage.base for stage in config.stage}
    tables = [config.override, config.space, *(choice for axis in config.grid.values() for choice in axis.values())]
    for key, value in itertools.chain.from_iterable(flatten(table).items() for table in tables):
        if any(f".{key}".endswith(f".{stage}.base") for stage in config.stages):
            bases.add(value)
    return sorted(base for base in bases if isinstance(base, str))


def _names_method(choices: Mapping[str, Mapping[str, Any]], stages: Iterable[str]) -> bool:
    """Tell whether an axis has choices that are not just other tasks or seeds, which a report has beside the method."""
    dimension_keys = [f"{stage}.{key}" for stage in stages for key in DIMENSION_KEYS]
    changes = [flatten(tables) for tables in choices.values()]
    dimensions = {str([change.get(key) for key in dimension_keys]) for change in changes}
    return len(dimensions) < len(choices) or not any(change.keys() & set(dimension_keys) for change in changes)


def _combinations(grid: Mapping[str, Mapping[str, Any]]) -> Iterator[Choices]:
    """Yield every combination of choices; the first axis turns fastest.

    With seeds as the last axis, a grid that was interrupted is a whole one of fewer seeds.
    """
    axes = [[(axis, choice) for choice in choices] for axis, choices in grid.items()]
    return (choices[::-1] for choices in itertools.product(*reversed(axes)))


def is_ready(config: TrainConfig, folder: Path) -> bool:
    """Return whether the students of other stages that a config reads are in the search's folder already."""
    paths = [config.student.path, config.teacher.path if config.teacher else None]
    exports = [Path(path) for path in paths if path is not None and Path(path).is_relative_to(folder / SHARED)]
    return all(export.exists() for export in exports)
