"""A comparison as rows of runs, for other programs."""

import pandas as pd

from lad_dist.report.comparison import Comparison
from lad_dist.report.results import TaskRun
from lad_dist.report.settings import differing_keys


def run_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row per run, best method first.

    The columns are method, task, seed and score, sizes and pace, the settings in which runs differ, and every metric of
    student (`dev/…`) and teacher (`teacher/…`).
    """
    runs = sorted((run for runs in comparison.methods.values() for run in runs), key=lambda run: run.folder)
    keys = differing_keys(runs)
    extra = pd.DataFrame([{key: run.settings.get(key) for key in keys} | _metrics(run) for run in runs])
    metrics = sorted(name for name in extra.columns if name not in keys)
    columns = [*comparison.runs.columns, *keys, *metrics]
    rows = pd.concat([comparison.runs, extra.reindex(columns=[*keys, *metrics])], axis=1)[columns]
    ranks = {name: rank for rank, name in enumerate(comparison.methods)}
    rows = rows.sort_values(["task", "seed", "folder"])
    return rows.sort_values("method", key=lambda column: column.map(ranks), kind="stable")


def _metrics(run: TaskRun) -> dict[str, float]:
    student, teacher = run.results.metrics, run.results.teacher
    return {f"dev/{name}": value for name, value in student.items()} | {
        f"teacher/{name}": teacher[name] for name in student if name in teacher
    }
