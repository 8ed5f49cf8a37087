"""The same curve for any ZeRO stage and any number of processes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import curves
from toy_heads import LABELS, MAKE_FILES

from lad_dist.compression.registry import COMPRESSIONS
from lad_dist.objectives.registry import OBJECTIVES

# One fixture trains two hundred runs: the limit catches hangs.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]
STAGES = (0, 1, 2, 3)
HEADS_STAGES = (0, 3)


def zero(stage: int) -> dict[str, Any]:
    """Return DeepSpeed's options; by default stage 3 would leave the few weights of a toy whole on every process."""
    return {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}


def configs(world: World, work: Path) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        tables = toy.task_config(work, world.files, world.teacher, world.pretrained)
        tables["run"] = {**tables["run"], "name": f"zero{stage}"}
        tables["deepspeed"] = {"zero_optimization": zero(stage)}
        result[f"zero{stage}"] = tables
        if stage:
            half = {**tables, "run": {**tables["run"], "name": f"bf16-zero{stage}"}}
            half["deepspeed"] = {**tables["deepspeed"], "bf16": {"enabled": True}}
            result[f"bf16-zero{stage}"] = half
    return result


CURVES = {
    **{name: {"name": name} for name, kind in OBJECTIVES.items() if kind.requires_teacher},
    "emd": {"name": "emd", "attention": 1.0, "hidden": 1.0},
    "minilm2": {"name": "minilm2", "heads": 8},
}


# All compressions; the student is cut out of the teacher.
COMPRESSED: dict[str, list[dict[str, Any]]] = {
    "theseus": [{"name": "theseus", "end": 1.0}],
    "theseus-unfrozen": [{"name": "theseus", "end": 1.0, "frozen": False}],
    "ladabert": [{"name": "ladabert", "reduction": 3.0, "embedding": 1.5, "svd": 2.0, "update_every": 1}],
    "movement": [
        {"name": "low_rank", "keep": 0.8},
        {"name": "prune", "criterion": "movement", "sparsity": 0.5, "update_every": 1},
        {"name": "scale_position_embeddings", "scale": 0.5},
    ],
    "heads": [{"name": "heads", "heads": 0.5, "units": 0.5, "update_every": 1}],
    "adapting": [{"name": "prune", "criterion": "adapting", "sparsity": 0.5, "update_every": 1}],
}
UNDER = ("supervised", "kd", "lad")
PAIRS = [*itertools.product(COMPRESSED, UNDER)]


def every_compression(world: World, work: Path) -> dict[str, dict[str, Any]]:
    """Return runs of three steps of each compression, under each objective."""
    result: dict[str, dict[str, Any]] = {}
    for (name, objective), stage in itertools.product(PAIRS, STAGES[:3]):
        key = f"{name}-{objective}-zero{stage}"
        tables = toy.task_config(work, world.files, world.teacher, world.teacher)
        tables |= {"run": {**tables["run"], "name": key, "steps": 3}, "objective": {"name": objective}}
        tables |= {"compression": COMPRESSED[name], "deepspeed": {"zero_optimization": zero(stage)}}
        tables["data"] |= {"micro_batches_per_step": 2, "num_workers": 0}
        if objective == "supervised":
            del tables["teacher"]
        result[key] = tables
    return result


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
        tables |= {"run": {**tables["run"], "name": key, "steps": 3}, "objective": CURVES[name]}
        tables["deepspeed"] = {"zero_optimization": zero(stage)}
        tables["data"] |= {"micro_batches_per_step": 2, "num_workers": 0}
        if name in ("emd", "tinybert", "minilm", "minilm2"):
            architecture = {**toy.SIZES, "hidden_size": 16, "num_hidden_layers": 2}
            tables["student"] = {"architecture": architecture, "tokenizer": str(world.tokenizer)}
        if name == "mgskd":
            tables["student"]["hidden_size"] = 16
        result[key] = tables
    for kind, stage in itertools.product(LABELS, HEADS_STAGES):
        files = MAKE_FILES[kind](work / f"{kind}{stage}", train=16, dev=6)
        tables = toy.task_config(work, files, teachers[kind], world.headless)
        tables |= {"run": {**tables["run"], "name": f"{kind}-zero{stage}", "steps": 3}, "objective": {"name": "lad"}}
        tables["deepspeed"] = {"zero_optimization": zero(stage)}
        tables["data"] |= {"micro_batches_per_step": 2, "num_workers": 0}
        result[f"{kind}-zero{stage}"] = tables
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


@pytest.fixture(scope="module")
def objective_curves(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, list[dict[str, Any]]]]:
    work = tmp_path_factory.mktemp("objectives")

    def configs(folder: Path) -> dict[str, dict[str, Any]]:
        return every_objective(world, folder) | every_compression(world, folder)

    return {n: curves(work / f"{n}", configs(work / f"{n}"), processes=n) for n in (1, 2)}


@pytest.mark.parametrize("name", CURVES)
def test_every_objective_has_one_curve(name: str, objective_curves: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    """Whatever the stage and the number of processes: losses, and the metrics of the objective."""
    expected = terms(objective_curves[1][f"{name}-zero0"])
    assert len(expected) == 3
    assert expected[0]["loss"] != expected[-1]["loss"]
    for processes, stages in objective_curves.items():
        for stage in STAGES:
            rows = terms(stages[f"{name}-zero{stage}"])
            for row, expected_row in zip(rows, expected, strict=True):
                assert row == pytest.approx(expected_row, rel=2e-4, abs=1e-6), (processes, stage)


def test_every_compression_is_among_the_curves() -> None:
    assert {row["name"] for rows in COMPRESSED.values() for row in rows} == set(COMPRESSIONS)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_every_compression_has_one_curve(
    name: str, objective: str, objective_curves: dict[int, dict[str, list[dict[str, Any]]]]
) -> None:
    expected = terms(objective_curves[1][f"{name}-{objective}-zero0"])
    assert len(expected) == 3
    for processes, stages in objective_curves.items():
        for stage in STAGES[:3]:
            rows = terms(stages[f"{name}-{objective}-zero{stage}"])
            for row, expected_row in zip(rows, expected, strict=True):
                assert row == pytest.approx(expected_row, rel=2e-4, abs=1e-6), (processes, stage)


@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_of_task_has_one_curve(
    kind: str, objective_curves: dict[int, dict[str, list[dict[str, Any]]]]
) -> None:
    """Losses, and the dev set's metrics and loyalty."""
    expected = objective_curves[1][f"{kind}-zero0"]
    for processes, stages in objective_curves.items():
        for stage in HEADS_STAGES:
            rows = stages[f"{kind}-zero{stage}"]
            for row, expected_row in zip(terms(rows), terms(expected), strict=True):
                assert row == pytest.approx(expected_row, rel=2e-4, abs=1e-6), (processes, stage)
            for name in ("dev/f1", "dev/label_loyalty", "dev/probability_loyalty"):
                assert rows[-1][name] == pytest.approx(expected[-1][name], abs=1e-4), (processes, stage)


def terms(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return, of each step, the loss, the terms and the metrics of the objective."""
    other = ("lr", "dev", "tokens_per_second", "grad_norm")
    return [{key: x for key, x in row.items() if not key.startswith(other)} for row in rows if "loss" in row]
