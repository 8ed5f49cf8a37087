"""A save is written while training continues, committed as a whole, and a failed one costs nothing."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.checkpointing import async_save
from lad_dist.checkpointing.async_save import AsyncCheckpointer, Files, HostSnapshotEngine, to_host, write
from lad_dist.checkpointing.store import CheckpointStore, read_metadata
from lad_dist.utils.atomic_io import file_digest, list_files


def test_copies_share_no_memory_and_tied_tensors_stay_tied() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state: dict[str, Any] = {
        "a": weight, "b": OrderedDict(tied=weight), "c": [weight.T, (weight[0], 3)], "d": torch.Size([2]), "e": {"x"},
        "empty": [torch.empty(0), torch.empty(0, dtype=torch.int64)],
    }  # fmt: skip
    copy = to_host(state)
    state["e"].add("y")
    weight.zero_()
    assert torch.equal(copy["a"], torch.arange(6.0).reshape(2, 3))
    assert copy["b"]["tied"] is copy["a"]
    assert torch.equal(copy["c"][0], copy["a"].T)
    assert torch.equal(copy["c"][1][0], copy["a"][0])
    assert (copy["c"][1][1], copy["d"], copy["e"]) == (3, torch.Size([2]), {"x"})
    assert isinstance(copy["b"], OrderedDict)
    assert [tensor.dtype for tensor in copy["empty"]] == [torch.float32, torch.int64]


def test_written_content_is_read_back_and_digests_are_those_of_the_files(tmp_path: Path) -> None:
    content = {"weight": torch.randn(1000, 30), "steps": [1, 2]}
    digests = write([(tmp_path / "state" / "a.pt", content), (tmp_path / "b.pt", {})], tmp_path)
    assert digests == {str(path.relative_to(tmp_path)): file_digest(path) for path in list_files(tmp_path)}
    assert set(digests) == {"state/a.pt", "b.pt"}
    content_read = torch.load(tmp_path / "state" / "a.pt", weights_only=True)
    assert torch.equal(content_read["weight"], content["weight"])


def test_deepspeed_writes_into_memory() -> None:
    engine = HostSnapshotEngine()
    engine.makedirs("nowhere/state")
    engine.save({"a": torch.ones(1)}, "nowhere/state/x.pt")
    assert [path for path, _ in engine.pop_files()] == [Path("nowhere/state/x.pt")]
    assert engine.pop_files() == []
    assert not Path("nowhere").exists()


class Disk:
    """Replaces `write`: as slow and as broken as a test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.broken = False
        monkeypatch.setattr(async_save, "write", self.write)

    def write(self, contents: Files, root: Path) -> Mapping[str, Any]:
        assert self.free.wait(20)
        if self.broken:
            raise OSError(28, "No space left on device")
        return write(contents, root)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def checkpointer(folder: Path, every: int, keep_alive: Callable[[int], None] = lambda _: None) -> AsyncCheckpointer:
    def snapshot(step: int, draft: Path) -> Files:
        return [(draft / "x.pt", {"a": torch.ones(3)})]

    return AsyncCheckpointer(CheckpointStore(folder), every, snapshot, lambda step: {"step": step}, keep_alive)


def newest_step(a: AsyncCheckpointer) -> int:
    newest = a.checkpoints.newest()
    return 0 if newest is None else int(read_metadata(newest)["step"])


def step(a: AsyncCheckpointer, number: int) -> None:
    a.on_step_end(number, a.busy)


@pytest.mark.parametrize("every", [1, 3, 10])
@settings(max_examples=5)
@given(pauses=st.lists(st.sampled_from([0.0, 0.0, 0.002, 0.01]), min_size=21, max_size=21))
def test_no_more_than_so_many_steps_are_ever_at_risk(
    every: int, pauses: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However the pace of the disk and that of the steps go together."""
    a = checkpointer(tmp_path_factory.mktemp("saves"), every)
    for number, pause in enumerate(pauses, start=1):
        assert number - newest_step(a) <= every  # were it to die in this step
        time.sleep(pause)
        step(a, number)


def test_saves_do_not_come_more_often_than_they_must(tmp_path: Path) -> None:
    a, starts = checkpointer(tmp_path, 10), set()
    for number in range(1, 101):
        while a.busy:  # a step takes longer than the disk
            time.sleep(0.001)
        step(a, number)
        starts.add(a.last_started)
    assert sorted(starts - {0}) == list(range(9, 101, 9))  # each is committed one step after it began


def test_training_goes_on_while_files_are_written_and_waits_when_too_much_is_at_risk(
    tmp_path: Path, disk: Disk
) -> None:
    waits: list[int] = []
    a = checkpointer(tmp_path, 5, waits.append)
    disk.free.clear()
    for number in range(1, 5):
        step(a, number)
    assert a.busy
    assert newest_step(a) == 0
    threading.Timer(0.3, disk.free.set).start()
    begin = time.monotonic()
    step(a, 5)
    assert time.monotonic() - begin > 0.2
    assert newest_step(a) == 4
    assert waits[:3] == [5, 5, 5]  # a slow disk is no hang


def test_the_metadata_of_a_checkpoint_is_of_the_same_step(tmp_path: Path, disk: Disk) -> None:
    a, losses = checkpointer(tmp_path, 5), list[int]()
    a.metadata = lambda step: {"losses": list(losses)}
    disk.free.clear()
    for number in range(1, 6):
        losses.append(number)
        if number == 5:
            disk.free.set()
        step(a, number)
    newest = a.checkpoints.newest()
    assert newest is not None
    assert read_metadata(newest) == {"losses": [1, 2, 3, 4]}


def test_without_an_interval_nothing_is_saved_until_it_is_asked_for(tmp_path: Path) -> None:
    a = checkpointer(tmp_path, 0)
    for number in range(1, 20):
        step(a, number)
    assert newest_step(a) == 0
    a.save_and_wait(19)
    assert newest_step(a) == 19


def test_a_failed_save_leaves_the_one_before_it_and_a_later_one_succeeds(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    a = checkpointer(tmp_path, 2)
    a.save_and_wait(1)
    disk.broken = True
    step(a, 2)
    a.wait(2)
    assert newest_step(a) == 1
    assert not list(tmp_path.glob("*.draft"))
    error = capsys.readouterr().err
    assert "the checkpoint of step 2 could not be saved (rank 0: OSError: [Errno 28] No space left" in error
    assert error.endswith("; the one of step 1 remains\n")
    disk.broken = False
    a.save_and_wait(3)
    assert (newest_step(a), a.gave_up) == (3, False)


def test_after_three_failures_in_a_row_it_gives_up(tmp_path: Path, disk: Disk) -> None:
    a = checkpointer(tmp_path, 4)
    a.save_and_wait(1)
    disk.broken = True
    for number in range(2, 40):
        step(a, number)
        a.wait(number)
        if a.gave_up:
            break
    assert 8 <= number <= 14
    assert "No space left on device" in a.reason
    assert newest_step(a) == 1


def test_a_stop_tries_three_times_and_then_leaves(tmp_path: Path, disk: Disk) -> None:
    disk.broken = True
    a = checkpointer(tmp_path, 0)
    a.save_and_wait(7)
    assert a.gave_up
    assert a.failures == 3
    assert a.checkpoints.newest() is None


def test_a_folder_that_cannot_be_created_is_a_failed_save(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("x")
    a = checkpointer(tmp_path / "in the way", 0)
    a.save_and_wait(1)
    assert a.gave_up


@pytest.mark.parametrize(("to", "newest"), [(5, 2), (6, 6)])
def test_one_that_is_being_written_when_the_run_goes_back_counts_if_it_is_early_enough(
    to: int, newest: int, tmp_path: Path, disk: Disk
) -> None:
    a = checkpointer(tmp_path, 100)
    a.save_and_wait(2)
    disk.free.clear()
    a._begin(6)
    threading.Timer(0.1, disk.free.set).start()
    a.go_back(8, to)
    assert not a.busy
    assert newest_step(a) == newest
    assert not list(tmp_path.glob("*.draft"))


def test_one_that_was_being_written_when_asked_to_stop_is_waited_for(tmp_path: Path, disk: Disk) -> None:
    a = checkpointer(tmp_path, 100)
    disk.free.clear()
    a._begin(6)
    threading.Timer(0.1, disk.free.set).start()
    a.save_and_wait(6)
    assert newest_step(a) == 6
    assert a.checkpoints.newest_name() == "step-000000006"
