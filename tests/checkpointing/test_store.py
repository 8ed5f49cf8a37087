"""A checkpoint exists whole or not at all; a damaged one gives way to the one before it."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_damage import random_damage
from launching import exit_code

from lad_dist.checkpointing.store import MANIFEST, CheckpointStore, NoValidCheckpoint, read_metadata
from lad_dist.config.errors import UserError
from lad_dist.utils.atomic_io import file_digest, list_files


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def fill(draft: Path, step: int) -> None:
    """Two files that differ from step to step, one in a folder."""
    (draft / "state").mkdir()
    (draft / "state" / "weights.pt").write_bytes(bytes((step + n) % 256 for n in range(2560)))
    (draft / "note").write_text(f"of step {step}")


def saved(store: CheckpointStore, *steps: int, best: int | None = None) -> CheckpointStore:
    """Save checkpoints, which name the one of step `best` as the best so far."""
    for step in steps:
        draft = store.begin(step)
        fill(draft, step)
        metadata = {"step": step, "best": best and {"step": best}}
        store.commit(draft, metadata, {str(path.relative_to(draft)): file_digest(path) for path in list_files(draft)})
    return store


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name.removeprefix("step-00") for path in store.folder.glob("step-*"))


def newest_step(store: CheckpointStore) -> int:
    newest = store.newest()
    assert newest is not None
    step: int = read_metadata(newest)["step"]
    return step


def flip_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state" / "weights.pt").read_bytes())
    content[1234] ^= 1
    (checkpoint / "state" / "weights.pt").write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "state" / "weights.pt"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "note").unlink()


def add_a_file(checkpoint: Path) -> None:
    (checkpoint / "state" / "more").write_text("x")


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def cut_the_manifest(checkpoint: Path) -> None:
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text[: len(text) // 2])


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("[]")


def another_step_in_the_manifest(checkpoint: Path) -> None:
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text.replace('"step": 2', '"step": 3'))


def another_format(checkpoint: Path) -> None:
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text.replace('"format": 2', '"format": 9'))


def empty_the_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def take_the_one_before(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step-000000001"), checkpoint)


def swap_two_files(checkpoint: Path) -> None:
    a, b = checkpoint / "note", checkpoint / "state" / "weights.pt"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def a_folder_for_a_file(checkpoint: Path) -> None:
    (checkpoint / "note").unlink()
    (checkpoint / "note").mkdir()


DAMAGES = [
    flip_a_byte, cut_short, lose_a_file, add_a_file, lose_the_manifest, cut_the_manifest, empty_the_manifest,
    another_step_in_the_manifest, another_format, empty_the_folder, take_the_one_before, swap_two_files,
    a_folder_for_a_file,
]  # fmt: skip


def test_a_new_run_has_nothing_to_resume(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.newest_name() is None
    assert not store.folder.exists()


def test_the_newest_two_stay(store: CheckpointStore) -> None:
    saved(store, 2, 10, 9_999, 10_000)
    assert names(store) == ["0009999", "0010000"]
    assert newest_step(store) == 10_000
    assert (store.folder / "latest").read_text() == "step-000010000"


def test_the_newest_three_stay_and_every_third(tmp_path: Path) -> None:
    store = saved(CheckpointStore(tmp_path, keep=3, keep_every=3), *range(10, 120, 10))
    assert [int(name) for name in names(store)] == [30, 60, 90, 100, 110]


def test_the_best_so_far_stays_as_long_as_a_checkpoint_names_it(store: CheckpointStore) -> None:
    saved(store, 1, 2, best=1)
    saved(store, 3, 4, 5, best=1)
    assert [int(name) for name in names(store)] == [1, 4, 5]
    saved(store, 6, best=6)
    assert [int(name) for name in names(store)] == [1, 5, 6]  # where 6 is damaged, the run goes on from 5
    saved(store, 7, best=6)
    assert [int(name) for name in names(store)] == [6, 7]


def test_the_best_of_one_that_stays_for_good_stays_too(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_every=3)
    saved(store, 1, 2, 3, best=1)
    saved(store, 4, 5, 6, 7, best=4)
    assert [int(name) for name in names(store)] == [1, 3, 4, 6, 7]


def test_without_the_best_so_far_a_checkpoint_is_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = saved(CheckpointStore(tmp_path, keep=3), 1, 2, best=1)
    saved(store, 3, best=3)
    saved(store, 4, best=3)
    assert [store.verified(3).name, newest_step(store)] == ["step-000000003", 4]
    flip_a_byte(store.folder / "step-000000003")
    with pytest.raises(NoValidCheckpoint, match=r"step-000000003: damaged .*; the same command resumes from an ear"):
        store.verified(3)
    assert newest_step(store) == 2
    error = capsys.readouterr().err
    assert "step-000000004: damaged (step-000000003, the best so far: state/weights.pt is not what was" in error


def test_a_resumed_run_continues_the_count(tmp_path: Path) -> None:
    for step in range(10, 120, 10):
        store = saved(CheckpointStore(tmp_path, keep=3, keep_every=3), step)
    assert [int(name) for name in names(store)] == [30, 60, 90, 100, 110]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way(
    damage: Callable[[Path], None], store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(store, 1, 2)
    damage(store.folder / "step-000000002")
    assert newest_step(store) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step-000000002: damaged (" in error
    assert newest_step(store) == 1
    assert capsys.readouterr().err == ""  # it was set aside, and is not reported again


def test_each_of_300_random_damages_is_detected(store: CheckpointStore, tmp_path: Path) -> None:
    saved(store, 1, 2)
    whole = tmp_path / "whole"
    shutil.copytree(store.folder, whole)
    draw = random.Random(0)
    for _ in range(300):
        done = random_damage(store.folder / "step-000000002", draw)
        assert newest_step(store) == 1, done
        shutil.rmtree(store.folder)
        shutil.copytree(whole, store.folder)
    assert newest_step(store) == 2


def test_what_damaged_ones_leave_is_removed_by_the_next_commit_and_no_valid_one_with_it(store: CheckpointStore) -> None:
    saved(store, 1, 5)
    flip_a_byte(store.folder / "step-000000005")
    assert newest_step(store) == 1
    saved(store, 3)
    assert [name[-1] for name in names(store)] == ["1", "3"]


def test_without_a_valid_checkpoint_nothing_starts_afresh(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(store, 1, 2)
    for checkpoint in store.folder.glob("step-*"):
        flip_a_byte(checkpoint)

    def work() -> int:
        store.newest()
        return 0

    for _ in range(2):
        assert exit_code(work) == 3
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith("none of 2 checkpoints is valid; remove the run folder to start afresh")
    assert issubclass(NoValidCheckpoint, UserError)


def test_a_half_written_draft_is_ignored_and_then_replaced(store: CheckpointStore) -> None:
    saved(store, 1)
    draft = store.folder / "step-000000002.draft"
    shutil.copytree(store.folder / "step-000000001", draft)
    (draft / "leftover").write_text("x")
    assert newest_step(store) == 1
    saved(store, 2)
    assert not draft.exists()
    assert newest_step(store) == 2
    assert not (store.folder / "step-000000002" / "leftover").exists()


def test_a_checkpoint_of_the_same_step_is_replaced(store: CheckpointStore) -> None:
    saved(store, 1)
    flip_a_byte(store.folder / "step-000000001")
    saved(store, 1)
    assert newest_step(store) == 1
    assert len(names(store)) == 1


def test_cleanup_removes_what_a_crash_left(tmp_path: Path) -> None:
    for name in ("step-000000001", "step-000000002.draft", "step-000000001.removed", "step-000000003.damaged"):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state" / "x.pt").write_bytes(b"x")
    CheckpointStore(tmp_path).cleanup()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000003.damaged"]
