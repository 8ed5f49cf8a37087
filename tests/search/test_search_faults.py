"""Searches that lose the driver, a node or a process; trials of several processes on two nodes."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sweep
import tomli_w
from conftest import World
from launching import ROOT, ForkedScript, curves, wait_until
from ray import cloudpickle
from ray_cluster import RayCluster, ray_nodes
from toy_search import GOOD, tables, with_base

from lad_dist.cluster.workers import Report
from lad_dist.config.load import load_config
from lad_dist.config.search_schema import SearchConfig
from lad_dist.search.trial import Trial, TrialRunner
from lad_dist.search.tune import search

TUNE = ROOT / "launch" / "tune.py"
STORMS = 20 if sweep.enabled else 2
SECONDS = 300  # for a search to begin, or to end, on a busy machine

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the processes of trials have no path to tests

pytestmark = [pytest.mark.ray, pytest.mark.processes, pytest.mark.timeout(3600 if sweep.enabled else 900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_nodes(2) as nodes:
        yield nodes


@dataclass
class Work:
    """A search of four trials of sixteen steps, two at once, which save every other step."""

    folder: Path
    cluster: RayCluster

    def config(self, name: str, **changes: Any) -> Path:
        space = {"task.optim.lr": {"loguniform": [1e-3, GOOD]}, "task.run.seed": {"randint": [1, 9]}}
        options = {"name": name, "scheduler": "none", "cpus": 1, "retries": 3, **changes.pop("search", {})}
        tested = tables(self.folder, search=options, space=space, **changes)
        tested["override"] |= {"task.run.steps": 16, "task.run.watchdog_timeout": 20.0}
        file = self.folder / f"{name}.toml"
        file.write_text(tomli_w.dumps(tested))
        return file

    def start(self, config: Path) -> ForkedScript:
        variables = {"RAY_ADDRESS": self.cluster.address}
        return ForkedScript(TUNE, config, folder=self.folder / f"output-{config.stem}", variables=variables)

    def run(self, config: Path) -> None:
        """Run a search in this process, to the end."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", self.cluster.address)
            assert search(load_config(SearchConfig, config)) is not None

    def results(self, name: str) -> list[tuple[Any, ...]]:
        rows = json.loads((self.folder / name / "results.json").read_text())["trials"]
        return [(row["trial"], row["sample"], row["status"], row["step"], row["values"]) for row in rows]

    def events(self, name: str) -> int:
        record = self.folder / name / "trials.jsonl"
        return len(record.read_text().splitlines()) if record.exists() else 0


@pytest.fixture(scope="module")
def work(world: World, cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(with_base(world, tmp_path_factory.mktemp("faults")), cluster)


@pytest.fixture(scope="module")
def undisturbed(work: Work) -> list[tuple[Any, ...]]:
    work.run(work.config("undisturbed"))
    rows = work.results("undisturbed")
    assert [row[2:4] for row in rows] == [("completed", 16)] * 4
    return rows


@pytest.mark.parametrize("storm", range(STORMS))
def test_a_search_that_loses_process_node_and_driver_ends_as_if_nothing_had_happened(
    work: Work, undisturbed: list[tuple[Any, ...]], storm: int
) -> None:
    generator = random.Random(storm)
    name = f"storm{storm}"
    config = work.config(name)
    running = work.start(config)
    kinds = ["process", "node"]
    generator.shuffle(kinds)
    for kind in kinds:
        aim = work.events(name) + generator.randint(2, 6)
        wait_until(lambda aim=aim: work.events(name) >= aim or running.returncode is not None, SECONDS)
        time.sleep(generator.random())
        if running.returncode is not None:  # it ended before the blow
            break
        if kind == "node":
            work.cluster.lose_node()
            work.cluster.add_node()
        else:
            for process in work.cluster.workers[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    aim = work.events(name) + generator.randint(1, 6)
    wait_until(lambda: work.events(name) >= aim or running.returncode is not None, SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGKILL)
    running.communicate(SECONDS)
    work.run(config)
    assert work.results(name) == undisturbed


class DyingRunner(TrialRunner):
    """A trial kills the process that it runs in, as long as a file is there."""

    def run(self, trial: Trial, report: Report) -> None:
        if (Path(self.folder) / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        report({"status": "completed", "values": {"accuracy": 1.0}, "step": 8})


def test_what_is_lost_too_often_ends_with_75_and_the_same_command_goes_on(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", work.cluster.address)
    monkeypatch.chdir(work.folder)
    config = load_config(SearchConfig, work.config("lost", search={"retries": 1, "num_samples": 1}))
    (work.folder / "die").touch()
    assert search(config, DyingRunner) is None  # for `lad-dist tune`: 75
    assert "1 trial lost with process or node, the first is trial-000" in caplog.text
    (work.folder / "die").unlink()
    assert search(config, DyingRunner) is not None
    assert [row[2] for row in work.results("lost")] == ["completed"]


def rows(file: Path) -> list[dict[str, float]]:
    return [row for row in map(json.loads, file.read_text().splitlines()) if "loss" in row]


def test_a_trial_of_two_processes_on_two_nodes_is_the_run_of_deepspeed(work: Work) -> None:
    """Under ZeRO 1, also where one of the processes is lost midway.

    That ranks train as under `deepspeed` is in tests/cli/test_commands.py.
    """
    zero = {"task.deepspeed.zero_optimization.stage": 1}
    options = {"processes": 2, "placement_strategy": "STRICT_SPREAD", "num_samples": 1}
    config = work.config("two", search=options, override=zero)
    running = work.start(config)
    wait_until(lambda: work.events("two") >= 4, SECONDS)
    victims = [pid for pid in work.cluster.workers if b"_Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(victims[-1], signal.SIGKILL)
    _, error = running.communicate(SECONDS)
    assert running.returncode == 0, error
    folder, alone = work.folder / "two" / "trial-000", work.folder / "alone"
    results = json.loads((folder / "results.json").read_text())
    assert results["processes"] == 2
    tested = results["config"] | {"run": results["config"]["run"] | {"name": alone.name, "dir": str(work.folder)}}
    curves(work.folder / "ranks", {"alone": tested}, processes=2)
    pairs = zip(rows(folder / "metrics.jsonl"), rows(alone / "metrics.jsonl"), strict=True)
    assert all(one["loss"] == other["loss"] for one, other in pairs)
    assert results["metrics"] == json.loads((alone / "results.json").read_text())["metrics"]
