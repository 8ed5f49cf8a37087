"""Pictures of a classification: the confusion matrix, and accuracy against confidence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lad_dist.evaluation.classification import BINS
from lad_dist.runs.plots import draw_heatmap

INCHES_PER_CLASS = 0.5


def confusion_figure(title: str, classes: Mapping[str, Any], confusion: Sequence[Sequence[int]]) -> Figure:
    """Draw for each class (rows) the share of its examples that was taken for each class (columns)."""
    counts = np.array(confusion, dtype=float)
    with np.errstate(invalid="ignore"):
        shares = np.where(counts > 0, counts / counts.sum(axis=1, keepdims=True), np.nan)
    rows = [f"{name} ({scores['support']:,})" for name, scores in classes.items()]
    side = 1.5 + INCHES_PER_CLASS * len(rows)
    figure = Figure(figsize=(max(4.5, side + 1), max(3.5, side)), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="label (examples)")
    # The heat map's rows go upwards, those of a confusion matrix downwards.
    table = pd.DataFrame(shares, index=rows, columns=list(classes)).iloc[::-1]
    draw_heatmap(axes, f"{title}: predictions for each label", table)
    axes.tick_params(axis="x", rotation=45 if max(map(len, classes)) > 4 else 0)
    return figure


def reliability_figure(title: str, calibrations: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the accuracy over the confidence in each bin, and below it how many decisions are in the bin."""
    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], linestyle="--", color="grey", label="calibrated", zorder=0)
    width = 1 / BINS / len(calibrations)
    for number, (name, calibration) in enumerate(calibrations.items()):
        bins = pd.DataFrame(calibration["bins"])
        label = f"{name}: ECE {calibration['ece']:.3f}"
        above.plot(bins["confidence"], bins["accuracy"], marker="o", markersize=4, color=f"C{number}", label=label)
        shares = bins["count"] / bins["count"].sum()
        below.bar(bins["lower"] + width * number, shares, width, align="edge", color=f"C{number}")
    above.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    above.set_title(f"{title}: how sure, how right", fontsize="medium", parse_math=False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    below.set(xlabel="confidence", ylabel="share of decisions")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure
