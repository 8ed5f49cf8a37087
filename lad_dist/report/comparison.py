"""Scores of methods on tasks, their order, and tests against a baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from lad_dist.config.errors import UserError
from lad_dist.report.grouping import Variant, distinct_suffixes, generic_settings, grouped, variants, words_of
from lad_dist.report.results import LoadedRuns, TaskRun
from lad_dist.utils.suggest import did_you_mean

BASELINE = "kd"
EQUAL = 1e-12  # a difference of rounding
SIZES = ("parameters", "forward_flops_per_token")
FIGURES = {
    "parameters": "parameters",
    "forward_flops_per_token": "FLOPs per token",
    "bytes": "bytes",
    "latency": "ms per sequence",
    "seconds": "seconds",
}


class Tested(NamedTuple):
    """Against the baseline: the mean difference over `pairs` of runs of one task and seed; p is that of a two-sided
    paired t-test, None for fewer than two pairs or differences that are all equal."""

    difference: float
    pairs: int
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """`methods` are best first, `tasks` are in the order of their names, {name: main metric}. `scores` and `loyalties`
    have an index of method, task and seed."""

    methods: dict[str, Variant]
    tasks: dict[str, str]
    runs: pd.DataFrame  # one row per run, by folder
    scores: pd.Series
    loyalties: pd.Series  # of runs with a teacher
    shared: list[str]  # the tasks that all methods have
    baselines: dict[str, str]  # by method
    candidates: list[str]  # methods that may be one
    baseline: str
    left_out: Mapping[str, Sequence[str]]

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Of scores: see `summary`."""
        return summary(self.scores)

    @cached_property
    def loyal(self) -> pd.DataFrame:
        """Of loyalties: see `summary`."""
        return summary(self.loyalties)

    @cached_property
    def scale(self) -> pd.Series:
        """By task the sd over seeds, pooled over methods: NaN where no method has two."""
        cells = self.cells[self.cells["n"] > 1]
        freedom = cells["n"] - 1
        squares = (cells["sd"] ** 2 * freedom).groupby(level="task").sum()
        return (squares / freedom.groupby(level="task").sum()) ** 0.5

    def mean(self, method: str) -> tuple[float, float]:
        """Over the shared tasks, and its standard error: NaN where a task has one seed."""
        cells = self.cells.loc[method].loc[self.shared]
        return cells["mean"].mean(), ((cells["sd"] ** 2 / cells["n"]).sum(skipna=False) ** 0.5) / len(cells)

    @cached_property
    def shown(self) -> dict[str, str]:
        """Of the figures, those that runs have."""
        return {name: title for name, title in FIGURES.items() if self.runs[name].notna().any()}

    def figures(self, method: str) -> pd.Series:
        """Sizes and seconds: means over runs, then over the shared tasks."""
        mine = self.runs[self.runs["method"] == method]
        by_task = mine.groupby("task")[list(self.shown)].mean()
        return by_task.loc[self.shared or list(by_task.index)].mean()

    def teachers(self, task: str) -> dict[str, float]:
        """The teachers of a task's runs and what they score, by path; `path (n)` for one that was measured
        differently."""
        column = self.runs[(self.runs["task"] == task) & self.runs["teacher_score"].notna()]
        pairs = column[["teacher", "teacher_score"]].drop_duplicates().sort_values(["teacher", "teacher_score"])
        number = pairs.groupby("teacher").cumcount()
        names = [path if not n else f"{path} ({n + 1})" for path, n in zip(pairs["teacher"], number, strict=True)]
        return dict(zip(names, pairs["teacher_score"], strict=True))

    def differences(self, method: str, task: str) -> np.ndarray:
        """Method minus its baseline, by the seeds that both have."""
        ours, theirs = (self.scores.xs(task, level="task").get(name) for name in (method, self.baselines[method]))
        if ours is None or theirs is None:
            return np.array([])
        return (ours - theirs).dropna().to_numpy()

    def test(self, method: str, task: str) -> Tested:
        return _test(self.differences(method, task))

    def test_all(self, method: str) -> Tested:
        """Over all tasks, differences in units of their task's `scale`."""
        scale = self.scale[self.scale > EQUAL]
        return _test(np.concatenate([self.differences(method, task) / sd for task, sd in scale.items()] or [[]]))


def summary(values: pd.Series) -> pd.DataFrame:
    """mean, sd (sample's; NaN for one seed) and n by method and task."""
    groups = values.groupby(level=["method", "task"])
    return pd.DataFrame({"mean": groups.mean(), "sd": groups.std(ddof=1), "n": groups.count()})


def _test(differences: np.ndarray) -> Tested:
    count = len(differences)
    varies = count > 1 and not np.allclose(differences, differences[0], rtol=0, atol=EQUAL)
    p = float(ttest_1samp(differences, 0).pvalue) if varies else None
    return Tested(float(differences.mean()) if count else math.nan, count, p)


def compare(found: LoadedRuns, baseline: str | None = None) -> Comparison:
    """Raises UserError for a baseline that no method is called, and for runs that measure one task differently."""
    names = distinct_suffixes({run.task for run in found.runs})
    runs = generic_settings([replace(run, task=names[run.task]) for run in found.runs])
    tasks = _main_metrics(runs)
    methods = variants(runs)
    rows = [_row(name, run, tasks[run.task]) for name, variant in methods.items() for run in variant.runs]
    frame = pd.DataFrame(rows).sort_values("folder", ignore_index=True)
    by_seed = frame.groupby(["method", "task", "seed"])
    scores = by_seed["score"].mean()
    shared = [task for task in tasks if all(task in _tasks(variant) for variant in methods.values())]
    means = scores.groupby(level=["method", "task"]).mean().unstack("task")[shared].mean(axis=1)
    ordered = sorted(methods, key=lambda name: (-means[name] if shared else 0, name))
    wanted = baseline or BASELINE
    candidates = _candidates(methods, wanted, required=baseline is not None)
    return Comparison(
        {name: methods[name] for name in ordered},
        tasks,
        frame,
        scores,
        by_seed["loyalty"].mean().dropna(),
        shared,
        _baselines(methods, candidates, wanted),
        candidates,
        wanted,
        found.left_out,
    )


def _tasks(variant: Variant) -> set[str]:
    return {run.task for run in variant.runs}


def _main_metrics(runs: Sequence[TaskRun]) -> dict[str, str]:
    columns = grouped(runs, lambda run: run.task)
    for column in columns.values():
        for run in column:
            if run.metric != column[0].metric:
                raise UserError(
                    f"{run.folder}: measures {run.task} by {run.metric}, {column[0].folder} by {column[0].metric}; "
                    "report them apart"
                )
    return {task: columns[task][0].metric for task in sorted(columns)}


def _row(method: str, run: TaskRun, metric: str) -> dict[str, Any]:
    results = run.results
    return {
        "method": method,
        "objective": run.objective,
        "task": run.task,
        "seed": run.seed,
        "metric": metric,
        "score": run.score,
        "loyalty": run.loyalty,
        "teacher": run.teacher,
        "teacher_score": results.teacher.get(metric, math.nan),
        "folder": run.folder,
        **{name: getattr(results.student, name) for name in SIZES},
        **{f"teacher_{name}": results.teacher.get(name, math.nan) for name in SIZES},
        "bytes": run.forms[0].bytes,
        "teacher_bytes": run.teacher_form.bytes,
        "latency": run.forms[0].latency,
        "teacher_latency": run.teacher_form.latency,
        "conditions": results.ledger.conditions if results.ledger else None,
        **{key: getattr(results, key) for key in ("steps", "seconds", "tokens_per_second", "processes", "device")},
    }


def _candidates(methods: Mapping[str, Variant], wanted: str, required: bool) -> list[str]:
    """What may be a baseline: the method of this name, those of this objective, or those whose runs are called so."""
    if wanted in methods:
        return [wanted]
    by_objective = [name for name, variant in methods.items() if variant.objective == wanted]
    candidates = by_objective or [name for name in methods if _parts(wanted) <= _called(methods[name])]
    if required and not candidates:
        known = {*methods, *(word for variant in methods.values() for word in (variant.objective, *_called(variant)))}
        raise UserError(f'--baseline "{wanted}" is none of the methods: {did_you_mean(wanted, known)}')
    return candidates


def _baselines(methods: Mapping[str, Variant], candidates: Sequence[str], wanted: str) -> dict[str, str]:
    """Of each other method the baseline: the only candidate, or the only one with the same settings outside
    [objective], or the only one whose runs are called the same but for `wanted`."""
    found = {}
    for name in methods.keys() - candidates:
        called = _called(methods[name]) | _parts(wanted)
        fitting = [other for other in candidates if len(candidates) == 1 or _alike(methods[name], methods[other])]
        if len(fitting) != 1:
            fitting = [other for other in fitting or candidates if _called(methods[other]) <= called]
        if len(fitting) == 1:
            found[name] = fitting[0]
    return found


def _called(variant: Variant) -> set[str]:
    """The words that the names of all its runs have."""
    return set.intersection(*(set(words_of(run)) for run in variant.runs))


def _parts(name: str) -> set[str]:
    return set(name.split("-"))


def _alike(variant: Variant, baseline: Variant) -> bool:
    """Whether all runs have what tells the baseline from its other variants, but for the objective's own keys."""
    outer = [(key, value) for key, value in baseline.telling if not key.startswith("objective.")]
    return all(run.settings.get(key) == value for run in variant.runs for key, value in outer)
