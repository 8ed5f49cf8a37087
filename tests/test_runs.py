"""A checkpoint is there whole or not at all; a damaged one gives way to the one before it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World

from lad_dist import cli, disk
from lad_dist.config import TrainConfig, UserError
from lad_dist.runs import NothingToResume, Run, facts_of


@pytest.fixture
def config(world: World, tmp_path: Path) -> TrainConfig:
    return toy.parsed(toy.task_config(tmp_path, world.files, world.teacher, world.pretrained))


def saved(config: TrainConfig, *steps: int) -> Run:
    """A run with a checkpoint at each step: two files, one in a folder."""
    run = Run(config)

    def write(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "weights.pt").write_bytes(bytes(range(256)) * 10)
        (folder / "note").write_text("x")

    for step in steps:
        run.save(step, write, {"step": step})
    return run


def flip_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state" / "weights.pt").read_bytes())
    content[1234] ^= 1
    (checkpoint / "state" / "weights.pt").write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "state" / "weights.pt"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "note").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def cut_the_manifest(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text[: len(text) // 2])


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[]")


def empty_the_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = [
    flip_a_byte, cut_short, lose_a_file, lose_the_manifest, cut_the_manifest, empty_the_manifest, empty_the_folder
]  # fmt: skip


def test_a_new_run_has_nothing_to_resume(config: TrainConfig) -> None:
    run = Run(config)
    assert run.newest() is None
    assert run.results is None
    assert not run.folder.exists()


def test_the_newest_two_checkpoints_are_kept(config: TrainConfig) -> None:
    run = saved(config, 2, 10, 9_999, 10_000)
    assert [path.name for path in sorted(run.checkpoints.glob("step-*"))] == ["step-000009999", "step-000010000"]
    newest = run.newest()
    assert newest is not None
    assert facts_of(newest) == {"step": 10_000}
    assert (run.checkpoints / "latest").read_text() == newest.name


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way(
    damage: Callable[[Path], None], config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(config, 1, 2)
    damage(run.checkpoints / "step-000000002")
    newest = Run(config).newest()
    assert newest is not None
    assert facts_of(newest) == {"step": 1}
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step-000000002: damaged (" in error


def test_without_a_valid_checkpoint_nothing_starts_afresh(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(config, 1, 2)
    for checkpoint in run.checkpoints.glob("step-*"):
        flip_a_byte(checkpoint)

    def work() -> int:
        Run(config).newest()
        return 0

    assert cli.guarded(work) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("none of the 2 checkpoints is valid; remove the run folder to start afresh")
    assert issubclass(NothingToResume, UserError)


def test_a_half_written_draft_is_ignored_and_then_replaced(config: TrainConfig) -> None:
    run = saved(config, 1)
    draft = run.checkpoints / "step-000000002.draft"
    shutil.copytree(run.checkpoints / "step-000000001", draft)
    (draft / "leftover").write_text("x")
    newest = run.newest()
    assert newest is not None
    assert newest.name == "step-000000001"
    saved(config, 2)
    assert not draft.exists()
    newest = run.newest()
    assert newest is not None
    assert newest.name == "step-000000002"
    assert not (newest / "leftover").exists()


def test_a_write_that_fails_leaves_the_checkpoint_before_it(config: TrainConfig) -> None:
    run = saved(config, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.save(2, fail, {"step": 2})
    newest = run.newest()
    assert newest is not None
    assert newest.name == "step-000000001"


def test_a_checkpoint_of_the_same_step_is_replaced(config: TrainConfig) -> None:
    run = saved(config, 1)
    flip_a_byte(run.checkpoints / "step-000000001")
    saved(config, 1)
    assert run.newest() == run.checkpoints / "step-000000001"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim.lr": 2e-3}, "optim.lr = 0.001, the config says 0.002"),
        ({"run.seed": 1}, "run.seed = 0, the config says 1"),
        ({"deepspeed.zero_optimization.stage": 1}, "deepspeed.zero_optimization.stage = None, the config says 1"),
        ({"student.depth": None}, "student.depth = 2, the config says None"),
        ({"objective.soft": 0.1}, "objective.soft = None, the config says 0.1"),
        ({"surgery": [{"name": "low_rank", "keep": 0.5}]}, "surgery = [], the config says"),
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


def test_what_changes_nothing_of_what_is_learnt_may_change(world: World, tmp_path: Path, config: TrainConfig) -> None:
    Run(config).begin(0)
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    changes = {"run.log_every": 3, "run.eval_every": 2, "run.save_every": 2, "data.workers": 3}
    Run(toy.parsed(tables, changes))


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


def test_what_is_told_before_the_first_step_is_told_once(config: TrainConfig) -> None:
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
    disk.write_text(file, "before")

    def fail(*_: Any) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(OSError, match="pulled the plug"):
        disk.write_text(file, "after")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
