"""Plots of run folders: what `metrics.jsonl` holds, as pictures.

curves(folders, out)         metric.png, terms.png and gates.png of one or more runs
teacher_layer_figure(rows)   a heat map of which teacher layers each student layer read in the end
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
    """Draw the curves of runs and return the files.

    The dev metric over steps beside the teacher's, the terms of the losses, and the gates where a run has them. Raises
    FileNotFoundError where a folder holds no run.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = {folder.name: _rows(folder) for folder in folders}
    figures = [_metric(runs, _teachers(folders, metric), metric), *map(_terms, runs, runs.values())]
    figures += [_gates(name, rows) for name, rows in runs.items() if _gate_names(rows)]
    return [_save(figure, out / f"{name}.png") for name, figure in figures]


def _rows(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _teachers(folders: Sequence[Path], metric: str) -> dict[str, float]:
    """Return the metric of the teachers as the runs measured it, by the teachers' folders."""
    tables = [json.loads(file.read_text()) for folder in folders if (file := folder / "results.json").exists()]
    with_teacher = [results for results in tables if metric in results["teacher"]]
    return {results["config"]["teacher"]["path"]: results["teacher"][metric] for results in with_teacher}


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
    figure, axes = _figure(f"{name}: gates, 1 = the teacher's layer, 0 = those below it")
    for gate in _gate_names(rows):
        _line(axes, rows, gate, f"teacher layer {gate.removeprefix('gate/')}")
    axes.set_ylim(0, 1)
    axes.legend()
    return f"{name}-gates", figure


def teacher_layer_figure(rows: Rows) -> Figure | None:
    """Draw the last weights `teacher_layer_weight/M/L` as a heat map; None where the objective reports none.

    Student layers M go upwards; the weights of each add up to 1.
    """
    shares = next((weights for row in reversed(rows) if (weights := _teacher_layer_weights(row))), None)
    if shares is None:
        return None
    students, teachers = (sorted({pair[side] for pair in shares}) for side in (0, 1))
    values = [[shares.get((m, layer), 0.0) for layer in teachers] for m in students]
    figure, axes = _figure("weight of each teacher layer for each student layer")
    axes.grid(visible=False)
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    axes.set(xlabel="teacher layer", ylabel="student layer")
    axes.set_xticks(range(len(teachers)), [str(layer) for layer in teachers])
    axes.set_yticks(range(len(students)), [str(m) for m in students])
    for (m, layer), share in shares.items():
        colour = "white" if share > 0.5 else "black"
        axes.text(layer - teachers[0], m - students[0], f"{share:.2f}", ha="center", va="center", color=colour)
    return figure


def _teacher_layer_weights(row: dict[str, Any]) -> dict[tuple[int, int], float]:
    layers = {key: key.split("/")[1:] for key in row if key.startswith("teacher_layer_weight/")}
    return {(int(m), int(layer)): row[key] for key, (m, layer) in layers.items()}


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
