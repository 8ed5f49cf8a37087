"""What quality costs: scores against measured latency and against bytes, as a plot."""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lad_dist.compression.footprint import FP16, INT8, ONNX
from lad_dist.report.comparison import Comparison
from lad_dist.runs.latency_table import TEACHER, TORCH
from lad_dist.runs.plots import draw_legend, move_labels_inside, set_ticks
from lad_dist.utils.text import byte_size, plain_number

COSTS = {"latency": "time of one sequence, at the teacher's mean speed", "bytes": "size on disk"}
TEXTS: dict[str, Callable[[float], str]] = {
    "latency": lambda milliseconds: f"{plain_number(milliseconds, digits=3)} ms",
    "bytes": byte_size,
}
LABEL_STYLE: dict[str, Any] = {
    "fontsize": "x-small",
    "parse_math": False,
    "bbox": {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
}
UNMEASURED = "not measured: lad-dist latency RUN"
MARKERS = {TORCH: "o", ONNX: "s", FP16: "d", INT8: "v"}


def points(comparison: Comparison) -> pd.DataFrame:
    """Return means over the runs of a method on a task, in each form that was measured; the teacher is a method too.

    A student in int8 stands beside the teacher in int8: quantizing alone makes the teacher cheaper.

    The columns are method, task, form, score, latency in ms, and bytes. A machine is not equally fast at all times: a
    latency is the measured one times the teacher's mean latency in torch, over that in the same measurement.
    """
    rows = [
        {"method": method, "task": run.task, **form._asdict(), "teacher_latency": run.teacher_forms[0].latency}
        for name, runs in comparison.methods.items()
        for run in runs
        for method, forms in ((name, run.forms), (TEACHER, run.teacher_forms))
        for form in forms
    ]
    frame = pd.DataFrame(rows).rename(columns={"name": "form"})
    mean_latency = frame[frame["method"] == TEACHER].groupby("task")["teacher_latency"].mean()
    frame["latency"] *= (frame["task"].map(mean_latency) / frame["teacher_latency"]).fillna(1)
    measured = frame[frame["score"].notna() & frame[list(COSTS)].notna().any(axis=1)]
    return measured.groupby(["method", "task", "form"], as_index=False, sort=False)[["score", *COSTS]].mean()


def front(panel_points: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Return the points that no other beats in both cost and score, cheapest first."""
    cheapest_first = panel_points.sort_values([cost, "score"], ascending=[True, False])
    best_before = cheapest_first["score"].cummax().shift().fillna(-math.inf)
    return cheapest_first[cheapest_first["score"] > best_before]


def figure(comparison: Comparison) -> Figure | None:
    """Draw a row of panels per task, one panel for each cost; return None where nothing was measured.

    A method has a colour, a form a marker. The points of the front, which no other point beats, have names.
    """
    all_points = points(comparison)
    if not all_points["latency"].notna().any():
        return None
    tasks = list(comparison.tasks)
    plot = Figure(figsize=(5.2 * len(COSTS), 0.5 + 3.4 * len(tasks)), layout="constrained")
    panels = plot.subplots(len(tasks), len(COSTS), squeeze=False)
    palette = colormaps["turbo"](np.linspace(0, 1, len(comparison.methods)))
    colours = dict(zip(comparison.methods, palette, strict=True)) | {TEACHER: "grey"}
    for row, task in zip(panels, tasks, strict=True):
        for axes, (cost, title) in zip(row, COSTS.items(), strict=True):
            axes.set(xlabel=title, ylabel=comparison.tasks[task])
            axes.set_title(task, fontsize="medium", parse_math=False)
            panel_points = all_points[(all_points["task"] == task) & all_points[cost].notna()]
            if len(panel_points):
                _panel(axes, panel_points, cost, colours)
            else:
                axes.text(0.5, 0.5, UNMEASURED, transform=axes.transAxes, ha="center")
    draw_legend(plot)
    move_labels_inside(plot)
    return plot


def _panel(axes: Axes, panel_points: pd.DataFrame, cost: str, colours: dict[str, Any]) -> None:
    for point in panel_points.to_dict("records"):
        marker, colour = MARKERS[point["form"]], colours[point["method"]]
        xs, ys = [point[cost]], [point["score"]]
        axes.plot(xs, ys, linestyle="", marker=marker, markersize=7, color=colour, alpha=0.8, label=_label(point))
    best = front(panel_points, cost)
    axes.plot(best[cost], best["score"], drawstyle="steps-post", color="black", linewidth=0.8, zorder=0)
    for point in best.to_dict("records"):
        position = (point[cost], point["score"])
        axes.annotate(_label(point), position, xytext=(4, -9), textcoords="offset points", **LABEL_STYLE)
    set_ticks(axes.xaxis, panel_points[cost], TEXTS[cost], logarithmic=True)
    axes.grid(alpha=0.3)


def _label(point: Mapping[Hashable, Any]) -> str:
    return point["method"] if point["form"] == TORCH else f"{point['method']}, {point['form']}"
