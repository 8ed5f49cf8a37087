"""Pictures that a person reads: legends and labels inside, plain numbers on axes, text that stands out."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from complete_runs import load_comparison, run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from test_report import latency_table

from lad_dist.report import pareto, plots
from lad_dist.runs.plots import curves, draw_heatmap, draw_legend, move_labels_inside, set_ticks

LONG = "a method with a name that is as long as those of grids: teacher-lad-low-rank"


def measured_runs(folder: Path, label: str = "lad") -> None:
    sizes = {"results__student__bytes/safetensors": 6e7, "results__student__bytes/onnx int8": 1.6e7}
    for name, score in (("kd", 0.7), (label, 0.74)):
        options = {"results__latency": latency_table(0.02), **sizes}
        run(folder / name.replace(" ", "-").replace(":", ""), "kd", "rte", 0, score, run__label=name, **options)


def drawn(figure: Figure) -> Figure:
    """Draw it, so that texts have their places."""
    FigureCanvasAgg(figure).draw()
    return figure


def assert_texts_lie_inside(figure: Figure) -> None:
    width, height = figure.bbox.size
    for artist in (*figure.axes, *figure.legends):
        box = artist.get_tightbbox()
        assert box is not None
        assert -1 <= box.x0 <= box.x1 <= width + 1
        assert -1 <= box.y0 <= box.y1 <= height + 1
    for axes in figure.axes:
        for label in axes.texts:
            box = label.get_window_extent()
            assert axes.bbox.x0 - 1 <= box.x0 <= box.x1 <= axes.bbox.x1 + 1
            assert axes.bbox.y0 - 1 <= box.y0 <= box.y1 <= axes.bbox.y1 + 1


@pytest.mark.parametrize("label", ["lad", LONG])
def test_nothing_is_clipped(label: str, tmp_path: Path) -> None:
    measured_runs(tmp_path, label)
    comparison = load_comparison(tmp_path)
    figures = plots.figure(comparison), pareto.figure(comparison)
    for figure in figures:
        assert figure is not None
        assert_texts_lie_inside(drawn(figure))


def test_a_legend_has_as_many_columns_as_fit() -> None:
    columns = []
    for name in ("a", "a longer name of a run", "the longest name of all runs of this comparison"):
        figure = Figure(figsize=(4, 3))
        axes = figure.add_subplot()
        for number in range(3):
            axes.plot([0, 1], label=f"{name} {number}")
        draw_legend(figure)
        (legend,) = figure.legends
        columns.append(legend._ncols)
        assert legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= figure.bbox.width
        assert figure.get_figheight() > 3
    assert columns == [3, 1, 1]


def tick_labels(low: float, high: float, *, logarithmic: bool = True) -> list[str]:
    figure = Figure()
    axes = figure.add_subplot()
    values = pd.Series([low, high])
    axes.plot(values, [0, 1])
    set_ticks(axes.xaxis, values, pareto.TEXTS["latency"], logarithmic=logarithmic)
    drawn(figure)
    left, right = axes.get_xlim()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [label.get_text() for place, label in ticks if left <= place <= right]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (8, 42, ["10 ms", "20 ms", "30 ms", "40 ms"]),
        (41, 49, ["42 ms", "44 ms", "46 ms", "48 ms"]),
        (3, 60, ["5 ms", "10 ms", "20 ms", "50 ms"]),
        (3, 6000, ["10 ms", "100 ms", "1,000 ms"]),
    ],
)
def test_ticks_are_plain_numbers(low: float, high: float, expected: list[str]) -> None:
    assert tick_labels(low, high) == expected


def test_the_axes_of_costs_have_units(tmp_path: Path) -> None:
    measured_runs(tmp_path)
    figure = pareto.figure(load_comparison(tmp_path))
    assert figure is not None
    drawn(figure)
    for axes, unit in zip(figure.axes, ("ms", "[kM]B"), strict=True):
        texts = [label.get_text() for label in axes.get_xticklabels(which="both")]
        assert any(texts)
        assert all(re.fullmatch(rf"[\d.,]+ {unit}", text) for text in texts if text)
        assert axes.get_xlabel()
        assert axes.get_ylabel() == "accuracy"


def test_labels_move_back_into_their_panel() -> None:
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    for x, y in ((0, 0), (1, 0), (1, 1), (0.5, 0.5)):
        axes.annotate("a long label", (x, y), xytext=(4, -9), textcoords="offset points")
    move_labels_inside(figure)
    assert_texts_lie_inside(drawn(figure))
    middle = axes.texts[-1]
    assert isinstance(middle, Annotation)
    assert middle.xyann == (4, -9)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1.5])
def test_numbers_stand_out_on_every_shade(value: float) -> None:
    """The contrast is that of WCAG 2.2, of which level AAA is 7; a value above the maximum has the last shade."""
    axes = Figure().add_subplot()
    draw_heatmap(axes, "shares", pd.DataFrame([[value]]))
    (image,), (text,) = axes.images, axes.texts
    red, green, blue, _ = image.cmap(image.norm(value))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)]
    assert text.get_color() == "black"
    assert (float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05) / 0.05 >= 7


def test_curves_have_labelled_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Figure] = {}
    monkeypatch.setattr("lad_dist.runs.plots.save_files", lambda out, texts, drawings: figures.update(drawings))
    folder = tmp_path / "lad"
    folder.mkdir()
    row = '{"step": %d, "loss": 1.0, "hard": 0.5, "gate/1": 0.5, "dev/accuracy": 0.5, "teacher/accuracy": 0.75}\n'
    (folder / "metrics.jsonl").write_text(row % 1 + row % 2)
    curves([folder], tmp_path)
    labels = {name: (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) for name, figure in figures.items()}
    assert labels == {
        "accuracy.png": ("step", "accuracy"),
        "lad-terms.png": ("step", "loss"),
        "lad-gates.png": ("step", "gate"),
    }
    for figure in figures.values():
        assert_texts_lie_inside(drawn(figure))
