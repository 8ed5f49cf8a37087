"""The trials of a search with a space, from the files in the folder of the search."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lad_dist.config.errors import UserError
from lad_dist.config.load import parse_config, read_toml
from lad_dist.config.search_schema import SearchConfig
from lad_dist.report.search_keys import SearchKey, search_keys
from lad_dist.report.settings import format_setting
from lad_dist.runs.search_record import MINIMISED, Status, TrialState, cost, read_trials
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.text import first_line

NOT_ENDED = "not ended"  # of a trial that has no status


@dataclass(frozen=True)
class ScoredSample:
    """A sample with a score: trials that completed or were stopped, one for each seed."""

    name: str
    trials: Sequence[TrialState]

    @property
    def sample(self) -> dict[str, Any]:
        """Choices by axis, values by key."""
        return self.trials[0].sample

    @property
    def status(self) -> Status | None:
        """How the trial with the first seed ended."""
        return self.trials[0].status

    @property
    def step(self) -> int:
        """The last step of the trial with the first seed."""
        return self.trials[0].step

    @property
    def seconds(self) -> float:
        """Seconds of all seeds."""
        return sum(trial.seconds for trial in self.trials)

    def mean(self, metric: str) -> float:
        """Return the mean over the seeds; NaN where one of them has no value."""
        return statistics.fmean(trial.values.get(metric, math.nan) for trial in self.trials)

    def error(self, metric: str) -> float:
        """Return the standard error of the mean; NaN of one seed."""
        values = [trial.values.get(metric, math.nan) for trial in self.trials]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class SearchTrials:
    """The trials of a search.

    Attributes:
        folder: of the search.
        config: of the search.
        metrics: that are optimised, none where no trial has one yet.
        trials: by name, in the order in which they began.
        has_ended: Whether the search has ended, so that nothing changes any more.
    """

    folder: Path
    config: SearchConfig
    metrics: Sequence[str]
    trials: Mapping[str, TrialState]
    has_ended: bool

    @cached_property
    def scored(self) -> list[ScoredSample]:
        """The samples that have a score, best first by the first metric; those with all seeds before others."""
        return scored_samples(self.trials.values(), lambda _: self.metrics[0]) if self.metrics else []

    @property
    def others(self) -> list[TrialState]:
        """The trials without a score: those that run, failed, were refused or lost."""
        with_score = {trial.name for each in self.scored for trial in each.trials}
        return [trial for trial in self.trials.values() if trial.name not in with_score]

    @cached_property
    def keys(self) -> list[SearchKey]:
        """The keys that were drawn."""
        return search_keys(self.config, (trial.sample for trial in self.trials.values()))

    @property
    def base(self) -> TrialState | None:
        """The trial of the base config, which is the first one; None where none has begun."""
        return next(iter(self.trials.values()), None)

    def means(self) -> pd.DataFrame:
        """Return the metrics of the samples that have a score, by name."""
        rows = [[each.mean(metric) for metric in self.metrics] for each in self.scored]
        return pd.DataFrame(rows, index=[each.name for each in self.scored], columns=list(self.metrics))

    def positions(self) -> pd.DataFrame:
        """Return where the samples that have a score stand on the axis of each key, by name."""
        rows = [[key.position(each.sample) for key in self.keys] for each in self.scored]
        names = [each.name for each in self.scored]
        return pd.DataFrame(rows, index=names, columns=[key.name for key in self.keys])

    def table(self) -> pd.DataFrame:
        """Return a row per trial: all that is known of it, but for the values of earlier evaluations."""
        rows = [
            {"trial": trial.name, "seed": trial.seed, "status": trial.status, "step": trial.step}
            | {"seconds": trial.seconds, "error": trial.error}
            | {name: format_setting(value) for name, value in trial.sample.items()}
            | {f"dev/{metric}": value for metric, value in trial.values.items()}
            for trial in self.trials.values()
        ]
        return pd.DataFrame(rows)

    def front(self) -> list[str]:
        """Return the samples of which no other is at least as good by all metrics and better by one."""
        return front(self.means())


def scored_samples(trials: Iterable[TrialState], metric_of: Callable[[str], str]) -> list[ScoredSample]:
    """Return the samples that have a score by their metric, best first; those with all seeds before others.

    Args:
        trials: with and without a score.
        metric_of: The metric that decides about a trial, by name.
    """
    by_sample: dict[str, list[TrialState]] = {}
    for trial in trials:
        score = trial.values.get(metric_of(trial.name), math.nan)
        if trial.has_result and math.isfinite(score):
            by_sample.setdefault(trial.sample_name, []).append(trial)
    scored = [ScoredSample(name, group) for name, group in by_sample.items()]
    most = max((len(each.trials) for each in scored), default=0)

    def order(each: ScoredSample) -> tuple[Any, ...]:
        metric = metric_of(each.name)
        return len(each.trials) < most, cost(metric, each.mean(metric)), -each.step, each.name

    return sorted(scored, key=order)


def front(means: pd.DataFrame) -> list[str]:
    """Return the rows of which no other is at least as good by all columns and better by one; none with NaN."""
    costs = means.dropna().apply(lambda column: column if column.name in MINIMISED else -column).to_numpy()
    names = means.dropna().index
    beaten = [((costs <= point).all(axis=1) & (costs < point).any(axis=1)).any() for point in costs]
    return [name for name, is_beaten in zip(names, beaten, strict=True) if not is_beaten]


def is_search(folder: Path) -> bool:
    """Return whether a folder is that of a search with a space."""
    file = folder / "search.toml"
    return file.is_file() and bool(read_toml(file).get("space"))


def read_search(folder: Path) -> SearchTrials:
    """Read a search as far as it is.

    Raises:
        UserError: A file is damaged.
    """
    tables = {name: table for name, table in read_toml(folder / "search.toml").items() if name != "base"}
    config = parse_config(SearchConfig, tables, str(folder / "search.toml"))
    trials = read_trials(folder / "trials.jsonl")
    metrics = _metrics_of_results(folder / "results.json")
    has_ended = metrics is not None
    return SearchTrials(folder, config, metrics or config.metrics or _first_metric(trials), trials, has_ended)


def _metrics_of_results(file: Path) -> list[str] | None:
    """Return the metrics of a results.json; None where there is none."""
    if not file.exists():
        return None
    try:
        metrics = parse_json(file.read_text(encoding="utf-8"))["metrics"]
        if isinstance(metrics, list) and metrics and all(isinstance(metric, str) for metric in metrics):
            return metrics
        reason = f"metrics is {metrics!r}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = first_line(error)
    raise UserError(f"{file}: damaged ({reason}); remove it and run the search again")


def _first_metric(trials: Mapping[str, TrialState]) -> list[str]:
    """Return the task's first metric, by which a search without a metric goes: the first that a trial reported."""
    evaluations = (values for trial in trials.values() for _, values in trial.scores)
    last_values = (trial.values for trial in trials.values())
    return next((list(values)[:1] for each in (evaluations, last_values) for values in each if values), [])
