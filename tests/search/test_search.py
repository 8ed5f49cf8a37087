"""Searches: refusals before Ray starts, samples of trials, and real searches on the toy world."""

import itertools
import json
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import tomli_w
import torch
import toy
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT, environment, launch, wait_until

from lad_dist.config.errors import Fault, UserError
from lad_dist.config.load import load_config, parse_config
from lad_dist.config.schema import SearchConfig, TaskConfig
from lad_dist.distributed import processes
from lad_dist.models import loading
from lad_dist.models.loading import save_model
from lad_dist.search.grid import sample_trials
from lad_dist.search.tune import _run_trial, _TrialLogger, search
from lad_dist.training import train
from lad_dist.training.results import RunResult
from lad_dist.training.trainer import RunStatus
from lad_dist.utils import progress

TUNE = ROOT / "launch" / "tune.py"
GOOD, HOPELESS = 6e-3, 1e-9
DEEPER_THAN_THE_MODEL = 9
SEED_SEARCHED = 7
GRID = {"method": {"pkd": {"objective.name": "pkd"}, "lad": {}}, "seed": {"0": {"run.seed": 0}, "1": {"run.seed": 1}}}


def tables(work: Path, **changes: Any) -> dict[str, Any]:
    """Four trials, two at once; the changes by table."""
    options = {"name": "s", "dir": str(work), "base": str(work / "base.toml"), "metric": "accuracy", "num_samples": 4}
    default: dict[str, Any] = {
        "search": {**options, "max_concurrent": 2, "cpus": 0.5, "reduction_factor": 2},
        "override": {"run.eval_every": 2},
        "space": {"optim.lr": {"choice": [HOPELESS, GOOD]}},
    }
    merged = {name: {**default.get(name, {}), **(changes.get(name) or {})} for name in default | changes}
    return {name: table for name, table in merged.items() if changes.get(name, {}) is not None}


@pytest.fixture
def work(world: World, tmp_path: Path) -> Path:
    return with_base(world, tmp_path)


def with_base(world: World, folder: Path) -> Path:
    """A task in which nearly all say yes, and a student that says no until it learns anything at all."""
    files = {"train": str(folder / "train.csv"), "dev": str(folder / "dev.csv")}
    for file, count in zip(files.values(), (64, 24), strict=True):
        rows = (f"{toy.sentence(count + n, most=6)},{toy.LABELS[n % 12 > 0]}\n" for n in range(count))
        Path(file).write_text("text,label\n" + "".join(rows))
    base = toy.task_config(folder, files, world.teacher, denying(world, folder / "student"))
    base["objective"] = {"name": "lad", "hidden": 0.0, "soft": 0.0, "hard": 1.0}
    (folder / "base.toml").write_text(tomli_w.dumps(base))
    return folder


def denying(world: World, folder: Path) -> Path:
    path = toy.model(folder, world.tokenizer, "classification", toy.LABELS)
    student = loading.load_model(str(path), "classification", labels=toy.LABELS)
    with torch.no_grad():
        student.classifier.weight.zero_()
        student.classifier.bias.copy_(torch.tensor([1e-3, 0.0]))
    save_model(student, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"optim.rl": {"uniform": [0.1, 0.2]}}}, "optim.rl: no such key; did you mean"),
        ({"space": {"objective.hiden": {"choice": [1.0]}}}, 'hiden: no such key; did you mean "hidden"'),
        (
            {"override": {"data": {"micro_batch_per_step": 2}}},
            'data.micro_batch_per_step: no such key; did you mean "micro_batches_per_step"',
        ),
        ({"space": {"optim.lr": {"loguniforn": [0.1, 0.2]}}}, 'unknown: did you mean "loguniform"'),
        ({"space": {"optim.lr": {"loguniform": [0.0, 0.2]}}}, "the low end must be above 0"),
        ({"space": {"optim.lr": {"uniform": [0.2, 0.1]}}}, r"give \[low, high\] with low < high"),
        ({"space": {"data.micro_batches_per_step": {"randint": [1, 2.5]}}}, r"give \[low, high\] with low < high"),
        ({"space": {"optim.lr": {"choice": []}}}, "give a list"),
        ({"space": {"optim.lr": {"choice": ["much"]}}}, "optim.lr: input should be a valid number, not 'much'"),
        ({"search": {"metric": "pearson"}}, 'no "pearson", it has accuracy, f1_macro, matthews'),
        ({"search": {"base": "nowhere.toml"}}, "nowhere.toml: cannot read the config"),
        ({"override": {"run.eval_every": 0}}, "set override.run.eval_every"),
        ({"space": {"data.dev": {"choice": ["dev.csv"]}}}, "space.data.dev: scores of different tasks cannot"),
        ({"space": None}, r"give \[grid\], \[space\] or both"),
        ({"space": None, "grid": GRID}, r"num_samples = 4: add a \[space\] to draw"),
        ({"grid": {"method": {}}}, "grid.method: give choices"),
        ({"grid": {"method": {"a/b": {}}}}, "grid.method: give choices whose names are letters"),
        ({"grid": {"method": {"kd": {"base": "nowhere.toml"}}}}, "nowhere.toml: cannot read the config"),
        ({"grid": {"method": {"kd": {"objective.sort": 0.5}}}}, 'sort: no such key; did you mean "soft"'),
    ],
)
def test_mistakes_are_refused_before_ray_starts(
    work: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match=message) as caught:
        search(parse_config(SearchConfig, tables(work, **changes), "toy"))
    assert "\n" not in str(caught.value)
    assert not (work / "s").exists()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), low=st.floats(1e-9, 1.0), ratio=st.floats(1.01, 1e6), count=st.integers(2, 12))
def test_a_sample_is_a_function_of_seed_trial_and_key(seed: int, low: float, ratio: float, count: int) -> None:
    base = toy.task_config(Path("runs"), {"train": "a.csv", "dev": "b.csv"}, Path("teacher"), Path("student"))
    folder = Path(tempfile.mkdtemp())
    (folder / "base.toml").write_text(tomli_w.dumps(base))

    def sample(samples: int, **more: Any) -> list[dict[str, Any]]:
        space = {
            "optim.lr": {"loguniform": [low, low * ratio]},
            "data": {"micro_batches_per_step": {"randint": [1, 4]}},
            "student.layers": {"choice": [[1, 3], [2, 4], "first"]},
            **more,
        }
        search_tables = tables(folder, search={"num_samples": samples, "seed": seed})
        return [
            trial.sample
            for trial in sample_trials(parse_config(SearchConfig, {**search_tables, "space": space}, "toy"))
        ]

    samples = sample(count)
    assert samples == sample(count + 3)[:count]
    wider = sample(count, **{"optim.warmup": {"uniform": [0.1, 0.2]}})
    assert samples == [{key: row[key] for key in row if key != "optim.warmup"} for row in wider]
    assert all(low <= row["optim.lr"] * (1 + 1e-9) and row["optim.lr"] <= low * ratio * (1 + 1e-9) for row in samples)
    assert {row["data.micro_batches_per_step"] for row in samples} <= {1, 2, 3}


def test_tables_and_dotted_keys_are_the_same(work: Path) -> None:
    (work / "search.toml").write_text(tomli_w.dumps(tables(work)))
    overrides = ["override.data.micro_batches_per_step=2", "space.optim.lr={uniform=[0.25,0.5]}"]
    config = load_config(SearchConfig, work / "search.toml", overrides)
    for trial in sample_trials(config):
        assert (trial.config.data.micro_batches_per_step, trial.config.run.eval_every) == (2, 2)
        assert trial.config.data.micro_batch_size == 4
        assert 0.25 <= trial.config.optim.lr == trial.sample["optim.lr"] <= 0.5


def test_a_grid_is_every_combination_each_with_the_same_samples(work: Path) -> None:
    (work / "other.toml").write_text(
        tomli_w.dumps(load_config(TaskConfig, work / "base.toml").model_dump(exclude_none=True))
    )
    grid = {**GRID, "start": {"own": {"student.path": "teacher"}, "other": {"base": str(work / "other.toml")}}}
    space = {"optim.lr": {"uniform": [0.1, 0.2]}}
    config = parse_config(
        SearchConfig, tables(work, search={"num_samples": 2}, space=None, grid=grid) | {"space": space}, "toy"
    )
    trials = {trial.config.run.name: trial for trial in sample_trials(config)}
    combinations = itertools.product(("lad", "pkd"), "01", ("other", "own"), "01")
    assert sorted(trials) == ["-".join(choices) for choices in combinations]
    assert list(trials)[:3] == ["pkd-0-own-0", "pkd-0-own-1", "lad-0-own-0"]  # the first axis turns fastest
    for name, trial in trials.items():
        method, seed, start, number = name.split("-")
        assert trial.sample | {"method": method, "seed": seed, "start": start} == trial.sample
        assert (trial.config.objective.name, trial.config.run.seed) == (method, int(seed))
        assert trial.config.teacher is not None
        assert (trial.config.student.path == trial.config.teacher.path) == (start == "own")
        assert trial.config.teacher.cache == str(work / "s" / "teacher_cache")
        assert trial.sample["optim.lr"] == trials[f"pkd-0-own-{number}"].sample["optim.lr"]
    assert trials["pkd-0-own-0"].sample["optim.lr"] != trials["pkd-0-own-1"].sample["optim.lr"]


def labels(work: Path, **changes: Any) -> set[str]:
    """Return the labels of the trials."""
    config = parse_config(SearchConfig, tables(work, **changes), "toy")
    return {trial.config.label for trial in sample_trials(config)}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, {"pkd", "lad"}),
        ({"start": {"own": {}, "to": {"student": {"path": "teacher"}}}}, {"pkd-own", "lad-own", "pkd-to", "lad-to"}),
        ({"task": {"a": {"data.dev": "a.csv", "optim.lr": 0.1}, "b": {"data": {"dev": "b.csv"}}}}, {"pkd", "lad"}),
        ({"again": {"no": {}, "yes": {"run.seed": 1}}}, {"pkd", "lad"}),
        ({"data": {"all": {}, "half": {"data.train": "half.csv"}}}, {"pkd-all", "lad-all", "pkd-half", "lad-half"}),
        ({"method": {"kd_0": {"run.seed": 0}, "lad_0": {"run.seed": 0, "objective.soft": 1.0}}}, {"kd_0", "lad_0"}),
    ],
)  # fmt: skip
def test_a_label_has_the_choices_but_for_task_and_seed(work: Path, axes: dict[str, Any], expected: set[str]) -> None:
    single = {"search": {"num_samples": 1}, "space": None}
    assert labels(work, **single, grid={**GRID, **axes}) == expected
    assert labels(work, **single, grid={**GRID, **axes}, override={"run.label": "ours"}) == expected


def test_a_label_without_choices_is_that_of_the_config_and_the_number_of_the_sample(work: Path) -> None:
    seeds = {"seed": GRID["seed"]}
    assert labels(work, search={"num_samples": 1}, space=None, grid=seeds) == {"lad"}
    assert labels(work, search={"num_samples": 2}, grid=seeds) == {"lad-0", "lad-1"}
    assert labels(work, search={"num_samples": 2}, grid=seeds, override={"run.label": "ours"}) == {"ours-0", "ours-1"}
    assert labels(work, search={"num_samples": 2}, grid=GRID) == {"lad-0", "lad-1", "pkd-0", "pkd-1"}


@pytest.mark.ray
def test_a_grid_runs_every_trial_to_the_end_and_is_compared(work: Path) -> None:
    tested = tables(work, search={"num_samples": 1}, override={"run.eval_every": 0}, space=None, grid=GRID)
    (work / "tune.toml").write_text(tomli_w.dumps(tested))
    done = launch([TUNE, work / "tune.toml"])
    assert done.returncode == 0, done.stderr
    rows = json.loads((work / "s" / "results.json").read_text())["trials"]
    assert sorted((row["trial"], row["metric"], row["step"]) for row in rows) == [
        (f"{method}-{seed}", "accuracy", 8) for method in ("lad", "pkd") for seed in (0, 1)
    ]
    assert not (work / "s" / "best.toml").exists()
    assert not (work / "s" / "teacher_cache").exists()
    assert f"lad-dist report {work}/s --out {work}/s/report" in done.stdout
    compared = launch(["-m", "lad_dist.cli", "report", work / "s"])
    assert compared.returncode == 0, compared.stderr
    assert re.search(r"\| pkd .*\n\| lad |\| lad .*\n\| pkd ", compared.stdout), compared.stdout


@dataclass
class Searched:
    folder: Path
    config: Path
    done: subprocess.CompletedProcess[str]

    @property
    def results(self) -> dict[str, Any]:
        tables: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return tables


@pytest.fixture(scope="module")
def searched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Two trials that learn, then one that does not, and one that cannot start."""
    work = with_base(world, tmp_path_factory.mktemp("search"))
    space = {"student.num_hidden_layers": {"choice": [2, DEEPER_THAN_THE_MODEL]}}
    config = tables(work, search={"seed": SEED_SEARCHED}, space=space)
    samples = [trial.sample for trial in sample_trials(parse_config(SearchConfig, config, "toy"))]
    assert [row["optim.lr"] for row in samples[:3]] == [GOOD, GOOD, HOPELESS]
    assert [row["student.num_hidden_layers"] for row in samples] == [2, 2, 2, DEEPER_THAN_THE_MODEL]
    (work / "tune.toml").write_text(tomli_w.dumps(config))
    return Searched(work / "s", work / "tune.toml", launch([TUNE, work / "tune.toml"]))


@pytest.mark.ray
def test_trials_are_compared_at_their_training_steps(searched: Searched) -> None:
    assert searched.done.returncode == 0, searched.done.stderr
    rows = searched.results["trials"]
    assert {row["trial"]: row["step"] for row in rows} == {"trial-0": 8, "trial-1": 8, "trial-2": 2}
    assert rows[-1]["trial"] == "trial-2"
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


@pytest.mark.ray
def test_a_failed_trial_is_counted_and_reported(searched: Searched) -> None:
    (failed,) = searched.results["failed"]
    assert failed["trial"] == "trial-3"
    assert "student.num_hidden_layers = 9" in failed["error"]
    assert f"1 of 4 trials failed; trial-3: {failed['error']}" in searched.done.stdout
    assert "UserError" in (searched.folder / "ray" / "trial-3" / "error.txt").read_text()


@pytest.mark.ray
def test_failed_trials_run_again_once_the_results_are_removed(work: Path) -> None:
    grid = {"term": {"hard": {}, "both": {"objective.hidden": 1.0}}}
    options = {"num_samples": 1, "name": "again", "dir": str(work)}
    config = parse_config(SearchConfig, tables(work, search=options, space=None, grid=grid), "toy")
    damaged = work / "again" / "both" / "config.toml"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("[run")
    result = search(config)
    assert result is not None
    assert ([row["trial"] for row in result.trials], [row["trial"] for row in result.failed]) == (["hard"], ["both"])
    assert f"{damaged}: damaged" in result.failed[0]["error"]
    damaged.unlink()
    (work / "again" / "results.json").unlink()
    result = search(config)
    assert result is not None
    assert {row["trial"]: row["term"] for row in result.trials} == {"hard": "hard", "both": "both"}
    assert not result.failed


@pytest.mark.ray
def test_a_person_reads_the_evaluations_and_the_table_and_nothing_of_ray(searched: Searched) -> None:
    for line in searched.done.stderr.splitlines():
        assert re.fullmatch(r"trial-\d (step \d  accuracy \S+|failed)", line), searched.done.stderr
    title, *table = searched.done.stdout.strip().splitlines()
    assert title.strip() == "s"
    assert "optim.lr" in table[1]
    assert table[-1].startswith("best config: ")
    assert len(table) == 4 + 3 + 2  # rules and header, three trials, what failed and what is best


@pytest.mark.ray
def test_progress_counts_the_trials_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[Any, ...]] = []
    monkeypatch.setattr(progress, "_reporter", lambda *report: reports.append(report))
    running, ended = (SimpleNamespace(is_finished=lambda done=done: done, config={"number": 0}) for done in (0, 1))
    callback = _TrialLogger("search", ["a", "b"], ["accuracy"] * 2)
    for function in (callback.on_trial_start, callback.on_trial_complete, callback.on_trial_error):
        function(1, [running, ended], running)
    assert reports == [("search", 1, 2, "trials"), ("search", 2, 2, "trials"), ("search", 2, 2, "trials")]


def test_trials_are_ordinary_runs(searched: Searched) -> None:
    for name in ("trial-0", "trial-1"):
        results = json.loads((searched.folder / name / "results.json").read_text())
        (row,) = (row for row in searched.results["trials"] if row["trial"] == name)
        assert (results["metrics"]["accuracy"], results["steps"]) == (row["score"], row["step"])
        assert (searched.folder / name / "export" / "model.safetensors").exists()
    stopped = searched.folder / "trial-2"
    assert [json.loads(row)["step"] for row in (stopped / "metrics.jsonl").read_text().splitlines()][-1] < 8
    assert not (stopped / "results.json").exists()


@pytest.mark.ray
def test_the_best_config_runs_and_scores_as_the_trial_did(searched: Searched) -> None:
    done = launch([ROOT / "launch" / "task_distill.py", searched.folder / "best.toml"])
    assert done.returncode == 0, done.stderr
    results = json.loads((searched.folder / "best" / "results.json").read_text())
    best = searched.results["trials"][0]
    assert results["metrics"]["accuracy"] == best["score"]
    assert results["config"]["optim"]["lr"] == best["optim.lr"]
    assert results["config"]["run"]["label"] == "lad"


@pytest.mark.ray
def test_a_complete_search_is_not_run_twice(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    result = search(load_config(SearchConfig, searched.config))
    assert result is not None
    assert {"trials": result.trials, "failed": result.failed} == searched.results
    with pytest.raises(UserError, match=r"holds a search with search.num_samples = 4, now it is 5"):
        search(load_config(SearchConfig, searched.config, ["search.num_samples=5"]))


def test_a_trial_that_fits_nowhere_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}]
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(UserError, match="no node can hold such a trial, the largest has 8 CPUs and 1 GPUs"):
        search(parse_config(SearchConfig, tables(work, search={"cpus": 4, "gpus": 1}), "toy"))
    assert not (work / "s").exists()


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


def started(command: list[Path], mark: Path) -> subprocess.Popen[str]:
    """Start a script, in processes that inherit MARK."""
    arguments = [sys.executable, *map(str, command)]
    variables = environment() | {"MARK": str(mark)}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=variables, text=True, stdout=pipe, stderr=pipe)


def test_a_trial_that_was_asked_to_stop_is_no_result(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(SearchConfig, tables(work), "toy")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(train, "train", lambda config, report: RunResult(work, RunStatus.STOPPED))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Fault, match="trial-0 was asked to stop"):
        _run_trial(config.search, sample_trials(config)[0].config, "accuracy")
    assert processes.device().type == "cpu"  # as it asked for no GPU


@pytest.mark.ray
def test_an_interrupted_search_leaves_nothing_behind_and_goes_on(work: Path) -> None:
    config = tables(work, search={"num_samples": 2, "max_concurrent": 1}, space={"optim.lr": {"choice": [GOOD]}})
    config["override"] |= {"run.save_every": 2, "run.steps": 16}
    (work / "tune.toml").write_text(tomli_w.dumps(config))
    command = [TUNE, work / "tune.toml"]

    running = started(command, work)
    assert running.stderr is not None
    assert running.stderr.readline().startswith("trial-0 step 2 ")
    (ray_folder,) = set(re.findall(r"/tmp/ray-\w+", " ".join(marked(str(work)))))
    assert running.stderr.readline().startswith("trial-0 step 4 ")
    running.send_signal(signal.SIGUSR1)
    out, error = running.communicate(timeout=120)
    assert (running.returncode, out) == (75, "s: stopped early; run the same command again to go on\n"), error
    wait_until(lambda: not marked(str(work)), 20)
    assert not Path(ray_folder).exists()
    assert not (work / "s" / "trial-0" / "results.json").exists()

    done = launch(command)
    assert done.returncode == 0, done.stderr
    assert "trial-0 step 2 " not in done.stderr  # it went on from a checkpoint
    trials = json.loads((work / "s" / "results.json").read_text())["trials"]
    assert [(row["trial"], row["step"]) for row in trials] == [("trial-0", 16), ("trial-1", 16)]
    assert trials[0]["score"] == trials[1]["score"]


@pytest.mark.ray
def test_an_interrupted_grid_goes_on_in_order(work: Path) -> None:
    """So that, its seeds being last, it is at all times a whole one of fewer seeds."""
    grid = {"seed": {str(seed): {"run.seed": seed} for seed in range(6)}}
    options = {"num_samples": 1, "max_concurrent": 1}
    config = tables(work, search=options, override={"run.eval_every": 0}, space=None, grid=grid)
    (work / "tune.toml").write_text(tomli_w.dumps(config))
    running = started([TUNE, work / "tune.toml"], work)
    assert running.stderr is not None
    assert running.stderr.readline().startswith("0 step 8 ")
    running.send_signal(signal.SIGUSR1)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 75, error
    done = launch([TUNE, work / "tune.toml"])
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == list(grid["seed"])
