"""Rows go to trackers as well, and nothing that befalls a tracker befalls the run."""

import json
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_trackers
import pytest
from conftest import World
from fake_trackers import Calls
from toy_runs import lad, stopped_at

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.runs import trackers
from lad_dist.runs.run_folder import Run
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.train import train

BOTH = {"run.trackers": ["wandb", "mlflow"]}


@pytest.fixture
def config(world: World, tmp_path: Path) -> TrainConfig:
    return lad(world, tmp_path / "project", BOTH)


def named(calls: Calls, name: str) -> list[Any]:
    return [value for call, value in calls if call == name]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_rows_go_to_the_trackers_and_a_resumed_run_goes_on_in_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal stops the run; the same command goes on. The config goes there once."""
    wandb, mlflow = fake_trackers.install(monkeypatch)
    config = lad(world, tmp_path / "project", BOTH | {"run.steps": 4, "run.eval_every": 2})
    assert stopped_at(config, 2).results is None
    folder = train(config).folder
    assert named(wandb, "log") == named(mlflow, "log_metrics") == rows_of(folder)
    first, second = named(wandb, "init")
    assert (first["project"], first["name"], first["dir"]) == ("project", "toy", str(folder))
    assert (first["id"], second["id"]) == (None, "w1")
    assert (first["config"]["optim"]["lr"], second["config"]) == (1e-3, None)
    assert ("*", "step") in named(wandb, "define_metric")
    assert named(wandb, "finish") == [75, 0]
    assert named(mlflow, "set_experiment") == ["project", "project"]
    assert named(mlflow, "start_run") == [{"id": None, "name": "toy"}, {"id": "m1", "name": "toy"}]
    assert named(mlflow, "end_run") == ["KILLED", "FINISHED"]
    params = {key: value for table in named(mlflow, "log_params") for key, value in table.items()}
    assert (params["optim.lr"], params["run.name"]) == (1e-3, "toy")
    assert len(params) == sum(map(len, named(mlflow, "log_params")))


def test_the_environment_names_another_project(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = fake_trackers.install(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "w")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "m")
    session(config)
    assert (named(wandb, "init")[0]["project"], named(mlflow, "set_experiment")) == ("w", ["m"])


def session(config: TrainConfig, error: Exception | None = None) -> Path:
    """Record three rows in a run's folder, and end with an error."""
    run = Run(config)
    with run.session():
        run.begin(0)
        for step in (1, 2, 3):
            run.record({"step": step, "loss": 0.5})
        if error is not None:
            raise error
    return run.folder


def test_an_error_ends_the_run_of_a_tracker_too(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = fake_trackers.install(monkeypatch)
    with pytest.raises(ValueError, match="broken"):
        session(config, ValueError("broken"))
    assert (named(wandb, "finish"), named(mlflow, "end_run")) == ([1], ["FAILED"])


@pytest.mark.parametrize("function", ["wandb.init", "wandb.log", "mlflow.start_run", "mlflow.log_metrics"])
def test_a_tracker_that_fails_is_reported_once_and_does_not_hinder(
    function: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        if name == function:
            raise ConnectionError("no route\nto host")

    wandb, mlflow = fake_trackers.install(monkeypatch, fail)
    folder = session(config)
    package, other = function.partition(".")[0], wandb if function.startswith("mlflow") else mlflow
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{package} gets no more rows (ConnectionError: no route to host); metrics.jsonl has all of them"
    ]
    assert len(rows_of(folder)) == 3
    assert len(named(other, "log" if other is wandb else "log_metrics")) == 3


def test_training_does_not_wait_for_a_tracker(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    fake_trackers.install(monkeypatch, lambda name: name == "wandb.log" and never.wait(600))
    assert len(rows_of(session(config))) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "wandb did not take all rows in 0 s; metrics.jsonl has them"
    ]
    never.set()


@pytest.mark.usefixtures("no_weights")
def test_a_tracker_that_is_not_installed_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder has its name, as wandb leaves one."""
    fake_trackers.install(monkeypatch)
    for missing in (None, ModuleType("mlflow")):
        if missing is not None:
            missing.__spec__ = ModuleSpec("mlflow", None)
        monkeypatch.setitem(sys.modules, "mlflow", missing)
        with pytest.raises(UserError) as caught:
            resolve_run(config)
        assert str(caught.value) == 'run.trackers: mlflow is not installed; pip install "lad_dist[trackers]"'


def test_trackers_may_change_when_a_run_resumes(world: World, tmp_path: Path, config: TrainConfig) -> None:
    Run(config.model_copy(update={"run": config.run.model_copy(update={"trackers": []})})).begin(0)
    Run(config)
    with pytest.raises(UserError, match=r"run\.trackers\.0: input should be 'wandb' or 'mlflow'"):
        lad(world, tmp_path, {"run.trackers": ["tensorboard"]})
