"""Scores of methods on tasks, their order, and tests against a baseline. A method is the runs of one label."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from lad_dist.config.errors import UserError
from lad_dist.report.results import TaskRun
from lad_dist.utils.suggest import did_you_mean

DEFAULT_BASELINE = "kd"
EQUAL = 1e-12  # a difference of rounding
LOYALTY = ("label_loyalty", "teacher_pearson")  # of decisions, of numbers
SIZES = ("parameters", "forward_flops_per_token")
COST_TITLES = {
    "parameters": "parameters",
    "forward_flops_per_token": "FLOPs per token",
    "bytes": "bytes",
    "latency": "ms per sequence",
    "seconds": "seconds",
}


class PairedTest(NamedTuple):
    """A method against the baseline, over pairs of runs of one task and seed.

    Attributes:
        difference: mean over the pairs.
        pairs: number of pairs.
        p: of a two-sided paired t-test; None for fewer than two pairs or differences that are all equal.
    """

    difference: float
    pairs: int
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """Methods on tasks.

    Attributes:
        methods: runs by label, best first.
        tasks: {name: main metric}, in the order of the names.
        runs: one row per run, by folder.
        shared_tasks: the tasks that all methods have.
        baseline: the label of the method that the others are tested against; there may be no such method.
        skipped: folders by the reason for skipping them.
    """

    methods: dict[str, list[TaskRun]]
    tasks: dict[str, str]
    runs: pd.DataFrame
    shared_tasks: list[str]
    baseline: str
    skipped: Mapping[str, Sequence[str]]

    @cached_property
    def scores(self) -> pd.Series:
        """The scores by method, task and seed."""
        return by_seed(self.runs, "score")

    @cached_property
    def score_summary(self) -> pd.DataFrame:
        """The scores by `summary`."""
        return summary(self.scores)

    @property
    def has_seeds(self) -> bool:
        """Whether a method has several seeds on a task."""
        return bool((self.score_summary["n"] > 1).any())

    @cached_property
    def task_sd(self) -> pd.Series:
        """The sd over seeds by task, pooled over methods; NaN where no method has two seeds."""
        cells = self.score_summary[self.score_summary["n"] > 1]
        freedom = cells["n"] - 1
        squares = (cells["sd"] ** 2 * freedom).groupby(level="task").sum()
        return (squares / freedom.groupby(level="task").sum()) ** 0.5

    def mean(self, method: str) -> tuple[float, float]:
        """Return the mean over the shared tasks, and its standard error; NaN where a task has one seed."""
        cells = self.score_summary.loc[method].loc[self.shared_tasks]
        return cells["mean"].mean(), ((cells["sd"] ** 2 / cells["n"]).sum(skipna=False) ** 0.5) / len(cells)

    @cached_property
    def measured_costs(self) -> dict[str, str]:
        """The titles of the costs that at least one run has."""
        return {name: title for name, title in COST_TITLES.items() if self.runs[name].notna().any()}

    def mean_costs(self, method: str) -> pd.Series:
        """Return the costs of a method: means over runs, then over the shared tasks."""
        method_runs = self.runs[self.runs["method"] == method]
        by_task = method_runs.groupby("task")[list(self.measured_costs)].mean()
        return by_task.loc[self.shared_tasks or list(by_task.index)].mean()

    def teachers(self, task: str) -> list[tuple[str, float]]:
        """Return path and score of the teachers of a task's runs."""
        teachers = self.runs.loc[self.runs["task"] == task, ["teacher", "teacher_score"]].dropna().drop_duplicates()
        return sorted(teachers.itertuples(index=False, name=None))

    def differences(self, method: str, task: str) -> np.ndarray:
        """Return method minus baseline, by the seeds that both have."""
        task_scores = self.scores.xs(task, level="task")
        method_scores, baseline_scores = (task_scores.get(name) for name in (method, self.baseline))
        if method_scores is None or baseline_scores is None:
            return np.array([])
        return (method_scores - baseline_scores).dropna().to_numpy()

    def test(self, method: str, task: str) -> PairedTest:
        """Test a method against the baseline on one task."""
        return _paired_test(self.differences(method, task))

    def test_all(self, method: str) -> PairedTest:
        """Test a method over all tasks, with differences in units of each task's `task_sd`."""
        task_sd = self.task_sd[self.task_sd > EQUAL]
        scaled = [self.differences(method, task) / sd for task, sd in task_sd.items()]
        return _paired_test(np.concatenate(scaled or [[]]))


def by_seed(runs: pd.DataFrame, column: str) -> pd.Series:
    """Return a column by method, task and seed, without NaN: the mean where runs repeat a seed."""
    return runs.groupby(["method", "task", "seed"])[column].mean().dropna()


def summary(values: pd.Series) -> pd.DataFrame:
    """Return mean, sd (the sample's; NaN for one seed) and n by method and task."""
    return values.groupby(level=["method", "task"]).agg(mean="mean", sd="std", n="count")


def _paired_test(differences: np.ndarray) -> PairedTest:
    count = len(differences)
    varies = count > 1 and not np.allclose(differences, differences[0], rtol=0, atol=EQUAL)
    p = float(ttest_1samp(differences, 0).pvalue) if varies else None
    return PairedTest(float(differences.mean()) if count else math.nan, count, p)


def compare(runs: Sequence[TaskRun], skipped: Mapping[str, Sequence[str]], baseline: str | None = None) -> Comparison:
    """Return the comparison of runs.

    Raises:
        UserError: no method is the given baseline, or runs measure one task differently.
    """
    names = distinct_suffixes({run.task for run in runs})
    runs = sorted((replace(run, task=names[run.task]) for run in runs), key=lambda run: run.folder)
    methods: dict[str, list[TaskRun]] = {}
    for run in runs:
        methods.setdefault(run.config.label, []).append(run)
    if baseline is not None and baseline not in methods:
        raise UserError(f'--baseline "{baseline}" is none of the methods: {did_you_mean(baseline, methods)}')
    frame = pd.DataFrame([_row(run) for run in runs])
    tasks = _main_metrics(frame)
    means = by_seed(frame, "score").groupby(level=["method", "task"]).mean().unstack("task")
    shared_tasks = [task for task in tasks if means[task].notna().all()]
    order = means[shared_tasks].mean(axis=1)
    ordered = sorted(methods, key=lambda name: (-order[name] if shared_tasks else 0, name))
    return Comparison(
        methods={name: methods[name] for name in ordered},
        tasks=tasks,
        runs=frame,
        shared_tasks=shared_tasks,
        baseline=baseline or DEFAULT_BASELINE,
        skipped=skipped,
    )


def distinct_suffixes(paths: Iterable[str]) -> dict[str, str]:
    """Return for each path its last parts, as many as distinguish all of them."""
    components = {path: path.split("/") for path in paths}
    for count in range(1, max(map(len, components.values()), default=0)):
        suffixes = {path: "/".join(path_components[-count:]) for path, path_components in components.items()}
        if len(set(suffixes.values())) == len(components):
            return suffixes
    return {path: path for path in components}


def _main_metrics(runs: pd.DataFrame) -> dict[str, str]:
    for task, task_runs in runs.groupby("task"):
        first, other = task_runs.iloc[0], task_runs[task_runs["metric"] != task_runs["metric"].iloc[0]]
        if len(other):
            raise UserError(
                f"{other['folder'].iloc[0]}: measures {task} by {other['metric'].iloc[0]}, {first['folder']} by "
                f"{first['metric']}; report them apart"
            )
    return runs.groupby("task")["metric"].first().to_dict()


def _row(run: TaskRun) -> dict[str, Any]:
    results, student, teacher = run.results, run.forms[0], run.teacher_forms[0]
    return {
        "method": run.config.label,
        "task": run.task,
        "seed": run.config.run.seed,
        "metric": run.metric,
        "score": run.score,
        "loyalty": next((results.metrics[name] for name in LOYALTY if name in results.metrics), math.nan),
        "teacher": run.teacher,
        "teacher_score": teacher.score,
        "folder": run.folder,
        **{name: results.student.get(name, math.nan) for name in SIZES},
        **{f"teacher_{name}": results.teacher.get(name, math.nan) for name in SIZES},
        "bytes": student.bytes,
        "teacher_bytes": teacher.bytes,
        "latency": student.latency,
        "teacher_latency": teacher.latency,
        "conditions": results.latency.conditions,
        **{key: getattr(results, key) for key in ("steps", "seconds", "tokens_per_second", "processes", "device")},
    }
