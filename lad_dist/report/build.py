"""The report of many runs, as text and files."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lad_dist.config.errors import UserError
from lad_dist.report import pareto, plots, search_importance, search_markdown, search_plots
from lad_dist.report.comparison import Comparison, compare, distinct_suffixes
from lad_dist.report.markdown import markdown
from lad_dist.report.results import collect
from lad_dist.report.search_trials import SearchTrials, is_search, read_search
from lad_dist.report.settings import differing_keys
from lad_dist.runs.plots import save_files


def build_report(folders: Sequence[str | Path], baseline: str | None = None, out: str | Path | None = None) -> str:
    """Return the comparison of all complete task runs below the folders, and each search with a space, in Markdown.

    Args:
        folders: with runs below them, or of searches.
        baseline: the label of the method that the others are tested against; default: kd, if there is one.
        out: a folder for report.md and, of the runs, report.csv, report.png and, where `lad-dist latency` measured
            them, pareto.png; of a search trials.csv, history.png, parallel.png, importance.png and, of several metrics,
            front.png, in a folder of its name where there are several searches.

    Raises:
        UserError: a folder does not exist, a file is damaged, there is no complete run or no such baseline, or `out`
            cannot be written.
    """
    search_folders = {Path(folder).resolve(): Path(folder) for folder in folders if is_search(Path(folder))}
    run_folders = [folder for folder in folders if Path(folder).resolve() not in search_folders]
    if baseline is not None and not run_folders:
        raise UserError(f"--baseline {baseline}: a search is compared by scores, not with a baseline; leave it out")
    names = distinct_suffixes(map(str, search_folders))
    searches = {names[str(path)]: read_search(folder) for path, folder in sorted(search_folders.items())}
    sections = [search_markdown.markdown(search) for search in searches.values()]
    comparison = compare(*collect(run_folders), baseline) if run_folders else None
    if comparison is not None:
        sections.append(markdown(comparison))
    text = "\n".join(sections)
    if out is not None:
        save_files(Path(out), {"report.md": text}, {})
        for name, search in searches.items():
            _save_search(search, Path(out) / name.strip("/").replace("/", "-") if len(searches) > 1 else Path(out))
        if comparison is not None:
            _save_comparison(comparison, Path(out))
    return text


def _save_comparison(comparison: Comparison, out: Path) -> None:
    table = run_table(comparison).to_csv(index=False, lineterminator="\n")
    save_files(
        out, {"report.csv": table}, {"report.png": plots.figure(comparison), "pareto.png": pareto.figure(comparison)}
    )


def _save_search(search: SearchTrials, out: Path) -> None:
    figures = {
        "history.png": search_plots.history(search),
        "parallel.png": search_plots.parallel(search),
        "importance.png": search_importance.figure(search),
        "front.png": search_plots.fronts(search),
    }
    save_files(out, {"trials.csv": search.table().to_csv(index=False, lineterminator="\n")}, figures)


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
