"""`lad-dist plan` of a search: the sum over trials, shared stages, and stages whose models are not there yet."""

import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toy
from conftest import World
from hypothesis import given
from hypothesis import strategies as st
from launching import run_command

from lad_dist.cli import search_costs
from lad_dist.cli.commands.plan import gpu_hours
from lad_dist.cli.search_costs import Machine, wall_seconds
from lad_dist.config.load import load_config
from lad_dist.config.schema import StudentConfig, TaskConfig
from lad_dist.training import cost_model, run_spec
from lad_dist.utils.text import byte_size, duration

GPU = ["--gpu", "a100-40"]


def write(file: Path, tables: dict[str, Any]) -> str:
    file.write_text(tomli_w.dumps(tables))
    return str(file)


@pytest.fixture
def bases(world: World, tmp_path: Path) -> dict[str, str]:
    """A pre-training and a task that begins with a whole model."""
    corpus = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    alone = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    task = alone | {"student": {"path": "stage:pretrain"}}
    files = {"pretrain": corpus, "task": task, "alone": alone}
    return {name: write(tmp_path / f"{name}.toml", tables) for name, tables in files.items()}


def plan_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tables: dict[str, Any], *arguments: str, code: int = 0
) -> str:
    """Return what the command prints about a search, or the complaint, each run of spaces as one."""
    search = {"name": "s", "dir": str(tmp_path / "runs"), "gpus": 1.0, **tables.pop("search", {})}
    file = write(tmp_path / "search.toml", {"search": search, **tables})
    assert run_command("plan", file, *GPU, *arguments) == code
    output = capsys.readouterr()
    assert not (tmp_path / "runs").exists()
    return re.sub(r"[ │]+", " ", output.out if code == 0 else output.err)


def stages(bases: dict[str, str], *names: str) -> list[dict[str, str]]:
    return [{"name": name, "base": bases[name]} for name in names]


SPACE = {"alone.optim.lr": {"uniform": [0.1, 0.2]}}
DRAWN = {"pretrain.optim.lr": {"uniform": [0.1, 0.2]}, "task.optim.lr": {"uniform": [0.1, 0.2]}}
NO_STOPPING = {"scheduler": "none"}


def test_a_space_costs_all_samples(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"search": {"num_samples": 5, **NO_STOPPING}, "stage": stages(bases, "alone"), "space": SPACE}
    output = plan_of(tmp_path, capsys, tables, "--gpus", "2")
    assert "stage alone on 1 x 1 a100-40" in output
    for row in ("parameters", "memory per GPU", "time"):
        assert f" {row} " in output
    assert " trials 5 \n at once 2; processes of each: 1, GPUs of a process: 1 \n trainings alone 5 \n" in output


def test_gpu_hours_and_wall_time(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """7 trials of 2 processes at half a GPU each, at most 3 at once: 3 rounds, then 2 repetitions in one."""
    options = {"num_samples": 7, "num_seeds": 2, "finalists": 2, "max_concurrent": 3, "processes": 2, "gpus": 0.5}
    tables = {"search": options | NO_STOPPING, "stage": stages(bases, "alone"), "space": SPACE}
    machine = Machine("a100-40", 2, share=0.5, mfu=1e-9)
    spec = run_spec.resolve_run(parse_task(bases["alone"]), 2)
    costs = cost_model.estimate(spec, 2)
    seconds = costs.flops / (19.5e12 * 1e-9)  # on one GPU: two halves
    run = machine.estimate(parse_task(bases["alone"]))
    assert (run.seconds, run.gpu_hours) == (pytest.approx(seconds), pytest.approx(seconds / 3600))
    output = plan_of(tmp_path, capsys, tables, "--gpus", "8", "--mfu", "1e-9")
    assert " trials 7, and 2 of the best with further seeds " in output
    assert f" GPU-hours {gpu_hours(9 * seconds / 3600)} if none is stopped" in output
    assert f" wall time {duration(4 * seconds)} if none is stopped" in output
    assert f" disk checkpoints {byte_size(9 * 3 * costs.checkpoint)}, exports {byte_size(9 * costs.export)} " in output


def parse_task(file: str) -> TaskConfig:
    return load_config(TaskConfig, file)


@pytest.mark.parametrize(
    ("space", "seeds", "trainings"),
    [
        ({"task.optim.lr": {"uniform": [0.1, 0.2]}}, 1, "pretrain 1, task 4"),
        (DRAWN, 1, "pretrain 4, task 4"),
        ({"task.optim.lr": {"uniform": [0.1, 0.2]}}, 3, "pretrain 3, task 10"),
        (DRAWN, 3, "pretrain 10, task 10"),
    ],
)
def test_a_stage_that_samples_share_counts_once(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], space: Any, seeds: int, trainings: str
) -> None:
    options = {"num_samples": 4, "num_seeds": seeds, **NO_STOPPING}
    tables = {"search": options, "stage": stages(bases, "pretrain", "task"), "space": space}
    output = plan_of(tmp_path, capsys, tables, "--gpus", "4")
    assert f" trainings {trainings} \n" in output
    assert "not estimated" not in output  # the task's student is as large as the pre-training's


def test_a_grid_is_the_sum_over_all_trials(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lengths and three seeds: two estimates."""
    grid = {
        "steps": {"short": {"alone.run.steps": 4}, "long": {"alone.run.steps": 8}},
        "seed": {str(seed): {"alone.run.seed": seed} for seed in range(3)},
    }
    estimated = []
    estimate = search_costs.cost_model.estimate
    monkeypatch.setattr(
        search_costs.cost_model, "estimate", lambda spec, count: estimated.append(count) or estimate(spec, count)
    )
    output = plan_of(tmp_path, capsys, {"stage": stages(bases, "alone"), "grid": grid}, "--gpus", "6", "--mfu", "1e-9")
    assert estimated == [1, 1]
    machine, config = Machine("a100-40", 1, mfu=1e-9), parse_task(bases["alone"])
    short = config.model_copy(update={"run": config.run.model_copy(update={"steps": 4})})
    seconds = [machine.estimate(each).seconds for each in (short, config)]
    assert " trials 6 \n at once 6;" in output
    assert f" GPU-hours {gpu_hours(3 * sum(seconds) / 3600)} if" in output
    assert f" wall time {duration(max(seconds))} if" in output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pretrain.compression": [{"name": "low_rank", "keep": 0.5}]}, "it begins with what pretrain exports (compr"),
        ({"task.teacher.path": "stage:pretrain"}, "it begins with what pretrain exports (the teacher is a new or a"),
    ],
)
def test_what_cannot_be_estimated_is_named(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    tables = {
        "search": {"num_samples": 2, **NO_STOPPING},
        "stage": stages(bases, "pretrain", "task"),
        "override": changes,
        "space": {"task.optim.lr": {"uniform": [0.1, 0.2]}},
    }
    output = plan_of(tmp_path, capsys, tables, "--gpus", "1")
    assert "stage pretrain on 1 x 1 a100-40" in output
    assert f"stage task: not estimated: {reason}" in output
    assert " GPU-hours at least " in output
    assert " not estimated 2 trainings: it begins with what pretrain exports" in output


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 2),
        ({"num_hidden_layers": 1}, 1),
        ({"layers": [2]}, 1),
        ({"tokenizer": "words", "dropout": 0.5}, 2),
    ],
)
def test_a_student_is_as_large_as_what_is_exported(world: World, tmp_path: Path, changes: Any, size: int) -> None:
    source = toy.parsed(toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained))
    student = search_costs.exported_student(source, StudentConfig.model_validate({"path": "stage:a", **changes}))
    assert (student.path, student.num_hidden_layers) == (str(world.pretrained), size)
    assert (student.tokenizer, student.dropout) == (changes.get("tokenizer"), changes.get("dropout"))
    new = toy.parsed(
        toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
        | {"student": {"architecture": {}}}
    )
    student = search_costs.exported_student(new, StudentConfig(path="stage:a"))  # type: ignore[call-arg]
    assert student.architecture == {}
    assert Path(str(student.tokenizer)).is_relative_to(world.corpus)


@pytest.mark.parametrize(
    ("search", "arguments", "message"),
    [
        ({"processes": 4}, ["--gpus", "3"], "--gpus 3: a trial takes 4 processes with 1 GPUs each"),
        ({"processes": 3}, ["--gpus", "3"], "micro_batches_per_step = 4: cannot be shared out over 3 processes"),
        ({"gpus": 1e-6}, ["--gpus", "1"], "do not fit into"),
        ({"metric": "pearson"}, ["--gpus", "1"], 'search.metric: train has no "pearson"'),
    ],
)
def test_what_the_search_would_refuse_is_refused(
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    search: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    tables = {"search": search | NO_STOPPING, "stage": stages(bases, "alone"), "space": SPACE}
    error = plan_of(tmp_path, capsys, tables, *arguments, code=2)
    assert message in error
    assert len(error.splitlines()) == 1


trial_lists = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True), min_size=1)


@given(trials=trial_lists, at_once=st.integers(1, 5), data=st.data())
def test_wall_time_is_between_the_bounds(trials: list[list[str]], at_once: int, data: st.DataObject) -> None:
    hours = {name: float(data.draw(st.integers(1, 9))) for name in "abcdefgh"}
    wall = wall_seconds(trials, hours, at_once)
    distinct = {run for runs in trials for run in runs}
    assert sum(hours[run] for run in distinct) / at_once <= wall
    assert wall <= sum(hours[run] for runs in trials for run in runs)
    assert wall >= max(hours[run] for run in distinct)
    assert wall_seconds(trials, hours, 1) == sum(hours[run] for run in distinct)
    assert wall_seconds(trials[:1], hours, at_once) == sum(hours[run] for run in trials[0])
