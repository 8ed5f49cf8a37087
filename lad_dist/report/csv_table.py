"""A comparison as rows of runs, for other programs."""

import pandas as pd

from lad_dist.report.comparison import Comparison
from lad_dist.report.grouping import differing
from lad_dist.report.results import TaskRun


def table(comparison: Comparison) -> pd.DataFrame:
    """One row per run: method, task, seed and score, sizes and pace, the settings in which runs differ, and every
    metric of student (`dev/…`) and teacher (`teacher/…`)."""
    runs = sorted((run for variant in comparison.methods.values() for run in variant.runs), key=lambda run: run.folder)
    keys = differing(runs)
    extra = pd.DataFrame([{key: run.settings.get(key) for key in keys} | _measured(run) for run in runs])
    measured = sorted(name for name in extra.columns if name not in keys)
    order = comparison.runs.columns
    place = {name: number for number, name in enumerate(comparison.methods)}
    whole = pd.concat([comparison.runs, extra.reindex(columns=[*keys, *measured])], axis=1)[[*order, *keys, *measured]]
    by = whole.sort_values(["task", "seed", "folder"])
    return by.sort_values("method", key=lambda column: column.map(place), kind="stable")


def _measured(run: TaskRun) -> dict[str, float]:
    metrics, theirs = run.results.metrics, run.results.teacher
    return {f"dev/{name}": value for name, value in metrics.items()} | {
        f"teacher/{name}": theirs[name] for name in metrics if name in theirs
    }
