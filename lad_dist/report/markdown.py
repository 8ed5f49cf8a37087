"""A comparison to read: scores, tests, settings, and what to know about them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd

from lad_dist.report.comparison import Comparison, PairedTest, by_seed, summary
from lad_dist.report.results import TaskRun
from lad_dist.report.settings import differences, differing_keys, format_setting
from lad_dist.utils.text import markdown_table, si_number

NONE = "-"
MAX_FOLDERS = 3  # that a note names


def markdown(comparison: Comparison) -> str:
    """Return the comparison for a person: scores, tests, loyalty, settings in which methods differ, and notes."""
    sections = [_scores, _tests, _loyalty, _settings, _notes]
    return "\n\n".join(filter(None, (section(comparison) for section in sections))) + "\n"


def _scores(comparison: Comparison) -> str:
    tasks, scores = comparison.tasks, comparison.score_summary
    counts = scores["n"].unique().tolist()
    means = _mean_columns(comparison)
    header = ["method", *(f"{task} {metric}" for task, metric in tasks.items())]
    header += [*means, *comparison.measured_costs.values()]
    rows = [_teacher_row(comparison)] if comparison.runs["teacher_score"].notna().any() else []
    for name in comparison.methods:
        cells = [_summary_cell(scores, name, task, with_count=len(counts) > 1) for task in tasks]
        mean = [_with_error(*comparison.mean(name)) if comparison.shared_tasks else NONE for _ in means]
        rows.append([name, *cells, *mean, *map(_si_cell, comparison.mean_costs(name))])
    title = f"# {_count(len(comparison.methods), 'method')} on {_count(len(tasks), 'task')}"
    table = markdown_table(header, rows, align_right=True)
    seeds = _count(counts[0], "seed") if len(counts) == 1 else "seeds, their number in brackets"
    what = f"mean ± sd over {seeds}" if comparison.has_seeds else "one seed"
    return f"{title}\n\nDev sets: {what}{_order(comparison)}.\n\n{table}"


def _mean_columns(comparison: Comparison) -> list[str]:
    """Return the title of the column of means over tasks and seeds; none where it repeats the column of the task."""
    if comparison.has_seeds:
        return ["mean ± s.e."]
    return ["mean"] if len(comparison.tasks) > 1 else []


def _order(comparison: Comparison) -> str:
    if len(comparison.methods) == 1:
        return ""
    if not comparison.shared_tasks:
        return "; by name, as no task has runs of all methods"
    if comparison.shared_tasks != list(comparison.tasks):
        return f"; best first by the mean over {', '.join(comparison.shared_tasks)}, which all methods have"
    if len(comparison.shared_tasks) > 1:
        return "; best first by the mean over all tasks"
    return "; best first by the mean over seeds" if comparison.has_seeds else "; best first"


def _teacher_row(comparison: Comparison) -> list[str]:
    shared_tasks = comparison.shared_tasks
    scores_by_task = {task: [score for _, score in comparison.teachers(task)] for task in comparison.tasks}
    cells = [_range(scores) for scores in scores_by_task.values()]
    single_scores = [scores_by_task[task][0] for task in shared_tasks if len(scores_by_task[task]) == 1]
    has_mean = bool(single_scores) and len(single_scores) == len(shared_tasks)
    mean = [f"{np.mean(single_scores):.3f}" if has_mean else NONE for _ in _mean_columns(comparison)]
    runs = comparison.runs[comparison.runs["task"].isin(shared_tasks or comparison.tasks)]
    columns = [f"teacher_{name}" for name in comparison.measured_costs if name != "seconds"]
    costs = [runs.groupby("task")[column].mean().mean() for column in columns]
    return ["teacher", *cells, *mean, *map(_si_cell, costs), ""]


def _range(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.3f}" if scores else NONE
    return f"{len(scores)} teachers, {min(scores):.3f} to {max(scores):.3f}"


def _summary_cell(summary: pd.DataFrame, method: str, task: str, with_count: bool) -> str:
    if (method, task) not in summary.index:
        return NONE
    cell = summary.loc[(method, task)]
    return _with_error(cell["mean"], cell["sd"]) + (f" ({cell['n']:.0f})" if with_count else "")


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _tests(comparison: Comparison) -> str:
    title = f"## Against {comparison.baseline}"
    others = [label for label in comparison.methods if label != comparison.baseline]
    if len(comparison.methods) == 1:
        return ""
    if len(others) == len(comparison.methods):
        return f"{title}\n\nNothing to compare: no run has this label; give that of another method by --baseline."
    columns: list[Callable[[str], PairedTest]] = [partial(comparison.test, task=task) for task in comparison.tasks]
    header = ["method", *comparison.tasks]
    if not comparison.has_seeds:
        rows = [[label, *(_difference_cell(test(label)) for test in columns)] for label in others]
        return f"{title}\n\n{markdown_table(header, rows, align_right=True)}\n\nDifferences of scores of one seed."
    if len(comparison.tasks) > 1:
        header.append("all tasks, in sd")
        columns.append(comparison.test_all)
    rows = [[label, *(_test_cell(test(label)) for test in columns)] for label in others]
    over_all_tasks = (
        "All tasks: the same over the pairs of all tasks, each difference divided by the sd over seeds of the task "
        "(pooled over all methods), so that all tasks count alike. "
    )
    text = (
        "Mean difference over pairs of runs of one task and seed, p of the two-sided paired t-test, and the number of "
        f"pairs. {over_all_tasks if len(comparison.tasks) > 1 else ''}No p for fewer than two pairs, or where all "
        "differences are equal. p are not corrected for the number of tests."
    )
    return f"{title}\n\n{markdown_table(header, rows, align_right=True)}\n\n{text}"


def _difference_cell(test: PairedTest) -> str:
    return f"{test.difference:+.3f}" if test.pairs else NONE


def _test_cell(test: PairedTest) -> str:
    if not test.pairs:
        return NONE
    p = "no p" if test.p is None else f"p {test.p:.2g}" if test.p >= 1e-4 else "p < 0.0001"
    return f"{_difference_cell(test)}, {p} ({test.pairs})"


def _loyalty(comparison: Comparison) -> str:
    loyalties = summary(by_seed(comparison.runs, "loyalty"))
    if loyalties.empty:
        return ""
    with_count = loyalties["n"].nunique() > 1
    rows = [
        [name, *(_summary_cell(loyalties, name, task, with_count) for task in comparison.tasks)]
        for name in comparison.methods
        if name in loyalties.index
    ]
    table = markdown_table(["method", *comparison.tasks], rows, align_right=True)
    text = (
        "Dev sets: the share of decisions that are the teacher's, right or wrong; of numbers their correlation with "
        "the teacher's (Pearson)."
    )
    seeds = " Mean ± sd over seeds." if comparison.has_seeds else ""
    return f"## Loyalty to the teacher\n\n{table}\n\n{text}{seeds}"


def _settings(comparison: Comparison) -> str:
    """Return by method the settings in which it differs from another run on the same task."""
    runs = [run for method_runs in comparison.methods.values() for run in method_runs]
    outer_keys = [key for key in differing_keys(runs) if not key.startswith("objective.") or key == "objective.name"]
    lines = []
    for label, method_runs in comparison.methods.items():
        objectives = {run.config.objective.name for run in method_runs}
        inner_keys = differing_keys(run for run in runs if run.config.objective.name in objectives)
        keys = sorted({*outer_keys, *inner_keys})
        settings = [f"{key} = {_setting_text(method_runs, key)}" for key in keys]
        lines += [f"* {label}: {', '.join(settings)}"] if settings else []
    return "## Settings in which they differ\n\n" + "\n".join(lines) if lines else ""


def _setting_text(runs: Sequence[TaskRun], key: str) -> str:
    """Return the value, or the values by task where they differ."""
    first_runs = {run.task: run for run in reversed(runs)}
    values = {task: format_setting(first_runs[task].settings.get(key)) for task in sorted(first_runs)}
    if len(set(values.values())) == 1:
        return values.popitem()[1]
    return "; ".join(f"{value} on {task}" for task, value in values.items())


def _notes(comparison: Comparison) -> str:
    lines = []
    for reason, names in comparison.skipped.items():
        rest = f" and {len(names) - MAX_FOLDERS} more" if len(names) > MAX_FOLDERS else ""
        lines.append(f"Left out, {reason}: {_count(len(names), 'folder')} ({', '.join(names[:MAX_FOLDERS])}{rest}).")
    for label, runs in comparison.methods.items():
        mixed = next((each for each in differences(runs) if not each[0].startswith("teacher.")), None)
        if mixed is not None:
            key, *pair = mixed
            values = " and ".join(f"{format_setting(run.settings.get(key))} in {run.folder}" for run in pair)
            lines.append(
                f"Runs of {label} on {pair[0].task} differ: {key} is {values}. If these are two methods, give each a "
                "run.label."
            )
    lines += [
        f"{run.folder} skipped {run.results.skipped_updates} of {run.results.steps} updates, as they were not finite."
        for runs in comparison.methods.values()
        for run in runs
        if run.results.skipped_updates
    ]
    for task in comparison.tasks:
        teachers = comparison.teachers(task)
        if len(teachers) > 1:
            scores = ", ".join(f"{path} {score:.3f}" for path, score in teachers)
            lines.append(f"Runs on {task} had different teachers: {scores}.")
    repeats = len(comparison.runs) - len(comparison.scores)
    if repeats:
        lines.append(
            f"{_count(repeats, 'run')} more of a method, task and seed that has one: their mean counts as one seed."
        )
    machines = sorted({f"{run.device} x {run.processes}" for run in comparison.runs.itertuples()})
    if len(machines) > 1:
        lines.append(f"Seconds are from different machines: {', '.join(machines)}.")
    conditions = sorted(comparison.runs["conditions"].dropna().unique())
    if conditions:
        difference = "" if len(conditions) == 1 else "of different conditions, "
        lines.append(
            f"Milliseconds per sequence are {difference}those of one sequence at a time in torch: "
            f"{'; '.join(conditions)}. Quantize first, then distil: pareto.png shows the teacher in the forms of the "
            "students."
        )
    return "## Notes\n\n" + "\n".join(f"* {line}" for line in lines) if lines else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _si_cell(value: float) -> str:
    return NONE if math.isnan(value) else si_number(value)
