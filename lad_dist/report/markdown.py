"""A comparison to read: scores, tests, settings, and what to know about them."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from lad_dist.report.comparison import Comparison, Tested
from lad_dist.report.grouping import Variant, differing, grouped, text_of
from lad_dist.report.results import TaskRun

PACE = ("device", "processes")
NONE = "-"


def markdown(comparison: Comparison) -> str:
    """The comparison for a person: scores, tests, loyalty, settings in which methods differ, and what to know about
    it."""
    sections = [_scores, _tests, _loyalty, _settings, _notes]
    return "\n\n".join(filter(None, (section(comparison) for section in sections))) + "\n"


def _scores(comparison: Comparison) -> str:
    tasks, counts = comparison.tasks, sorted({int(n) for n in comparison.cells["n"]})
    header = ["method", *(f"{task} {metric}" for task, metric in tasks.items())]
    header += ["mean ± s.e.", *comparison.shown.values()]
    rows = [_teacher_row(comparison)] if comparison.runs["teacher_score"].notna().any() else []
    for name in comparison.methods:
        cells = [_cell(comparison.cells, name, task, len(counts) > 1) for task in tasks]
        mean = _with_error(*comparison.mean(name)) if comparison.shared else NONE
        rows.append([name, *cells, mean, *map(_si, comparison.figures(name))])
    seeds = _count(counts[0], "seed") if len(counts) == 1 else "seeds, their number in brackets"
    title = f"# {_count(len(comparison.methods), 'method')} on {_count(len(tasks), 'task')}"
    return f"{title}\n\nDev sets: mean ± sd over {seeds}; {_order(comparison)}.\n\n{_grid(header, rows)}"


def _order(comparison: Comparison) -> str:
    if not comparison.shared:
        return "by name, as no task has runs of all methods"
    best = "best first by the mean over "
    if comparison.shared == list(comparison.tasks):
        return best + ("all tasks" if len(comparison.shared) > 1 else "seeds")
    return f"{best}{', '.join(comparison.shared)}, which all methods have"


def _teacher_row(comparison: Comparison) -> list[str]:
    taught = {task: list(comparison.teachers(task).values()) for task in comparison.tasks}
    cells = [_between(scores) for scores in taught.values()]
    single = [taught[task][0] for task in comparison.shared if len(taught[task]) == 1]
    whole = bool(single) and len(single) == len(comparison.shared)
    runs = comparison.runs[comparison.runs["task"].isin(comparison.shared or comparison.tasks)]
    sizes = [runs.groupby("task")[f"teacher_{name}"].mean().mean() for name in comparison.shown if name != "seconds"]
    return ["teacher", *cells, f"{np.mean(single):.3f}" if whole else NONE, *map(_si, sizes), ""]


def _between(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.3f}" if scores else NONE
    return f"{len(scores)} teachers, {min(scores):.3f} to {max(scores):.3f}"


def _cell(cells: pd.DataFrame, method: str, task: str, counted: bool) -> str:
    if (method, task) not in cells.index:
        return NONE
    cell = cells.loc[(method, task)]
    return _with_error(cell["mean"], cell["sd"]) + (f" ({cell['n']:.0f})" if counted else "")


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _tests(comparison: Comparison) -> str:
    title = f"## Against {comparison.baseline}"
    if not comparison.baselines:
        return f"{title}\n\nNothing to test: {_why_no_test(comparison)}."
    several = len(set(comparison.baselines.values())) > 1
    header = ["method", *(["baseline"] if several else []), *comparison.tasks, "all tasks, in sd"]
    rows = []
    for name in filter(comparison.baselines.get, comparison.methods):
        tests = [comparison.test(name, task) for task in comparison.tasks] + [comparison.test_all(name)]
        rows.append([name, *([comparison.baselines[name]] if several else []), *map(_tested, tests)])
    text = (
        "Mean difference over pairs of runs of one task and seed, p of the two-sided paired t-test, and the number of "
        "pairs. All tasks: the same over the pairs of all tasks, each difference divided by its task's sd over seeds "
        "(pooled over all methods), so that every task counts in its own scale. No p for fewer than two pairs, or "
        "where all differences are equal. p are not corrected for the number of tests."
    )
    alone = [name for name in comparison.methods if name not in {*comparison.baselines, *comparison.candidates}]
    rest = f"\n\nWithout a {comparison.baseline} of the same settings: {', '.join(alone)}." if alone else ""
    return f"{title}\n\n{_grid(header, rows)}\n\n{text}{rest}"


def _why_no_test(comparison: Comparison) -> str:
    count = len(comparison.candidates)
    if not count:
        return "no such run; name another method by --baseline"
    if count == len(comparison.methods):
        return "there is no other method" if count == 1 else "there are only its variants; name one by --baseline"
    return f"of its {count} variants none alone has another method's settings or name; name one by --baseline"


def _tested(test: Tested) -> str:
    if not test.pairs:
        return NONE
    p = "no p" if test.p is None else f"p {test.p:.2g}" if test.p >= 1e-4 else "p < 0.0001"
    return f"{test.difference:+.3f}, {p} ({test.pairs})"


def _loyalty(comparison: Comparison) -> str:
    cells = comparison.loyal
    if cells.empty:
        return ""
    counted = cells["n"].nunique() > 1
    rows = [
        [name, *(_cell(cells, name, task, counted) for task in comparison.tasks)]
        for name in comparison.methods
        if name in cells.index.get_level_values("method")
    ]
    text = (
        "Dev sets: the share of decisions that are the teacher's, right or wrong; of numbers their correlation with "
        "the teacher's (Pearson). Mean ± sd over seeds."
    )
    return f"## Loyalty to the teacher\n\n{_grid(['method', *comparison.tasks], rows)}\n\n{text}"


def _settings(comparison: Comparison) -> str:
    """By method the settings in which it differs from another run on the same task."""
    runs = [run for variant in comparison.methods.values() for run in variant.runs]
    outer = [key for key in differing(runs) if not key.startswith("objective.")]
    lines = []
    for name, variant in comparison.methods.items():
        keys = sorted({*outer, *differing(_of(runs, variant.objective))})
        said = [f"{key} = {_values(variant, key)}" for key in keys]
        lines += [f"* {name}: {', '.join(said)}"] if said else []
    return "## Settings in which they differ\n\n" + "\n".join(lines) if lines else ""


def _of(runs: Iterable[TaskRun], objective: str) -> list[TaskRun]:
    return [run for run in runs if run.objective == objective]


def _values(variant: Variant, key: str) -> str:
    """The value, or by task where it differs."""
    by_task = {task: runs[0].settings.get(key) for task, runs in sorted(grouped(variant.runs, _task).items())}
    if len(set(by_task.values())) == 1:
        return text_of(next(iter(by_task.values())))
    return "; ".join(f"{text_of(value)} on {task}" for task, value in by_task.items())


def _task(run: TaskRun) -> str:
    return run.task


def _notes(comparison: Comparison) -> str:
    lines = [f"Left out, {reason}: {_some(names)}." for reason, names in comparison.left_out.items()]
    for task in comparison.tasks:
        teachers = comparison.teachers(task)
        if len(teachers) > 1:
            said = ", ".join(f"{path} {score:.3f}" for path, score in teachers.items())
            lines.append(f"Runs on {task} had different teachers: {said}.")
    repeats = len(comparison.runs) - len(comparison.scores)
    if repeats:
        lines.append(
            f"{_count(repeats, 'run')} more of a method, task and seed already there: their mean counts as one seed."
        )
    places = sorted({f"{device} x {n}" for device, n in zip(*map(comparison.runs.get, PACE), strict=True)})
    if len(places) > 1:
        lines.append(f"Seconds are from different machines: {', '.join(places)}.")
    conditions = sorted(comparison.runs["conditions"].dropna().unique())
    if conditions:
        alike = "" if len(conditions) == 1 else "of different conditions, "
        lines.append(f"Milliseconds per sequence are {alike}those of one sequence at a time: {'; '.join(conditions)}.")
    return "## Notes\n\n" + "\n".join(f"* {line}" for line in lines) if lines else ""


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{_count(len(names), 'folder')} ({', '.join(names[:most])}{rest})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _si(value: float) -> str:
    """Three digits: 14.2 M."""
    if math.isnan(value):
        return NONE
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
