"""A search as plots: its history, its samples by key, and what one metric costs in another."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lad_dist.report.search_keys import SearchKey
from lad_dist.report.search_trials import NOT_ENDED, SearchTrials, front
from lad_dist.runs.plots import WIDE, draw_legend, move_labels_inside, set_ticks
from lad_dist.runs.search_record import MINIMISED
from lad_dist.utils.text import plain_number

MARKS: dict[str, dict[str, Any]] = {
    "completed": {"marker": "o", "color": "C0"},
    "stopped": {"marker": "x", "color": "C3"},
    NOT_ENDED: {"marker": "o", "color": "C0", "markerfacecolor": "none"},
}
UNITS = {"parameters": "", "flops": "", "bytes": "B", "latency": "s"}
TICKS = 5  # of a range
ABSENT = -0.12  # where samples without a key stand, below the axis


def history(search: SearchTrials) -> Figure | None:
    """Draw the scores of the trials in their order, a panel per metric, with the best so far and the base config's."""
    if not search.scored:
        return None
    plot = Figure(figsize=(8, 0.6 + 3.2 * len(search.metrics)), layout="constrained")
    panels = plot.subplots(len(search.metrics), squeeze=False, sharex=True)[:, 0]
    for axes, metric in zip(panels, search.metrics, strict=True):
        _history_panel(axes, search, metric)
    panels[-1].set_xlabel("trial")
    draw_legend(plot)
    return plot


def history_rows(search: SearchTrials, metric: str) -> pd.DataFrame:
    """Return a row per sample with a value, in their order: number, status, score, error and best so far.

    Trials that have not ended are among them and count for no best.
    """
    scored = {each.name: each for each in search.scored}
    rows: list[tuple[Any, ...]] = []
    for number, trial in enumerate(trial for trial in search.trials.values() if trial.seed == 0):
        if trial.name in scored:
            each = scored[trial.name]
            rows.append((number, each.status, each.mean(metric), each.error(metric)))
        elif trial.status is None and metric in trial.values:
            rows.append((number, NOT_ENDED, trial.values[metric], math.nan))
    table = pd.DataFrame(rows, columns=["number", "status", "score", "error"])
    ended = table["score"].where(table["status"] != NOT_ENDED)
    table["best"] = ended.cummin() if metric in MINIMISED else ended.cummax()
    return table


def _history_panel(axes: Axes, search: SearchTrials, metric: str) -> None:
    rows = history_rows(search, metric)
    base = next((each for each in search.scored if search.base and each.name == search.base.name), None)
    if base is not None:
        axes.axhline(base.mean(metric), linestyle="--", color="grey", label="base config", zorder=0)
    best = rows["best"].ffill()
    axes.plot(rows["number"], best, drawstyle="steps-post", color="C1", label="best so far", zorder=1)
    for status, style in MARKS.items():
        chosen = rows[rows["status"] == status]
        if len(chosen):
            axes.plot(chosen["number"], chosen["score"], linestyle="", markersize=6, label=status, **style)
    several = rows[rows["error"].notna()]
    axes.errorbar(several["number"], several["score"], several["error"], fmt="none", color="C0", capsize=3)
    axes.set_ylabel(metric, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _set_scale(axes, "y", rows["score"].rename(metric))
    axes.grid(alpha=0.3)


def parallel(search: SearchTrials) -> Figure | None:
    """Draw a line per sample over an axis per key, in the colour of the first metric; the best one is drawn last."""
    samples = [each for each in search.scored if each.sample]
    if not samples:
        return None
    keys, metric = search.keys, search.metrics[0]
    plot = Figure(figsize=(2.2 + 1.7 * len(keys), 4.6), layout="constrained")
    axes = plot.add_subplot()
    positions = search.positions().loc[[each.name for each in samples]]
    heights = pd.DataFrame({key.name: _draw_axis(axes, place, key, positions[key.name])
                            for place, key in enumerate(keys)})  # fmt: skip
    scores = search.means().loc[positions.index, metric]
    colours = ScalarMappable(Normalize(scores.min(), scores.max()), colormaps["viridis"])
    for number, name in enumerate(reversed(positions.index)):  # the best one comes last
        is_best = number == len(positions) - 1
        axes.plot(
            range(len(keys)),
            heights.loc[name],
            marker="o",
            markersize=4,
            color=colours.to_rgba(scores[name]),
            linewidth=3.0 if is_best else 1.3,
            alpha=1.0 if is_best else 0.75,
        )
    plot.colorbar(colours, ax=axes, label=metric, pad=0.04)
    axes.set_xticks(range(len(keys)), [key.name.replace(".", ".\n") for key in keys], parse_math=False)
    axes.set_xlim(-0.3, len(keys) - 0.3)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"best: {positions.index[0]}", fontsize="medium", parse_math=False)
    return plot


def _draw_axis(axes: Axes, place: int, key: SearchKey, positions: pd.Series) -> pd.Series:
    """Draw the axis of a key from 0 to 1; return where the samples stand on it, ABSENT where they lack the key."""
    low, high = positions.min(), positions.max()
    if key.categories is not None:
        low, high = 0, len(key.categories) - 1
    ticks = (
        range(len(key.categories))
        if key.categories is not None
        else _ticks(low, high, whole=key.is_whole and not key.logarithmic)
    )
    axes.plot([place, place], [0, 1], color="black", linewidth=0.8, zorder=0)

    def height(position: float) -> float:
        return (position - low) / (high - low) if high > low else 0.5

    for tick in ticks:
        _label(axes, place, height(tick), key.text(tick))
    if positions.isna().any():
        _label(axes, place, ABSENT, "absent")
    return positions.map(height).where(positions.notna(), ABSENT)


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """Return places on a range, distinct numbers."""
    places = np.linspace(low, high, TICKS)
    return sorted({float(round(place)) for place in places} if whole else set(places.tolist()))


def _label(axes: Axes, place: int, height: float, text: str) -> None:
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
    shown = text if len(text) <= 18 else f"{text[:17]}…"
    axes.text(place + 0.04, height, shown, fontsize="x-small", va="center", parse_math=False, bbox=box, zorder=9)


def fronts(search: SearchTrials) -> Figure | None:
    """Draw the first metric against each other one, and the trials of which no other is better by both, with names."""
    others = search.metrics[1:]
    if not others or not search.scored:
        return None
    plot = Figure(figsize=(0.4 + 5.2 * len(others), 4), layout="constrained")
    for axes, metric in zip(plot.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        _front_panel(axes, search.means()[[metric, search.metrics[0]]].dropna())
    move_labels_inside(plot)
    return plot


def _front_panel(axes: Axes, means: pd.DataFrame) -> None:
    across, up = means.columns
    axes.plot(means[across], means[up], linestyle="", marker="o", color="C0", alpha=0.5)
    best = means.loc[front(means)].sort_values([across, up])
    axes.plot(best[across], best[up], marker="o", color="C1", linewidth=0.8)
    for name, x, y in best.itertuples(name=None):
        axes.annotate(name, (x, y), xytext=(4, -9), textcoords="offset points", fontsize="x-small", parse_math=False)
    axes.set(xlabel=across, ylabel=up)
    _set_scale(axes, "x", means[across])
    axes.grid(alpha=0.3)


def _set_scale(axes: Axes, side: str, values: pd.Series) -> None:
    """Give sizes and latencies their units; make an axis logarithmic where what is minimised differs much."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    name, low, high = str(values.name), values.min(), values.max()
    logarithmic = name in MINIMISED and low > 0 and high > WIDE * low
    if name in UNITS:
        set_ticks(axis, values, EngFormatter(UNITS[name]), logarithmic=logarithmic)
    elif logarithmic:
        set_ticks(axis, values, plain_number, logarithmic=True)
