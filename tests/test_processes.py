"""The same curve for any ZeRO stage and any number of processes."""

from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import curves

pytestmark = pytest.mark.processes
STAGES = (0, 1, 2, 3)


def configs(world: World, work: Path) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        tables = toy.task_config(work, world.files, world.teacher, world.pretrained)
        tables["run"] = {**tables["run"], "name": f"zero{stage}"}
        tables["deepspeed"] = {"zero_optimization": {"stage": stage}}
        result[f"zero{stage}"] = tables
        if stage:
            half = {**tables, "run": {**tables["run"], "name": f"bf16-zero{stage}"}}
            half["deepspeed"] = {**tables["deepspeed"], "bf16": {"enabled": True}}
            result[f"bf16-zero{stage}"] = half
    return result


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def all_curves(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    work = tmp_path_factory.mktemp("curves")
    return {n: curves(work / f"{n}", configs(world, work / f"{n}"), processes=n) for n in (1, 2)}


def test_fp32_curves_are_one(all_curves: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    expected = losses(all_curves[1]["zero0"])
    assert len(expected) == 8
    assert expected[-1] < expected[0]
    for processes, stages in all_curves.items():
        for stage in STAGES:
            assert losses(stages[f"zero{stage}"]) == pytest.approx(expected, rel=1e-4), (processes, stage)


def test_bf16_curves_are_close(all_curves: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    expected = losses(all_curves[1]["zero0"])
    for processes, stages in all_curves.items():
        for stage in STAGES[1:]:
            assert losses(stages[f"bf16-zero{stage}"]) == pytest.approx(expected, rel=2e-2), (processes, stage)


def test_dev_metrics_are_the_same_on_any_number_of_processes(
    all_curves: dict[int, dict[str, list[dict[str, Any]]]],
) -> None:
    for stage in STAGES:
        one, two = (all_curves[n][f"zero{stage}"][-1] for n in (1, 2))
        assert one["dev/accuracy"] == two["dev/accuracy"]
        assert one["dev/probability_loyalty"] == pytest.approx(two["dev/probability_loyalty"], abs=1e-4)
