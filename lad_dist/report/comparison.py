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
from lad_dist.report.grouping import Variant, distinct_suffixes, generic_settings, group_runs, name_words, variants
from lad_dist.report.results import LoadedRuns, TaskRun
from lad_dist.utils.suggest import did_you_mean

DEFAULT_BASELINE = "kd"
EQUAL = 1e-12  # a difference of rounding
SIZES = ("parameters", "forward_flops_per_token")
COST_TITLES = {
    "parameters": "parameters",
    "forward_flops_per_token": "FLOPs per token",
    "bytes": "bytes",
    "latency": "ms per sequence",
    "seconds": "seconds",
}


class PairedTest(NamedTuple):
    """A method against its baseline, over pairs of runs of one task and seed.

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
    """Methods on tasks, and the baseline of each method.

    Attributes:
        methods: by name, best first.
        tasks: {name: main metric}, in the order of the names.
        runs: one row per run, by folder.
        scores: by method, task and seed.
        loyalties: of runs with a teacher, by method, task and seed.
        shared_tasks: the tasks that all methods have.
        baselines: by method.
        candidates: methods that may be a baseline.
        baseline: the name by which the candidates were looked up.
        skipped: folders by the reason for skipping them.
    """

    methods: dict[str, Variant]
    tasks: dict[str, str]
    runs: pd.DataFrame
    scores: pd.Series
    loyalties: pd.Series
    shared_tasks: list[str]
    baselines: dict[str, str]
    candidates: list[str]
    baseline: str
    skipped: Mapping[str, Sequence[str]]

    @cached_property
    def score_summary(self) -> pd.DataFrame:
        """The scores by `summary`."""
        return summary(self.scores)

    @cached_property
    def loyalty_summary(self) -> pd.DataFrame:
        """The loyalties by `summary`."""
        return summary(self.loyalties)

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

    def teachers(self, task: str) -> dict[str, float]:
        """Return the scores of the teachers of a task's runs, by path.

        A teacher with a second score has the name `path (2)` for it.
        """
        task_runs = self.runs[(self.runs["task"] == task) & self.runs["teacher_score"].notna()]
        pairs = task_runs[["teacher", "teacher_score"]].drop_duplicates().sort_values(["teacher", "teacher_score"])
        numbers = pairs.groupby("teacher").cumcount()
        names = [path if not n else f"{path} ({n + 1})" for path, n in zip(pairs["teacher"], numbers, strict=True)]
        return dict(zip(names, pairs["teacher_score"], strict=True))

    def differences(self, method: str, task: str) -> np.ndarray:
        """Return method minus baseline, by the seeds that both have."""
        task_scores = self.scores.xs(task, level="task")
        method_scores, baseline_scores = (task_scores.get(name) for name in (method, self.baselines[method]))
        if method_scores is None or baseline_scores is None:
            return np.array([])
        return (method_scores - baseline_scores).dropna().to_numpy()

    def test(self, method: str, task: str) -> PairedTest:
        """Test a method against its baseline on one task."""
        return _paired_test(self.differences(method, task))

    def test_all(self, method: str) -> PairedTest:
        """Test a method over all tasks, with differences in units of each task's `task_sd`."""
        task_sd = self.task_sd[self.task_sd > EQUAL]
        scaled = [self.differences(method, task) / sd for task, sd in task_sd.items()]
        return _paired_test(np.concatenate(scaled or [[]]))


def summary(values: pd.Series) -> pd.DataFrame:
    """Return mean, sd (the sample's; NaN for one seed) and n by method and task."""
    groups = values.groupby(level=["method", "task"])
    return pd.DataFrame({"mean": groups.mean(), "sd": groups.std(ddof=1), "n": groups.count()})


def _paired_test(differences: np.ndarray) -> PairedTest:
    count = len(differences)
    varies = count > 1 and not np.allclose(differences, differences[0], rtol=0, atol=EQUAL)
    p = float(ttest_1samp(differences, 0).pvalue) if varies else None
    return PairedTest(float(differences.mean()) if count else math.nan, count, p)


def compare(loaded: LoadedRuns, baseline: str | None = None) -> Comparison:
    """Return the comparison of the loaded runs.

    Raises:
        UserError: no method has the baseline's name, or runs measure one task differently.
    """
    names = distinct_suffixes({run.task for run in loaded.runs})
    runs = generic_settings([replace(run, task=names[run.task]) for run in loaded.runs])
    tasks = _main_metrics(runs)
    methods = variants(runs)
    rows = [_row(name, run, tasks[run.task]) for name, variant in methods.items() for run in variant.runs]
    frame = pd.DataFrame(rows).sort_values("folder", ignore_index=True)
    by_seed = frame.groupby(["method", "task", "seed"])
    scores = by_seed["score"].mean()
    shared_tasks = [task for task in tasks if all(task in _tasks(variant) for variant in methods.values())]
    means = scores.groupby(level=["method", "task"]).mean().unstack("task")[shared_tasks].mean(axis=1)
    ordered = sorted(methods, key=lambda name: (-means[name] if shared_tasks else 0, name))
    baseline_name = baseline or DEFAULT_BASELINE
    candidates = _candidates(methods, baseline_name, required=baseline is not None)
    return Comparison(
        methods={name: methods[name] for name in ordered},
        tasks=tasks,
        runs=frame,
        scores=scores,
        loyalties=by_seed["loyalty"].mean().dropna(),
        shared_tasks=shared_tasks,
        baselines=_baselines(methods, candidates, baseline_name),
        candidates=candidates,
        baseline=baseline_name,
        skipped=loaded.skipped,
    )


def _tasks(variant: Variant) -> set[str]:
    return {run.task for run in variant.runs}


def _main_metrics(runs: Sequence[TaskRun]) -> dict[str, str]:
    by_task = group_runs(runs, lambda run: run.task)
    for task_runs in by_task.values():
        first = task_runs[0]
        for run in task_runs:
            if run.metric != first.metric:
                raise UserError(
                    f"{run.folder}: measures {run.task} by {run.metric}, {first.folder} by {first.metric}; "
                    "report them apart"
                )
    return {task: by_task[task][0].metric for task in sorted(by_task)}


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
        "conditions": results.latency.conditions if results.latency else None,
        **{key: getattr(results, key) for key in ("steps", "seconds", "tokens_per_second", "processes", "device")},
    }


def _candidates(methods: Mapping[str, Variant], baseline: str, required: bool) -> list[str]:
    """Return the method of this name, or those of this objective, or those with its words in the names of all runs."""
    if baseline in methods:
        return [baseline]
    by_objective = [name for name, variant in methods.items() if variant.objective == baseline]
    candidates = by_objective or [name for name in methods if _words(baseline) <= _common_words(methods[name])]
    if required and not candidates:
        known = {
            *methods,
            *(word for variant in methods.values() for word in (variant.objective, *_common_words(variant))),
        }
        raise UserError(f'--baseline "{baseline}" is none of the methods: {did_you_mean(baseline, known)}')
    return candidates


def _baselines(methods: Mapping[str, Variant], candidates: Sequence[str], baseline: str) -> dict[str, str]:
    """Return the baseline of each other method.

    It is the only candidate, or the only one with the same settings outside [objective], or the only one whose runs
    have the same names but for the word `baseline`.
    """
    baselines = {}
    for name in methods.keys() - candidates:
        words = _common_words(methods[name]) | _words(baseline)
        matching = [c for c in candidates if len(candidates) == 1 or _has_settings_of(methods[name], methods[c])]
        if len(matching) != 1:
            matching = [c for c in matching or candidates if _common_words(methods[c]) <= words]
        if len(matching) == 1:
            baselines[name] = matching[0]
    return baselines


def _common_words(variant: Variant) -> set[str]:
    """Return the words that the names of all runs share."""
    return set.intersection(*(set(name_words(run)) for run in variant.runs))


def _words(name: str) -> set[str]:
    return set(name.split("-"))


def _has_settings_of(variant: Variant, baseline: Variant) -> bool:
    """Tell whether all runs have what distinguishes the baseline's variant, but for the objective's own keys."""
    outer = [(key, value) for key, value in baseline.distinction if not key.startswith("objective.")]
    return all(run.settings.get(key) == value for run in variant.runs for key, value in outer)
