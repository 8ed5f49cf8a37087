"""How much each key of a search matters to a metric: a random forest, and what shuffling a key costs it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import permutation_importance

from lad_dist.report.search_trials import SearchTrials

MIN_SAMPLES = 10
TREES, SHUFFLES, SEED = 100, 10, 0


def with_values(search: SearchTrials) -> list[str]:
    """Return the samples that have a score and drawn values, which the base config may lack."""
    return [each.name for each in search.scored if each.sample]


def are_enough(search: SearchTrials) -> bool:
    """Return whether there are enough samples to compare keys."""
    return len(with_values(search)) >= MIN_SAMPLES


def importance(search: SearchTrials, metric: str) -> pd.DataFrame:
    """Return mean and sd over shuffles of what a forest loses in R² once a key is shuffled, largest first.

    The forest is fitted to the samples and asked about the same ones (Breiman, 2001; permutation importance of
    scikit-learn). Where a key does not apply, as in another choice of an axis, it stands at the median of the others.
    """
    names = with_values(search)
    target = search.means().loc[names, metric].dropna()
    positions = search.positions().loc[target.index]
    features = positions.fillna(positions.median()).fillna(0.0)
    forest = RandomForestRegressor(TREES, random_state=SEED).fit(features, target)
    result = permutation_importance(forest, features, target, n_repeats=SHUFFLES, random_state=SEED)
    table = pd.DataFrame({"mean": result.importances_mean, "sd": result.importances_std}, index=features.columns)
    return table.sort_values("mean", ascending=False, kind="stable")


def figure(search: SearchTrials) -> Figure | None:
    """Draw a panel of bars per metric, the most important key on top; return None with fewer than MIN_SAMPLES."""
    if not are_enough(search):
        return None
    count = len(search.keys)
    plot = Figure(figsize=(7, len(search.metrics) * (1.1 + 0.35 * count)), layout="constrained")
    for axes, metric in zip(plot.subplots(len(search.metrics), squeeze=False)[:, 0], search.metrics, strict=True):
        table = importance(search, metric)
        rows = np.arange(count)
        axes.barh(rows, table["mean"], xerr=table["sd"], capsize=3, color="C0", height=0.6)
        axes.set_yticks(rows, table.index, parse_math=False)
        axes.invert_yaxis()
        axes.set_title(f"importance for {metric}", fontsize="medium", parse_math=False)
        axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("R² lost by shuffling the key, mean ± sd")
    return plot
