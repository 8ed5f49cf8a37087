"""The same curve for any ZeRO stage and any number of processes."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import curves
from safetensors.torch import load_file
from toy_heads import LABELS, MAKE_FILES
from world_sizes import STAGES, Curves, Rows, assert_one_curve, short_run, terms, zero

from lad_dist.objectives.registry import OBJECTIVES

# One fixture trains a hundred runs: the limit catches hangs.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]
HEADS_STAGES = (0, 3)
SINGLES = {"micro_batches_per_step": 8, "micro_batch_size": 1}  # of runs like those of two micro-batches of four


def configs(world: World, work: Path) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for stage, half in itertools.product(STAGES, (False, True)):
        if stage or not half:
            name = f"bf16-zero{stage}" if half else f"zero{stage}"
            tables = toy.task_config(work, world.files, world.teacher, world.pretrained)
            tables["run"]["name"] = name
            tables["deepspeed"] = {"zero_optimization": zero(stage), "bf16": {"enabled": half}}
            result[name] = tables
    return result


CURVES = {
    **{name: {"name": name} for name, kind in OBJECTIVES.items() if kind.requires_teacher},
    "emd": {"name": "emd", "attention": 1.0, "hidden": 1.0},
    "minilm2": {"name": "minilm2", "heads": 8},
}


def every_objective(world: World, work: Path) -> dict[str, dict[str, Any]]:
    """Return runs of three steps of each objective, and of lad on each kind of task with several rows in a sequence.

    The student of tinybert, emd and the relations is narrower than the teacher; that of mgskd is cut out of the
    teacher's width.
    """
    result: dict[str, dict[str, Any]] = {}
    teachers = {kind: toy.model(work / kind, world.tokenizer, kind, LABELS[kind]) for kind in LABELS}
    for name, stage in itertools.product(CURVES, STAGES):
        key = f"{name}-zero{stage}"
        corpus = "task" not in OBJECTIVES[name].supported_data or name.startswith("minilm")
        places = (world.corpus,) if corpus else (world.files,)
        tables = (toy.corpus_config if corpus else toy.task_config)(work, *places, world.teacher, world.pretrained)
        tables = short_run(tables, key, stage) | {"objective": CURVES[name]}
        if name in ("emd", "tinybert", "minilm", "minilm2"):
            architecture = {**toy.SIZES, "hidden_size": 16, "num_hidden_layers": 2}
            tables["student"] = {"architecture": architecture, "tokenizer": str(world.tokenizer)}
        if name == "mgskd":
            tables["student"]["hidden_size"] = 16
        result[key] = tables
    for kind, stage in itertools.product(LABELS, HEADS_STAGES):
        files = MAKE_FILES[kind](work / f"{kind}{stage}", train=16, dev=6)
        tables = toy.task_config(work, files, teachers[kind], world.headless, objective={"name": "lad"})
        result[f"{kind}-zero{stage}"] = short_run(tables, f"{kind}-zero{stage}", stage)
    for kind in LABELS:
        tables = deepcopy(result[f"{kind}-zero0"])
        tables["run"]["name"] = f"{kind}-singles"
        tables["data"] |= SINGLES
        result[f"{kind}-singles"] = tables
    return result


def losses(rows: Rows) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


@pytest.fixture(scope="module")
def all_curves(world: World, work: Path) -> Curves:
    return {n: curves(work / f"{n}", configs(world, work / f"{n}"), processes=n) for n in (1, 2)}


def test_fp32_curves_are_one(all_curves: Curves) -> None:
    expected = losses(all_curves[1]["zero0"])
    assert len(expected) == 8
    assert expected[-1] < expected[0]
    for processes, stages in all_curves.items():
        for stage in STAGES:
            assert losses(stages[f"zero{stage}"]) == pytest.approx(expected, rel=1e-4), (processes, stage)


def test_weights_differ_by_the_rounding_of_sums_alone(all_curves: Curves, work: Path) -> None:
    """Of four micro-batches one process adds ((0 + 1) + 2) + 3 and two add (0 + 2) + (1 + 3)."""
    one, two = (load_file(work / f"{n}" / "zero1" / "export" / "model.safetensors") for n in all_curves)
    assert 0 < max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6


def test_bf16_curves_are_close(all_curves: Curves) -> None:
    expected = losses(all_curves[1]["zero0"])
    for processes, stages in all_curves.items():
        for stage in STAGES[1:]:
            assert losses(stages[f"bf16-zero{stage}"]) == pytest.approx(expected, rel=2e-2), (processes, stage)


def test_dev_metrics_are_the_same_on_any_number_of_processes(all_curves: Curves) -> None:
    for stage in STAGES:
        one, two = (all_curves[n][f"zero{stage}"][-1] for n in (1, 2))
        assert one["dev/accuracy"] == two["dev/accuracy"]
        assert one["dev/probability_loyalty"] == pytest.approx(two["dev/probability_loyalty"], abs=1e-4)


@pytest.fixture(scope="module")
def objective_curves(world: World, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    work = tmp_path_factory.mktemp("objectives")

    return {n: curves(work / f"{n}", every_objective(world, work / f"{n}"), processes=n) for n in (1, 2)}


@pytest.mark.parametrize("name", CURVES)
def test_every_objective_has_one_curve(name: str, objective_curves: Curves) -> None:
    assert_one_curve(objective_curves, name, STAGES)
    rows = terms(objective_curves[1][f"{name}-zero0"])
    assert rows[0]["loss"] != rows[-1]["loss"]


@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_of_task_has_one_curve(kind: str, objective_curves: Curves) -> None:
    """Losses, and the dev set's metrics and loyalty."""
    assert_one_curve(objective_curves, kind, HEADS_STAGES)
    expected = objective_curves[1][f"{kind}-zero0"][-1]
    for processes, stage in itertools.product(objective_curves, HEADS_STAGES):
        scores = objective_curves[processes][f"{kind}-zero{stage}"][-1]
        for name in ("dev/f1", "dev/label_loyalty", "dev/probability_loyalty"):
            assert scores[name] == pytest.approx(expected[name], abs=1e-4), (processes, stage)


@pytest.mark.parametrize("kind", LABELS)
def test_a_step_does_not_depend_on_micro_batches(kind: str, objective_curves: Curves) -> None:
    """Losses and their terms, of eight examples a step with ragged lengths and rows."""
    expected = terms(objective_curves[1][f"{kind}-zero0"])
    for processes, runs in objective_curves.items():
        for row, expected_row in zip(terms(runs[f"{kind}-singles"]), expected, strict=True):
            for key in ("loss", "hard", "soft", "hidden"):
                assert row[key] == pytest.approx(expected_row[key], rel=2e-4), processes
