"""What a run folder holds, and what may change in it."""

import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toy
from conftest import World
from launching import ROOT

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.runs.run_folder import MAX_CRASHES, NoProgress, Run
from lad_dist.utils import atomic_io


@pytest.fixture
def config(world: World, tmp_path: Path) -> TrainConfig:
    return toy.parsed(toy.task_config(tmp_path, world.files, world.teacher, world.pretrained))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim.lr": 2e-3}, "optim.lr = 0.001, the config says 0.002"),
        ({"run.seed": 1}, "run.seed = 0, the config says 1"),
        ({"deepspeed.bf16.enabled": False}, "deepspeed.bf16.enabled = None, the config says False"),
        ({"student.num_hidden_layers": None}, "student.num_hidden_layers = 2, the config says None"),
        ({"objective.soft": 0.1}, "objective.soft = None, the config says 0.1"),
        ({"compression": [{"name": "low_rank", "keep": 0.5}]}, "compression = [], the config says"),
    ],
)
def test_a_folder_with_another_config_is_refused(
    changes: dict[str, Any], key: str, world: World, tmp_path: Path, config: TrainConfig
) -> None:
    Run(config).begin(0)
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    with pytest.raises(UserError) as caught:
        Run(toy.parsed(tables, changes))
    assert f"holds a run with {key}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_an_earlier_version_lacked_has_the_default(
    world: World, tmp_path: Path, config: TrainConfig
) -> None:
    run = Run(config)
    run.begin(0)
    file = run.folder / "config.toml"
    before = tomllib.loads(file.read_text())
    del before["run"]["spike_sigma"], before["data"]["kind"], before["optim"]["eps"]
    file.write_text(tomli_w.dumps(before))
    Run(config)
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    with pytest.raises(UserError, match=re.escape("run.spike_sigma = 0.0, the config says 6.0")):
        Run(toy.parsed(tables, {"run.spike_sigma": 6.0}))


def test_keys_that_do_not_affect_learning_may_change(world: World, tmp_path: Path, config: TrainConfig) -> None:
    Run(config).begin(0)
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    changes = {"run.log_every": 3, "run.eval_every": 2, "run.save_every": 2, "data.num_workers": 3}
    changes |= {"run.watchdog_timeout": 5.0, "run.replica_check_every": 7, "teacher.cache": str(tmp_path / "cache")}
    Run(toy.parsed(tables, changes))


def test_evaluations_to_choose_from_do_not_change(world: World, tmp_path: Path) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    changes = {"run.eval_every": 2, "run.best_metric": "loss"}
    Run(toy.parsed(tables, changes)).begin(0)
    with pytest.raises(UserError, match=r"holds a run with run\.eval_every = 2, the config says 4"):
        Run(toy.parsed(tables, changes | {"run.eval_every": 4}))


def test_rows_after_the_checkpoint_are_dropped_when_a_run_is_taken_up(config: TrainConfig) -> None:
    run = Run(config)
    run.begin(0)
    for step in range(1, 6):
        run.record({"step": step, "loss": 1.0})
    again = Run(config)
    again.begin(3)
    again.record({"step": 4, "loss": 2.0})
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_row_before_the_first_step_is_recorded_once(config: TrainConfig) -> None:
    for _ in range(2):
        run = Run(config)
        run.begin(0)
        run.record({"step": 0, "initial_error/logits": 0.5})
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 0, "initial_error/logits": 0.5}\n'


def test_a_row_that_was_cut_off_does_not_hinder(config: TrainConfig) -> None:
    """The machine may go down in the middle of a line."""
    run = Run(config)
    run.begin(0)
    run.record({"step": 1, "loss": 1.0})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    Run(config).begin(2)
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    atomic_io.write_text(file, "before")

    def fail(*_: Any) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr(atomic_io.os, "replace", fail)
    with pytest.raises(OSError, match="pulled the plug"):
        atomic_io.write_text(file, "after")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


class Crash(Exception):
    """Not the user's mistake."""


def die(run: Run, error: Exception) -> None:
    with pytest.raises(type(error)), run.session():
        raise error


def checkpoint_of(run: Run, step: int) -> None:
    run.checkpoints.commit(run.checkpoints.begin(step), {"step": step}, {})


def test_a_run_that_dies_three_times_at_one_place_is_not_begun_again(config: TrainConfig) -> None:
    run = Run(config)
    for _ in range(MAX_CRASHES):
        die(run, Crash())
    with pytest.raises(NoProgress, match="died 3 times in a row at the beginning") as caught, run.session():
        raise AssertionError("was begun")
    assert caught.value.code == 93
    assert "\n" not in str(caught.value)
    (run.folder / "crashes.json").unlink()
    with run.session():
        pass
    assert not (run.folder / "crashes.json").exists()


def test_a_new_checkpoint_is_progress(config: TrainConfig) -> None:
    run = Run(config)
    for step in range(5):
        die(run, Crash())
        die(run, Crash())
        checkpoint_of(run, step)
    for _ in range(MAX_CRASHES):
        die(run, Crash())
    with pytest.raises(NoProgress, match="at step-000000004"), run.session():
        pass


@pytest.mark.parametrize("good", [None, UserError("no such file"), KeyboardInterrupt()])
def test_a_session_that_ends_well_is_no_crash(config: TrainConfig, good: BaseException | None) -> None:
    """Nor is one that ends with a UserError or by Ctrl-C."""
    run = Run(config)
    for _ in range(2 * MAX_CRASHES):
        die(run, Crash())
        if good is None:
            with run.session():
                pass
        else:
            with pytest.raises(type(good)), run.session():
                raise good


def test_a_damaged_count_counts_anew(config: TrainConfig) -> None:
    run = Run(config)
    die(run, Crash())
    (run.folder / "crashes.json").write_text('{"at": "the beg')
    for _ in range(MAX_CRASHES):
        die(run, Crash())


def test_the_file_stop_is_seen_and_taken_away(config: TrainConfig) -> None:
    run = Run(config)
    assert not run.stop_requested()
    run.folder.mkdir(parents=True)
    (run.folder / "STOP").touch()
    assert not run.stop_requested()  # not looked for at every step
    again = Run(config)
    assert again.stop_requested()
    again.clear_stop_request()
    assert not Run(config).stop_requested()


HOLDER = """
import sys, time
from pathlib import Path
from lad_dist.utils.atomic_io import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("seconds", [1, 100])
def test_a_folder_belongs_to_one_session_at_a_time(
    config: TrainConfig, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session waits for the end of the one before; how that ends does not matter."""
    monkeypatch.setattr("lad_dist.runs.run_folder.LOCK_SECONDS", 3.0 if seconds == 100 else 60.0)
    run = Run(config)
    command = [sys.executable, "-c", HOLDER, str(run.folder / "lock"), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        begin = time.monotonic()
        if seconds == 100:
            with pytest.raises(UserError, match="another process trains in this folder; wait until"), run.session():
                raise AssertionError("was begun")
            other.kill()
            other.wait()
        with run.session():
            assert other.poll() is not None or time.monotonic() - begin > 0.5
