"""A comparison as a plot."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lad_dist.report.comparison import Comparison
from lad_dist.runs.plots import draw_legend

MAX_COLUMNS = 4  # of panels


def figure(comparison: Comparison) -> Figure:
    """Draw a panel per task, best method on top.

    Every seed is a point; mean ± sd of several stand beside them, and the teacher is a dashed line.
    """
    tasks = list(comparison.tasks)
    columns = min(len(tasks), MAX_COLUMNS)
    rows = math.ceil(len(tasks) / columns)
    size = (
        0.5 + 0.085 * max(map(len, comparison.methods)) + 2.6 * columns,
        0.3 + rows * (1.0 + 0.32 * len(comparison.methods)),
    )
    plot = Figure(figsize=size, layout="constrained")
    panels = list(plot.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, task in zip(panels, tasks, strict=False):
        _panel(axes, comparison, task)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    panels[0].set_ylim(len(comparison.methods) - 0.5, -0.5)
    draw_legend(plot)
    return plot


def _panel(axes: Axes, comparison: Comparison, task: str) -> None:
    names = list(comparison.methods)
    for _, score in comparison.teachers(task):
        axes.axvline(score, linestyle="--", color="grey", label="teacher", zorder=0)
    for row, name in enumerate(names):
        if (name, task) in comparison.score_summary.index:
            points = comparison.scores.loc[(name, task)].to_numpy()
            mean, sd, _ = comparison.score_summary.loc[(name, task)]
            place = row if math.isnan(sd) else row + 0.15
            axes.plot(points, [place] * len(points), "o", color="C0", alpha=0.5, markersize=4, label="a seed")
            if not math.isnan(sd):
                axes.errorbar(
                    mean, row - 0.15, xerr=sd, fmt="D", color="C1", markersize=5, capsize=3, label="mean ± sd"
                )
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_title(task, fontsize="medium", parse_math=False)
    axes.set_xlabel(comparison.tasks[task], parse_math=False)
    axes.grid(alpha=0.3)
