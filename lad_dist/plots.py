"""Plots of run folders: what `metrics.jsonl` holds, as pictures.

curves(folders, out)   metric.png, terms.png and gates.png of one or more runs
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

NOT_TERMS = {"step", "loss", "tokens_per_second", "grad_norm"}

Rows = list[dict[str, Any]]


def curves(folders: Sequence[Path], out: Path, metric: str = "accuracy") -> list[Path]:
    """Draws the runs' dev metric over steps beside their teacher's, the terms of their losses, and where there are
    gates their openness; returns the files. Raises FileNotFoundError where a folder holds no run."""
    out.mkdir(parents=True, exist_ok=True)
    runs = {folder.name: _rows(folder) for folder in folders}
    drawn = [_metric(runs, _teachers(folders, metric), metric), *map(_terms, runs, runs.values())]
    drawn += [_gates(name, rows) for name, rows in runs.items() if _gate_names(rows)]
    return [_save(figure, out / f"{name}.png") for name, figure in drawn]


def _rows(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _teachers(folders: Sequence[Path], metric: str) -> dict[str, float]:
    """By name of the teachers' folders, how good the runs measured them to be."""
    found = [json.loads(file.read_text()) for folder in folders if (file := folder / "results.json").exists()]
    taught = [results for results in found if metric in results["teacher"]]
    return {results["config"]["teacher"]["path"]: results["teacher"][metric] for results in taught}


def _metric(runs: dict[str, Rows], teachers: dict[str, float], metric: str) -> tuple[str, Figure]:
    figure, axes = _figure(f"{metric} on the dev set")
    for name, rows in runs.items():
        _line(axes, rows, f"dev/{metric}", name, marker="o")
    for path, value in teachers.items():
        axes.axhline(value, linestyle="--", color="grey", label=f"teacher {path}")
    axes.legend()
    return metric, figure


def _terms(name: str, rows: Rows) -> tuple[str, Figure]:
    figure, axes = _figure(f"{name}: terms of the loss, as weighted")
    for term in sorted({key for row in rows for key in row if "/" not in key} - NOT_TERMS):
        _line(axes, rows, term, term)
    axes.legend()
    return f"{name}-terms", figure


def _gate_names(rows: Rows) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith("gate/")})


def _gates(name: str, rows: Rows) -> tuple[str, Figure]:
    figure, axes = _figure(f"{name}: openness of the gates, 1 = the teacher's layer, 0 = those below it")
    for gate in _gate_names(rows):
        _line(axes, rows, gate, f"teacher layer {gate.removeprefix('gate/')}")
    axes.set_ylim(0, 1)
    axes.legend()
    return f"{name}-gates", figure


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes: Axes, rows: Rows, key: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    axes.plot([step for step, _ in points], [value for _, value in points], label=label, **style)


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=120)
    return file
