"""Plots of a run's metrics."""

from pathlib import Path

import pytest
from conftest import World
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import lad

from lad_dist.runs.plots import teacher_layer_figure
from lad_dist.training.train import train


def test_the_heat_map_shows_the_last_row_with_layer_weights() -> None:
    rows = [
        {"step": 1, "teacher_layer_weight/1/1": 1.0, "teacher_layer_weight/1/2": 0.0, "teacher_layer_weight/2/3": 1.0},
        {
            "step": 2,
            "teacher_layer_weight/1/1": 0.75,
            "teacher_layer_weight/1/2": 0.25,
            "teacher_layer_weight/2/3": 1.0,
        },
        {"step": 2, "dev/accuracy": 0.5},
    ]
    figure = teacher_layer_figure(rows)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.images[0].get_array().filled(0).tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    assert sorted(text.get_text() for text in axes.texts) == ["0.25", "0.75", "1.00"]
    assert teacher_layer_figure([{"step": 1, "loss": 2.0}]) is None


@pytest.mark.parametrize(("objective", "drawn"), [("lad", True), ("alp", True), ("emd", True), ("kd", False)])
def test_a_run_saves_the_heat_map(objective: str, drawn: bool, world: World, tmp_path: Path) -> None:
    folder = train(lad(world, tmp_path, {"run.steps": 2, "objective": {"name": objective}})).folder
    assert (folder / "teacher_layers.png").exists() == drawn
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["teacher_layers"] * drawn
