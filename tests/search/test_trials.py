"""Trials: what a grid and a sample stand for, labels, stages and what trials share."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toy
from toy_search import GRID, tables

from lad_dist.config.errors import UserError
from lad_dist.config.load import load_config, parse_config
from lad_dist.config.schema import TaskConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.search.trial import Trial
from lad_dist.search.trials import TrialBuilder, grid_trials


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base config of files that nobody reads."""
    base = toy.task_config(tmp_path, {"train": "a.csv", "dev": "b.csv"}, Path("teacher"), Path("student"))
    (tmp_path / "base.toml").write_text(tomli_w.dumps(base))
    return tmp_path


def config_of(work: Path, **changes: Any) -> SearchConfig:
    return parse_config(SearchConfig, tables(work, **changes), "toy")


def test_a_grid_is_every_combination(work: Path) -> None:
    other = load_config(TaskConfig, work / "base.toml").model_dump(exclude_none=True)
    (work / "other.toml").write_text(tomli_w.dumps(other))
    start = {"own": {"task.student.path": "teacher"}, "other": {"task.base": str(work / "other.toml")}}
    trials = {trial.name: trial for trial in grid_trials(config_of(work, space=None, grid={**GRID, "start": start}))}
    combinations = itertools.product(("lad", "pkd"), "01", ("other", "own"))
    assert sorted(trials) == ["-".join(choices) for choices in combinations]
    assert list(trials)[:3] == ["pkd-0-own", "lad-0-own", "pkd-1-own"]  # the first axis turns fastest
    for name, trial in trials.items():
        method, seed, start_name = name.split("-")
        assert trial.sample == {"method": method, "seed": seed, "start": start_name}
        config = trial.config
        assert isinstance(config, TaskConfig)
        assert (config.objective.name, config.run.seed, config.run.name) == (method, int(seed), name)
        assert config.teacher is not None
        assert (config.student.path == config.teacher.path) == (start_name == "own")
        assert config.teacher.cache == str(work / "s" / "teacher_cache")


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, {"pkd", "lad"}),
        (
            {"start": {"own": {}, "to": {"task": {"student": {"path": "teacher"}}}}},
            {"pkd-own", "lad-own", "pkd-to", "lad-to"},
        ),
        (
            {"task": {"a": {"task.data.dev": "a.csv", "task.optim.lr": 0.1}, "b": {"task.data": {"dev": "b.csv"}}}},
            {"pkd", "lad"},
        ),
        ({"again": {"no": {}, "yes": {"task.run.seed": 1}}}, {"pkd", "lad"}),
        (
            {"data": {"all": {}, "half": {"task.data.train": "half.csv"}}},
            {"pkd-all", "lad-all", "pkd-half", "lad-half"},
        ),
        (
            {"method": {"kd_0": {"task.run.seed": 0}, "lad_0": {"task.run.seed": 0, "task.objective.soft": 1.0}}},
            {"kd_0", "lad_0"},
        ),
    ],
)
def test_a_label_has_the_choices_but_for_task_and_seed(work: Path, axes: dict[str, Any], expected: set[str]) -> None:
    grid = {**GRID, **axes}
    for override in ({}, {"task.run.label": "ours"}):
        trials = grid_trials(config_of(work, space=None, grid=grid, override=override))
        assert {trial.config.label for trial in trials} == expected


def test_a_label_without_choices_is_that_of_the_config(work: Path) -> None:
    seeds = {"seed": GRID["seed"]}
    assert {trial.config.label for trial in grid_trials(config_of(work, space=None, grid=seeds))} == {"lad"}


def two_stages(work: Path, **changes: Any) -> SearchConfig:
    """Return a search whose trials train one student, and then another one that begins with it."""
    stages = [{"name": "first", "base": str(work / "base.toml")}, {"name": "task", "base": str(work / "base.toml")}]
    override = {"task.student.path": "stage:first", "task.run.eval_every": 2, **changes.pop("override", {})}
    return parse_config(SearchConfig, tables(work, override=override, **changes) | {"stage": stages}, "toy")


def built(config: SearchConfig, changes: dict[str, Any], *, name: str = "trial-000", seed: int = 0) -> Trial:
    return TrialBuilder(config).build(name, changes, changes.items(), seed=seed)


def test_trials_whose_stage_is_the_same_share_the_run(work: Path) -> None:
    config = two_stages(work)
    one = built(config, {"task.optim.lr": 0.1})
    two = built(config, {"task.optim.lr": 0.2}, name="trial-001")
    other = built(config, {"first.optim.lr": 0.2}, name="trial-002")
    folders = [trial.stages["first"].run.folder for trial in (one, two, other)]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].parent == work / "s" / "stages"
    assert [trial.config.student.path for trial in (one, two, other)] == [str(folder / "export") for folder in folders]
    assert [trial.config.run.folder.name for trial in (one, two, other)] == ["trial-000", "trial-001", "trial-002"]


def test_a_further_seed_is_added_to_that_of_every_stage(work: Path) -> None:
    trial = built(two_stages(work, override={"first.run.seed": 3}), {}, seed=2)
    assert [stage.run.seed for stage in trial.stages.values()] == [5, 2]


def test_a_stage_without_a_base_is_left_out(work: Path) -> None:
    base = str(work / "base.toml")
    stages = [{"name": "intermediate"}, {"name": "task", "base": base}]
    grid = {
        "method": {
            "tinybert": {"intermediate.base": base, "task.student.path": "stage:intermediate"},
            "kd": {"task.objective.name": "pkd"},
        }
    }
    config = parse_config(SearchConfig, tables(work, space=None, grid=grid) | {"stage": stages}, "toy")
    assert {trial.name: list(trial.stages) for trial in grid_trials(config)} == {
        "tinybert": ["intermediate", "task"], "kd": ["task"]
    }  # fmt: skip


def test_a_trial_saves_whenever_it_evaluates_unless_the_config_says_otherwise(work: Path) -> None:
    saves = [built(two_stages(work, override=override), {}).config.run.save_every for override in (
        {}, {"task.run.save_every": 5}
    )]  # fmt: skip
    assert saves == [2, 5]


def test_none_unsets_a_key(work: Path) -> None:
    trial = built(two_stages(work), {"task.run.steps": "none", "task.run.epochs": 2.0})
    assert (trial.config.run.steps, trial.config.run.epochs) == (None, 2.0)


def test_a_request_is_the_trial(work: Path) -> None:
    trial = built(two_stages(work), {"task.optim.lr": 0.1, "task.student.layers": [1, 3]})
    assert Trial.of_request(trial.request()) == trial


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lr": 0.1}, "optim.lr: begin a key with the name of a stage, as in task.optim.lr"),
        ({"taks.optim.lr": 0.1}, 'taks.optim.lr: begin a key .* did you mean "task"'),
        ({"task.optim.rl": 0.1}, "optim.rl: no such key; did you mean"),
        ({"task.objective.hiden": 0.1}, 'hiden: no such key; did you mean "hidden"'),
        ({"task.student.path": "stage:fist"}, 'stage:fist: no stage before it has this name; did you mean "first"'),
        ({"first.student.path": "stage:task"}, "stage:task: no stage before it"),
        ({"first.base": "nowhere.toml"}, "nowhere.toml: cannot read the config"),
    ],
)
def test_what_does_not_fit_is_refused(work: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        built(two_stages(work), changes)
    assert "\n" not in str(caught.value)
