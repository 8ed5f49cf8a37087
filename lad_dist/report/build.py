"""The report of many runs, as text and files."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lad_dist.report import pareto, plots
from lad_dist.report.comparison import Comparison, compare
from lad_dist.report.markdown import markdown
from lad_dist.report.results import collect
from lad_dist.report.settings import differing_keys
from lad_dist.runs.plots import save_files


def build_report(folders: Sequence[str | Path], baseline: str | None = None, out: str | Path | None = None) -> str:
    """Return the comparison of all complete task runs below the folders, in Markdown.

    Args:
        folders: with runs below them.
        baseline: the label of the method that the others are tested against; default: kd, if there is one.
        out: a folder for report.md, report.csv, report.png and, of runs that `lad-dist latency` measured,
            pareto.png.

    Raises:
        UserError: a folder does not exist, a results.json is damaged, there is no complete run or no such baseline, or
            `out` cannot be written.
    """
    comparison = compare(*collect(folders), baseline)
    text = markdown(comparison)
    if out is not None:
        table = run_table(comparison).to_csv(index=False, lineterminator="\n")
        figures = {"report.png": plots.figure(comparison), "pareto.png": pareto.figure(comparison)}
        save_files(Path(out), {"report.md": text, "report.csv": table}, figures)
    return text


def run_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row per run, best method first.

    The columns are method, task, seed and score, sizes and pace, the settings in which runs differ, and every metric of
    student (`dev/…`) and teacher (`teacher/…`).
    """
    runs = sorted((run for runs in comparison.methods.values() for run in runs), key=lambda run: run.folder)
    keys = differing_keys(runs)
    settings = pd.DataFrame([{key: run.settings.get(key) for key in keys} for run in runs])
    metrics = pd.DataFrame(
        [
            {f"dev/{name}": value for name, value in run.results.metrics.items()}
            | {f"teacher/{name}": run.results.teacher.get(name, math.nan) for name in run.results.metrics}
            for run in runs
        ]
    )
    metrics = metrics.dropna(axis="columns", how="all").sort_index(axis="columns")
    rows = pd.concat([comparison.runs, settings, metrics], axis="columns")
    rows["method"] = pd.Categorical(rows["method"], list(comparison.methods))
    return rows.sort_values(["method", "task", "seed", "folder"])
