"""What quality costs: scores against measured latency and against bytes, as a plot."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lad_dist.report.comparison import Comparison

COSTS = {"latency": "ms per sequence, at the teacher's mean speed", "bytes": "bytes"}
UNMEASURED = "not measured: launch/ledger.py RUN"
MARKERS = {"student": "o", "onnx": "s", "onnx int8": "v", "teacher": "*"}


def points(comparison: Comparison) -> pd.DataFrame:
    """Means over the runs of a method on a task, in each form that was measured: method, task, form, score, latency in
    ms, bytes. The teacher is a method too. A machine is not equally fast at all times: a latency is that of its ledger
    times what the teacher takes in the mean, over what it took in the same ledger."""
    rows = [
        {"method": method, "task": run.task, **form._asdict(), "beside": run.teacher_form.latency}
        for name, variant in comparison.methods.items()
        for run in variant.runs
        for method, form in [*((name, form) for form in run.forms), ("teacher", run.teacher_form)]
    ]
    frame = pd.DataFrame(rows).rename(columns={"name": "form"})
    usual = frame[frame["form"] == "teacher"].groupby("task")["beside"].mean()
    frame["latency"] *= (frame["task"].map(usual) / frame["beside"]).fillna(1)
    kept = frame[frame["score"].notna() & frame[list(COSTS)].notna().any(axis=1)]
    return kept.groupby(["method", "task", "form"], as_index=False, sort=False)[["score", *COSTS]].mean()


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Numbers of the points that no other beats in both, cheapest first; of equals the first."""
    best, kept = -math.inf, []
    for number in sorted(range(len(costs)), key=lambda n: (costs[n], -scores[n])):
        if scores[number] > best:
            best = scores[number]
            kept.append(number)
    return kept


def figure(comparison: Comparison) -> Figure | None:
    """A line of panels per task, one for each cost; a colour per method, a marker per form, and by name the front of
    those that no other beats. None where nothing was measured."""
    found = points(comparison)
    if not found["latency"].notna().any():
        return None
    tasks = list(comparison.tasks)
    drawn = Figure(figsize=(5.2 * len(COSTS), 0.5 + 3.4 * len(tasks)), layout="constrained")
    panels = drawn.subplots(len(tasks), len(COSTS), squeeze=False)
    colours = dict(zip(comparison.methods, _colours(len(comparison.methods)), strict=True)) | {"teacher": "grey"}
    for line, task in zip(panels, tasks, strict=True):
        for axes, (cost, title) in zip(line, COSTS.items(), strict=True):
            axes.set(xlabel=title, ylabel=comparison.tasks[task])
            axes.set_title(task, fontsize="medium", parse_math=False)
            mine = found[(found["task"] == task) & found[cost].notna()]
            if len(mine):
                _panel(axes, mine, cost, colours)
            else:
                axes.text(0.5, 0.5, UNMEASURED, transform=axes.transAxes, ha="center")
    _legend(drawn, panels.flat)
    return drawn


def _colours(count: int) -> list[Any]:
    """The usual ten, or as many of a scale."""
    return [f"C{n}" for n in range(count)] if count <= 10 else list(colormaps["turbo"](np.linspace(0, 1, count)))


def _panel(axes: Axes, found: pd.DataFrame, cost: str, colours: dict[str, str]) -> None:
    for row in found.to_dict("records"):
        marker, colour = MARKERS[row["form"]], colours[row["method"]]
        axes.plot(
            [row[cost]], [row["score"]], linestyle="", marker=marker, markersize=7, color=colour, label=_label(row)
        )
    best = found.iloc[front(found[cost].tolist(), found["score"].tolist())]
    axes.plot(best[cost], best["score"], drawstyle="steps-post", color="black", linewidth=0.8, zorder=0)
    for row in best.to_dict("records"):
        place = (row[cost], row["score"])
        axes.annotate(_label(row), place, xytext=(4, -9), textcoords="offset points", fontsize="x-small")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def _label(row: Mapping[Hashable, Any]) -> str:
    return row["method"] if row["form"] in ("student", "teacher") else f"{row['method']}, {row['form']}"


def _legend(drawn: Figure, panels: Iterable[Axes]) -> None:
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        if not label.startswith("_")
    }
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
