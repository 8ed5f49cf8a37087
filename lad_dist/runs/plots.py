"""Plots of run folders, and what all plots share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lad_dist.config.errors import UserError
from lad_dist.utils.atomic_io import write_text

DPI = 120
SHADES = ListedColormap(colormaps["Blues"](np.linspace(0, 0.55, 256)))  # on which black text is readable
LEGEND_COLUMNS = 3
# Largest over smallest value, from which on ticks of a logarithmic axis are powers of ten, twice and five times these.
WIDE = 10.0
VERY_WIDE = 100.0  # from which on they are powers alone
NOT_TERMS = {"step", "loss", "tokens_per_second", "grad_norm"}


def curves(folders: Sequence[Path], out: Path, metric: str = "accuracy") -> list[Path]:
    """Draw the curves of runs and return the files.

    The dev metric over steps, with the teachers' as dashed lines, the terms of the losses, and the gates where a run
    has them. Raises FileNotFoundError where a folder holds no run.
    """
    runs = {
        folder.name: pd.read_json(folder / "metrics.jsonl", lines=True).groupby("step").last() for folder in folders
    }
    scores = pd.DataFrame({name: rows[f"dev/{metric}"] for name, rows in runs.items()})
    figures = {metric: _lines(f"{metric} on the dev set", metric, scores, marker="o")}
    for name, rows in runs.items():
        for score in rows.get(f"teacher/{metric}", pd.Series()).dropna():
            figures[metric].axes[0].axhline(score, linestyle="--", color="grey", zorder=0)
        terms = sorted(key for key in rows if "/" not in key and key not in NOT_TERMS)
        figures[f"{name}-terms"] = _lines(f"{name}: terms of the loss, as weighted", "loss", rows[terms])
        gates = rows.filter(regex="^gate/").rename(columns=lambda gate: gate.replace("gate/", "teacher layer "))
        if len(gates.columns):
            title = f"{name}: gates, 1 = the teacher's layer, 0 = those below it"
            figures[f"{name}-gates"] = _lines(title, "gate", gates.sort_index(axis="columns"))
            figures[f"{name}-gates"].axes[0].set_ylim(0, 1)
    files = {f"{name}.png": figure for name, figure in figures.items()}
    save_files(out, {}, files)
    return [out / name for name in files]


def _lines(title: str, label: str, columns: pd.DataFrame, **style: Any) -> Figure:
    """Draw a line for each column over the steps, its index; `label` is that of the values."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    for name, values in columns.items():
        axes.plot(values.dropna(), label=name, **style)
    draw_legend(figure)
    return figure


def draw_legend(figure: Figure) -> None:
    """Draw one legend for all panels below them, in as many columns as fit; the figure grows by its height."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if not handles:
        return
    renderer, width, height = FigureCanvasAgg(figure).get_renderer(), 0.0, 0.0
    for columns in range(LEGEND_COLUMNS, 0, -1):
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
        )
        width, height = legend.get_window_extent(renderer).transformed(figure.dpi_scale_trans.inverted()).size
        if width <= figure.get_figwidth():
            break
        if columns > 1:
            legend.remove()
    figure.set_size_inches(max(figure.get_figwidth(), width), figure.get_figheight() + height)


def set_ticks(
    axis: XAxis | YAxis, values: pd.Series, text: Callable[[float], str], *, logarithmic: bool = False
) -> None:
    """Give an axis ticks at round numbers, written by `text` with their units: 40 ms, 60 MB, never powers of ten."""
    if logarithmic:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ratio = values.max() / values.min() if logarithmic else 1.0
    if ratio > WIDE:
        axis.set_major_locator(LogLocator(subs=(1.0,) if ratio > VERY_WIDE else (1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def move_labels_inside(figure: Figure) -> None:
    """Move the labels of points that reach over the edges of their panels back into these."""
    labels = [(axes, text) for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    for _, label in labels:
        label.set_in_layout(False)
    FigureCanvasAgg(figure).draw()  # which lays the panels out
    for axes, label in labels:
        box, panel = label.get_window_extent(), axes.bbox
        right = max(0.0, panel.x0 - box.x0) - max(0.0, box.x1 - panel.x1)
        up = max(0.0, panel.y0 - box.y0) - max(0.0, box.y1 - panel.y1)
        x, y = label.xyann
        label.xyann = (x + right * 72 / figure.dpi, y + up * 72 / figure.dpi)  # in points


def teacher_layer_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the last weights `teacher_layer_weight/M/L` as a heat map; None where the objective reports none.

    Student layers M go upwards; the weights of each add up to 1.
    """
    shares = pd.DataFrame(rows).filter(regex="^teacher_layer_weight/").dropna(how="all")
    if shares.empty:
        return None
    shares.columns = pd.MultiIndex.from_tuples([tuple(map(int, name.split("/")[1:])) for name in shares.columns])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="teacher layer", ylabel="student layer")
    draw_heatmap(axes, "weight of each teacher layer for each student layer", shares.iloc[-1].unstack())
    return figure


def drawn(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure once and return its pixels [height, width, RGB]."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def draw_heatmap(axes: Axes, title: str, values: pd.DataFrame, maximum: float = 1.0) -> None:
    """Draw a table as a heat map, rows upwards; cells without a value stay empty."""
    axes.imshow(values.to_numpy(), cmap=SHADES, vmin=0, vmax=maximum, origin="lower", aspect="auto")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.set_xticks(range(len(values.columns)), map(str, values.columns), fontsize="small", parse_math=False)
    axes.set_yticks(range(len(values.index)), map(str, values.index), fontsize="small", parse_math=False)
    for row, cells in enumerate(values.to_numpy()):
        for column, value in enumerate(cells):
            if value == value:  # no NaN
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black", fontsize="small")


def save_files(out: Path, texts: Mapping[str, str], figures: Mapping[str, Figure | None]) -> None:
    """Write texts and figures to a folder, each by its file name; raise UserError where the folder refuses them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(out / name, text)
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(out / name, dpi=DPI)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give --out another folder") from None
