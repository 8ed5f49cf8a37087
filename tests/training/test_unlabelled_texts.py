"""Runs that learn from texts without labels too: what they learn does not depend on caches, stops and processes."""

from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import curves
from toy_runs import curve, digest, lad
from world_sizes import terms

from lad_dist.distributed import processes
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.teacher_cache import decide_cache
from lad_dist.training.train import RunStatus, train


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Any]:
    """Changes of a config: 160 texts, so that two of seven that a run reads have a label."""
    (tmp_path / "logs.txt").write_text("".join(toy.sentence(50_000 + n, most=6) + "\n" for n in range(160)))
    return {"data.unlabelled": str(tmp_path / "logs.txt")}


def test_more_text_changes_the_student_and_the_teacher_alone_teaches_it(
    logs: dict[str, Any], world: World, tmp_path: Path
) -> None:
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("none", "some", "soft")}
    changes = {"none": {}, "some": logs, "soft": {**logs, "objective": {"name": "kd", "hard": 0.0}}}
    results = {name: train(lad(world, tmp_path / name, changes[name]), rows[name].append) for name in rows}
    assert digest(results["none"].folder / "export") != digest(results["some"].folder / "export")
    losses = [row["loss"] for row in rows["some"] if "loss" in row]
    assert losses[-1] < losses[0]
    assert "soft" in rows["soft"][-2]


def test_a_filled_cache_gives_the_same_run_and_is_used_where_it_pays(
    logs: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """Bit for bit; a run that computes each answer anew learns the same, to rounding."""
    rows: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "uncached": []}
    shared = {**logs, "teacher.cache": str(tmp_path / "shared"), "data.class_weights": "balanced"}
    changes = {"first": shared, "second": shared, "uncached": {**shared, "teacher.cache_gb": 0.0}}
    folders = {name: train(lad(world, tmp_path / name, changes[name]), rows[name].append).folder for name in rows}
    assert curve(rows["first"]) == curve(rows["second"])
    assert digest(folders["first"] / "export") == digest(folders["second"] / "export")
    losses = {name: [row["loss"] for row in each if "loss" in row] for name, each in rows.items()}
    assert losses["first"] == pytest.approx(losses["uncached"], rel=1e-4)
    for steps, weight, used in ((14, 1.0, False), (15, 1.0, True), (14, 0.1, False), (15, 3.0, True)):
        spec = resolve_run(lad(world, tmp_path, {**logs, "run.steps": steps, "data.unlabelled_weight": weight}))
        dataset = spec.dataset()
        assert decide_cache(spec, spec.objective().teacher_spec, dataset)[0] == used, (steps, weight)


def test_a_run_that_stopped_ends_as_one_that_did_not(logs: dict[str, Any], world: World, tmp_path: Path) -> None:
    """Bit for bit, with dropout on."""
    changes = {**logs, "student.dropout": 0.1, "data.unlabelled_weight": 0.5}
    rows: dict[str, list[dict[str, Any]]] = {"whole": [], "stopped": []}

    def stop(row: dict[str, Any]) -> None:
        rows["stopped"].append(row)
        if row["step"] == 3:
            processes._request_stop()

    whole = train(lad(world, tmp_path / "whole", changes), rows["whole"].append)
    config = lad(world, tmp_path / "stopped", changes)
    assert train(config, stop).status is RunStatus.STOPPED
    result = train(config, rows["stopped"].append)
    assert curve(rows["stopped"]) == curve(rows["whole"])
    assert digest(result.folder / "export") == digest(whole.folder / "export")


@pytest.mark.processes
def test_two_processes_learn_what_one_does(logs: dict[str, Any], world: World, tmp_path: Path) -> None:
    """Also where a micro-batch, or a whole step, has no labelled example."""
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    tables["data"] |= {"unlabelled": logs["data.unlabelled"], "unlabelled_weight": 2.0, "class_weights": "balanced"}
    tables["data"] |= {"micro_batch_size": 2, "micro_batches_per_step": 2}
    tables["run"]["steps"] = 6
    rows = {}
    for number in (1, 2):
        tables["run"]["dir"] = str(tmp_path / f"{number}")
        rows[number] = terms(curves(tmp_path / f"{number}", {"mixed": tables}, processes=number)["mixed"])
    assert 0.0 in [row["hard"] for row in rows[1]]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one == pytest.approx(two, rel=2e-4, abs=1e-6)
