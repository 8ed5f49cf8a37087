"""Searches: refusals before Ray starts, real searches on the toy world, and what goes on after an interruption."""

import json
import os
import re
import signal
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import sweep
import tomli_w
import torch
import toy
import toy_search
from conftest import World
from launching import ROOT, ForkedScript, launch, run_command, wait_until
from ray import cloudpickle
from ray_cluster import RayCluster, ray_nodes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_search import GOOD, GRID, HOPELESS, FunctionRunner, tables, with_base

from lad_dist.config.errors import UserError
from lad_dist.config.load import load_config, parse_config
from lad_dist.config.schema import TaskConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.distributed import processes
from lad_dist.search.metrics import student_sizes
from lad_dist.search.plan import plan_search
from lad_dist.search.record import SearchRecord
from lad_dist.search.results import SearchResult
from lad_dist.search.training_runner import TrainingRunner
from lad_dist.search.trial import TrialRunner
from lad_dist.search.trials import TrialBuilder
from lad_dist.search.tune import search
from lad_dist.training import run_spec, train
from lad_dist.training.results import RunResult
from lad_dist.training.trainer import RunStatus

TUNE = ROOT / "launch" / "tune.py"
SECONDS = 300  # for a search to begin, or to end, on a busy machine
SPACE = {"task.optim.lr": {"loguniform": [1e-6, 1e-1]}, "task.optim.warmup": {"uniform": [0.0, 0.9]}}

cloudpickle.register_pickle_by_value(toy_search)  # the processes of trials have no path to tests


@pytest.fixture
def work(world: World, tmp_path: Path) -> Path:
    return with_base(world, tmp_path)


def config_of(work: Path, **changes: Any) -> SearchConfig:
    return parse_config(SearchConfig, tables(work, **changes), "toy")


def complete(config: SearchConfig, runner_class: type[TrialRunner] = TrainingRunner) -> SearchResult:
    """Return the result of a search that runs to its end."""
    result = search(config, runner_class)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"task.optim.rl": {"uniform": [0.1, 0.2]}}}, "optim.rl: no such key; did you mean"),
        (
            {"override": {"task.data": {"micro_batch_per_step": 2}}},
            'data.micro_batch_per_step: no such key; did you mean "micro_batches_per_step"',
        ),
        ({"space": {"task.optim.lr": {"choice": ["much"]}}}, "optim.lr: input should be a valid number, not 'much'"),
        ({"space": {"task.data.max_length": {"uniform": [8, 32]}}}, "max_length: input should be a valid integer"),
        ({"search": {"metric": "pearson"}}, 'has no "pearson", it has accuracy, f1_macro, matthews'),
        ({"search": {"metric": ["accuracy", "latencies"]}}, 'has no "latencies".*did you mean "latency"'),
        ({"search": {"metric": ["accuracy", "latency"], "num_seeds": 2}}, "search.num_seeds: with several metrics"),
        ({"override": {"task.base": "nowhere.toml"}}, "nowhere.toml: cannot read the config"),
        ({"override": {"task.run.eval_every": 0}}, "set override.task.run.eval_every"),
        (
            {"space": {"task.data.dev": {"choice": ["dev.csv"]}}},
            "space.task.data.dev: scores of different tasks",
        ),
        ({"space": None}, r"give \[grid\] to compare every combination, or \[space\] to sample"),
        ({"grid": GRID}, r"give \[grid\] to compare every combination, or \[space\] to sample; one of the two"),
        ({"space": None, "grid": {"method": {}}}, "grid.method: give choices"),
        ({"space": None, "grid": {"method": {"a/b": {}}}}, "grid.method: give choices whose names are letters"),
        ({"space": None, "grid": {"method": {"kd": {"task.base": "nowhere.toml"}}}}, "nowhere.toml: cannot read"),
        ({"space": None, "grid": {"method": {"kd": {"objective.sort": 0.5}}}}, 'stage "objective" is unknown'),
        ({"space": None, "grid": GRID, "search": {"num_seeds": 2}}, r"search.num_seeds: goes with a \[space\]"),
        ({"search": {"processes": 3}}, "data.micro_batches_per_step = 4: cannot be shared out over 3 processes"),
    ],
)
def test_mistakes_are_refused_before_ray_starts(
    work: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match=message) as caught:
        search(config_of(work, **changes))
    assert "\n" not in str(caught.value)
    assert not (work / "s").exists()


def test_tables_and_dotted_keys_are_the_same(work: Path) -> None:
    (work / "search.toml").write_text(tomli_w.dumps(tables(work)))
    overrides = ["override.task.data.micro_batches_per_step=2", "space.task.optim.lr={uniform=[0.25,0.5]}"]
    plan = plan_search(load_config(SearchConfig, work / "search.toml", overrides))
    assert plan.space is not None
    for corner in plan.space.corners():
        config = TrialBuilder(plan.config).build("trial-000", corner.choices, corner.changes.items()).config
        assert (config.data.micro_batches_per_step, config.run.eval_every) == (2, 2)
        assert 0.25 <= config.optim.lr == corner.choices["task.optim.lr"] <= 0.5


@dataclass
class Searched:
    """A search of two rates: the base config's, which is good, and samples."""

    folder: Path
    config: Path
    done: subprocess.CompletedProcess[str]

    @property
    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return results

    @property
    def rates(self) -> dict[str, float]:
        return {row["trial"]: row["sample"]["task.optim.lr"] for row in self.results["trials"]}


@pytest.fixture(scope="module")
def searched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    work = with_base(world, tmp_path_factory.mktemp("search"))
    config = tables(work, search={"num_samples": 5}, override={"task.optim.lr": GOOD})
    (work / "tune.toml").write_text(tomli_w.dumps(config))
    searched = Searched(work / "s", work / "tune.toml", launch([TUNE, work / "tune.toml"]))
    assert searched.done.returncode == 0, searched.done.stderr
    return searched


@pytest.mark.ray
def test_trials_are_compared_at_their_training_steps(searched: Searched) -> None:
    rows = searched.results["trials"]
    assert len(rows) == 5
    assert set(searched.rates.values()) == {GOOD, HOPELESS}
    assert searched.rates["trial-000"] == GOOD  # the base config comes first
    steps = {row["trial"]: row["step"] for row in rows}
    assert {step for name, step in steps.items() if searched.rates[name] == GOOD} == {8}
    assert any(step < 8 for name, step in steps.items() if searched.rates[name] == HOPELESS)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert {row["status"] for row in rows} == {"completed", "stopped"}


@pytest.mark.ray
def test_a_person_reads_how_trials_ended_and_the_table_and_nothing_of_ray(searched: Searched) -> None:
    ended = re.compile(r"trial-00\d (completed|stopped) at step \d  accuracy \S+  lr \S+")
    status = re.compile(r"s: \d done, \d running, \d to come.*|  (best  )?trial-00\d  .*")
    for line in searched.done.stderr.splitlines():
        assert ended.fullmatch(line) or status.fullmatch(line), searched.done.stderr
    title, *table = searched.done.stdout.strip().splitlines()
    assert title.strip() == "s"
    assert "task.optim.lr" in table[1]
    best = searched.results["best"]
    assert table[-2:] == [
        f"best config: {searched.folder}/best.toml; lad-dist distill {searched.folder}/best.toml",
        f"best student: {searched.folder}/{best}/export",
    ]
    assert (searched.folder / best / "export" / "model.safetensors").exists()


@pytest.mark.ray
def test_trials_are_ordinary_runs(searched: Searched) -> None:
    for row in searched.results["trials"]:
        folder = searched.folder / row["trial"]
        if row["status"] == "stopped":
            assert not (folder / "results.json").exists()
            continue
        results = json.loads((folder / "results.json").read_text())
        assert (results["metrics"]["accuracy"], results["steps"]) == (row["score"], row["step"])
        assert results["student"]["parameters"] == row["values"]["parameters"]
        assert results["config"]["run"]["label"] == f"lad-{row['trial'][-3:]}"


@pytest.mark.ray
def test_tensorboard_has_the_hyper_parameters_of_each_trial(searched: Searched) -> None:
    events = EventAccumulator(str(searched.folder / "trial-000" / "tensorboard")).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert events.Scalars("hparam/accuracy")[0].value == pytest.approx(searched.results["trials"][0]["score"])


@pytest.mark.ray
def test_the_best_config_runs_and_scores_as_the_trial_did(searched: Searched) -> None:
    results = train.train(load_config(TaskConfig, searched.folder / "best.toml")).results
    best = searched.results["trials"][0]
    assert results is not None
    assert results["metrics"]["accuracy"] == best["score"]
    assert results["config"]["optim"]["lr"] == best["sample"]["task.optim.lr"]
    assert results["config"]["run"]["label"] == "lad"


@pytest.mark.ray
def test_a_complete_search_is_not_run_twice(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    overrides = ["search.max_concurrent=1", "search.retries=0", "search.num_samples=3"]
    result = complete(load_config(SearchConfig, searched.config, overrides))
    assert (result.trials, result.failed) == (searched.results["trials"], searched.results["failed"])
    with pytest.raises(UserError, match=r"holds a search with search.seed = 0, now it is 5"):
        search(load_config(SearchConfig, searched.config, ["search.seed=5"]))


@pytest.fixture(scope="module")
def node() -> Iterator[RayCluster]:
    with ray_nodes(1, cpus=4) as nodes:
        yield nodes


@pytest.fixture
def cluster(node: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches join one cluster: to start another one takes each of them ten seconds."""
    monkeypatch.setenv("RAY_ADDRESS", node.address)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_grid_runs_every_trial_to_the_end_and_is_compared(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tested = tables(work, search={"max_concurrent": 1}, override={"task.run.eval_every": 0}, space=None, grid=GRID)
    (work / "tune.toml").write_text(tomli_w.dumps(tested))
    assert run_command("tune", str(work / "tune.toml")) == 0
    assert f"lad-dist report {work}/s --out {work}/s/report" in capsys.readouterr().out
    rows = json.loads((work / "s" / "results.json").read_text())["trials"]
    assert sorted((row["trial"], row["metric"], row["step"]) for row in rows) == [
        (f"{method}-{seed}", "accuracy", 8) for method in ("lad", "pkd") for seed in (0, 1)
    ]
    assert not (work / "s" / "best.toml").exists()
    assert not (work / "s" / "teacher_cache").exists()
    assert run_command("report", str(work / "s")) == 0
    output = capsys.readouterr().out
    assert re.search(r"\| pkd .*\n\| lad |\| lad .*\n\| pkd ", output), output


def searched_function(work: Path, point: Sequence[Mapping[str, float]] = (), **options: Any) -> SearchResult:
    """Return the result of a search over the function of FunctionRunner, one trial at a time."""
    options = {"max_concurrent": 1, "scheduler": "none", **options}
    searched = tables(work, search=options, space=SPACE) | {"point": [*point]}
    return complete(parse_config(SearchConfig, searched, "toy"), FunctionRunner)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_tpe_finds_more_than_random(work: Path) -> None:
    """By the median over several seeds of the best of 20 samples."""
    seeds = 20 if sweep.enabled else 3
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for algorithm, scores in best.items():
        for seed in range(seeds):
            options = {"name": f"{algorithm}{seed}", "algorithm": algorithm, "seed": seed, "num_samples": 20}
            scores.append(searched_function(work, **options).trials[0]["score"])
    assert statistics.median(best["tpe"]) > statistics.median(best["random"])


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_more_samples_go_on_from_where_the_search_ended(work: Path) -> None:
    part = searched_function(work, name="grown", algorithm="tpe", num_samples=12)
    grown = searched_function(work, name="grown", algorithm="tpe", num_samples=16)
    whole = searched_function(work, name="whole", algorithm="tpe", num_samples=16)
    samples = [{row["trial"]: (row["sample"], row["score"]) for row in r.trials} for r in (part, grown, whole)]
    assert samples[1] == samples[2]
    assert samples[0].items() <= samples[1].items()
    assert len(samples[1]) == 16


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_points_come_after_the_base_config_and_the_best_samples_run_with_all_seeds(work: Path) -> None:
    point = {"task.optim.lr": 1e-3, "task.optim.warmup": 0.25}
    options = {"name": "seeds", "num_samples": 5, "num_seeds": 3, "finalists": 2}
    result = searched_function(work, **options, point=[point])
    assert [row["n"] for row in result.trials] == [3, 3, 1, 1, 1]
    assert [row["error"] for row in result.trials] == [0.0, 0.0, None, None, None]
    record = SearchRecord(work / "seeds" / "trials.jsonl")
    assert len(record.trials) == 5 + 2 * 2
    assert {trial.seed for trial in record.trials.values()} == {0, 1, 2}
    assert record.trials["trial-000"].sample == {"task.optim.lr": 1e-3, "task.optim.warmup": 0.1}  # the toy's
    assert record.trials["trial-001"].sample == point


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_stops_what_falls_behind_also_by_what_it_saw_in_an_earlier_session(
    scheduler: str, work: Path
) -> None:
    tested = {
        "search": {"scheduler": scheduler, "max_concurrent": 1, "num_samples": 10},
        "override": {"task.run.eval_every": 1, "task.optim.lr": 5e-4, "task.optim.warmup": 0.3},
        "space": {"task.optim.lr": {"loguniform": [1e-9, 1e-7]}, "task.optim.warmup": {"choice": [0.3]}},
    }
    statuses = []
    for count in (1, 10):  # the base config, which no sample comes near, is known from the first session
        tested["search"]["num_samples"] = count
        statuses = [row["status"] for row in complete(config_of(work, **tested), FunctionRunner).trials]
    assert statuses[0] == "completed"
    # ASHA keeps one in two at each rung; the rule of the median waits for three others, and keeps what is above it.
    assert statuses.count("stopped") >= {"asha": 4, "median": 1}[scheduler]


@pytest.mark.ray
def test_sizes_are_counted_before_training_as_after_it(searched: Searched, work: Path) -> None:
    plan = plan_search(config_of(work))
    trial = TrialBuilder(plan.config).build("trial-000", {}, ())
    values = searched.results["trials"][0]["values"]
    sizes = student_sizes(run_spec.resolve_run(trial.config))
    assert {name: sizes[name] for name in ("parameters", "flops")} == {
        name: pytest.approx(values[name]) for name in ("parameters", "flops")
    }
    assert sizes["bytes"] == pytest.approx(values["bytes"], rel=0.05)  # a file has a header


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_samples_above_a_limit_are_not_trained(work: Path) -> None:
    space = {"task.student.num_hidden_layers": {"choice": [1, 2]}}
    counts = []
    for layers in (1, 2):
        trial = TrialBuilder(config_of(work)).build("x", {}, {"task.student.num_hidden_layers": layers}.items())
        counts.append(student_sizes(run_spec.resolve_run(trial.config))["parameters"])
    limit = {"limit": {"parameters": sum(counts) / 2}}
    options = {"name": "limit", "scheduler": "none", "num_samples": 6, "max_concurrent": 1}
    override = {"task.student.num_hidden_layers": 1}
    tested = tables(work, search=options, space=space, override=override) | limit
    result = complete(parse_config(SearchConfig, tested, "toy"), FunctionRunner)
    assert [row["sample"]["task.student.num_hidden_layers"] for row in result.trials] == [1] * 6
    assert {row["status"] for row in result.failed} == {"refused"}
    assert all(f"above limit.parameters = {limit['limit']['parameters']:,.0f}" in row["error"] for row in result.failed)


def test_a_trial_that_was_asked_to_stop_is_no_result(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(work)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(train, "train", lambda config, report: RunResult(work, RunStatus.STOPPED))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    reports: list[dict[str, Any]] = []
    trial = TrialBuilder(config).build("trial-000", {}, ())
    TrainingRunner(config.search, ["accuracy"], str(work)).run(trial, reports.append)
    assert reports[-1]["status"] == "failed"
    assert "trial-000 was asked to stop" in reports[-1]["error"]
    assert processes.device().type == "cpu"  # as it asked for no GPU


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_trial_that_cannot_begin_ends_the_search_and_one_that_fails_later_does_not(work: Path) -> None:
    grid = {"term": {"hard": {}, "both": {"task.objective.hidden": 1.0}}}
    config = config_of(work, search={"name": "again", "max_concurrent": 1}, space=None, grid=grid)
    damaged = work / "again" / "hard" / "config.toml"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("[run")
    with pytest.raises(UserError, match=rf"^hard: {damaged}: damaged"):
        search(config)
    (damaged.parent / "metrics.jsonl").write_text("")  # now it is a run that began
    result = complete(config)
    assert ([row["trial"] for row in result.trials], [row["trial"] for row in result.failed]) == (["both"], ["hard"])
    damaged.unlink()
    (work / "again" / "results.json").unlink()
    result = complete(config)
    assert {row["trial"]: row["sample"]["term"] for row in result.trials} == {"hard": "hard", "both": "both"}
    assert not result.failed


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_time_limit_stops_the_search_which_then_goes_on(work: Path) -> None:
    limits = [{"hours": hours, "max_concurrent": 1} for hours in (1e-7, 1.0)]
    first, second = (config_of(work, search=limit, space=SPACE) for limit in limits)
    assert search(first, FunctionRunner) is None
    assert len(complete(second, FunctionRunner).trials) == 4


def pre_training(world: World, work: Path) -> dict[str, str]:
    """Return a stage that pre-trains by distillation on the toy corpus."""
    corpus = toy.corpus_config(work, world.corpus, world.pretrained, world.pretrained, objective={"name": "minilm"})
    (work / "corpus.toml").write_text(tomli_w.dumps(corpus))
    return {"name": "pretrain", "base": str(work / "corpus.toml")}


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_trials_share_a_pre_training_that_is_the_same(world: World, work: Path) -> None:
    """And a pre-training alone is searched by the loss on held-out text."""
    stages = [pre_training(world, work), {"name": "task", "base": str(work / "base.toml")}]
    override = {"task.student.path": "stage:pretrain", "pretrain.run.steps": 4}
    space = {"pretrain.optim.lr": {"choice": [1e-3, 2e-3]}, "task.optim.lr": {"uniform": [1e-4, GOOD]}}
    options = {"scheduler": "none", "num_samples": 5, "metric": ["accuracy", "latency", "parameters"]}
    tested = tables(work, search=options, override=override, space=space) | {"stage": stages}
    result = complete(parse_config(SearchConfig, tested, "toy"))
    rates = {row["sample"]["pretrain.optim.lr"] for row in result.trials}
    assert len(list((work / "s" / "stages").iterdir())) == len(rates) == 2
    assert {row["status"] for row in result.trials} == {"completed"}
    assert all(row["values"]["latency"] > 0 for row in result.trials)
    assert result.front
    assert result.best is None

    options = {"name": "loss", "scheduler": "none", "num_samples": 2, "metric": "loss", "max_concurrent": 1}
    space = {"pretrain.optim.lr": {"loguniform": [1e-9, 1e-8]}}
    override = {"pretrain.run.steps": 4, "pretrain.run.eval_every": 2}
    tested = tables(work, search=options) | {"stage": stages[:1], "override": override, "space": space}
    result = complete(parse_config(SearchConfig, tested, "toy"))
    assert result.best == result.trials[0]["trial"]
    assert [row["score"] for row in result.trials] == sorted(row["score"] for row in result.trials)


def marked(mark: str) -> list[str]:
    """Command lines of this host's processes that inherited the variable MARK=`mark`."""
    command_lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                command_lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return command_lines


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGTERM, *([signal.SIGUSR1] if sweep.enabled else [])])
def test_an_interrupted_search_leaves_nothing_behind_and_goes_on_in_order(work: Path, number: signal.Signals) -> None:
    """Seeds are the last axis of a grid: interrupted, it is at all times a whole grid of fewer seeds."""
    seeds = {"0": 0, "1": 0, "2": 1}  # the first two trials are one, with and without an interruption
    grid = {"seed": {trial: {"task.run.seed": seed} for trial, seed in seeds.items()}}
    config = tables(work, search={"max_concurrent": 1}, space=None, grid=grid)
    config["override"] |= {"task.run.steps": 16, "task.optim.lr": GOOD}
    (work / "tune.toml").write_text(tomli_w.dumps(config))
    record = work / "s" / "trials.jsonl"

    running = ForkedScript(TUNE, work / "tune.toml", folder=work / "first", variables={"MARK": str(work)})
    wait_until(lambda: record.exists() and '"step": 4' in record.read_text(), SECONDS)
    # As `timeout` does, SIGTERM goes to Ray's processes too, as far as they are of the same group.
    (os.killpg if number == signal.SIGTERM else os.kill)(running.pid, number)
    out, error = running.communicate(SECONDS)
    assert (running.returncode, out) == (75, "s: stopped early; run the same command again to go on\n"), error
    wait_until(lambda: not marked(str(work)), 20)
    assert not (work / "s" / "0" / "results.json").exists()
    before = len(record.read_text().splitlines())

    running = ForkedScript(TUNE, work / "tune.toml", folder=work / "second")
    out, error = running.communicate(SECONDS)
    assert running.returncode == 0, error
    events = [json.loads(line) for line in record.read_text().splitlines()]
    assert [event["trial"] for event in events if event["event"] == "end"] == ["0", "1", "2"]
    assert min(event["step"] for event in events[before:] if event["trial"] == "0" and "step" in event) > 2
    trials = json.loads((work / "s" / "results.json").read_text())["trials"]
    assert {(row["trial"], row["step"]) for row in trials} == {("0", 16), ("1", 16), ("2", 16)}
    scores = {row["trial"]: row["score"] for row in trials}
    assert scores["0"] == scores["1"]
