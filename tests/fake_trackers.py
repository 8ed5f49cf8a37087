"""Packages with the calls of wandb and mlflow that lad_dist makes. They record the calls, and reach no network."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Calls = list[tuple[str, Any]]


def install(patch: pytest.MonkeyPatch, before: Callable[[str], None] = lambda _: None) -> tuple[Calls, Calls]:
    """Put both packages where they are imported from; return the calls of each, by name.

    `before` is called before each call takes effect, with the package and the name of the function.
    """
    return _install_wandb(patch, before), _install_mlflow(patch, before)


def _module(patch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="fake")
    vars(module).update(functions)
    patch.setitem(sys.modules, name, module)


def _install_wandb(patch: pytest.MonkeyPatch, before: Callable[[str], None]) -> Calls:
    calls: Calls = []

    class Run:
        def __init__(self, run_id: str):
            self.id = run_id

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.append(("define_metric", (name, step_metric)))

        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            before("wandb.log")
            assert step is None  # W&B ignores a row of an earlier step
            calls.append(("log", data))

        def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
            calls.append(("finish", exit_code))

    def init(
        *,
        project: str | None = None,
        name: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        resume: str | None = None,
        config: dict[str, Any] | None = None,
        reinit: str | None = None,
    ) -> Run:
        before("wandb.init")
        assert (resume, reinit) == ("allow", "create_new")
        calls.append(("init", {"project": project, "name": name, "dir": dir, "id": id, "config": config}))
        return Run(id or "w1")

    _module(patch, "wandb", init=init)
    return calls


def _install_mlflow(patch: pytest.MonkeyPatch, before: Callable[[str], None]) -> Calls:
    calls: Calls = []

    def set_experiment(experiment_name: str | None = None, experiment_id: str | None = None) -> None:
        calls.append(("set_experiment", experiment_name))

    def start_run(
        run_id: str | None = None,
        experiment_id: str | None = None,
        run_name: str | None = None,
        nested: bool = False,
    ) -> Any:
        before("mlflow.start_run")
        calls.append(("start_run", {"id": run_id, "name": run_name}))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    def log_params(params: dict[str, Any], synchronous: bool | None = None) -> None:
        assert len(params) <= 100
        calls.append(("log_params", params))

    def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
        before("mlflow.log_metrics")
        calls.append(("log_metrics", {"step": step, **metrics}))

    def end_run(status: str = "FINISHED") -> None:
        calls.append(("end_run", status))

    functions = {"set_experiment": set_experiment, "start_run": start_run, "log_params": log_params}
    _module(patch, "mlflow", **functions, log_metrics=log_metrics, end_run=end_run)
    return calls
