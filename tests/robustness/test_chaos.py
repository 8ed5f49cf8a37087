"""What a cluster does to runs, and nothing is lost.

Short here; `bash tests/robustness/chaos.sh` takes more of everything and prints a table.
"""

import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import chaos
import pytest
import torch
from chaos import LONG, SAVE_EVERY, STEPS, Kill, Victim, run_to_end, same
from checkpoint_damage import random_damage
from conftest import World
from strace_faults import changes, failing, killed

from lad_dist.checkpointing.async_save import write
from lad_dist.checkpointing.store import CheckpointStore, read_metadata

pytestmark = pytest.mark.processes

pytest_plugins = ["chaos_fixtures"]
RANKS = [0, 1] if LONG else [1]
ZERO_0 = {"deepspeed.zero_optimization": {"stage": 0}}


def stopped_at(victim: Victim, step: int, ranks: int = 2) -> None:
    """Begin a life and stop it once it has reported this step: it saves."""
    life = chaos.begin(victim, ranks)
    assert life.until(lambda: victim.reached >= step)
    life.signal(signal.SIGUSR1, [0])
    assert life.end() == [75] * ranks, life.output[-3000:]
    assert victim.saved_step == victim.reached


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    world: World, straight: Victim, tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    """In the long version runs alternate between a checkpoint that both processes write and one that the first does."""
    kills: list[Kill] = []
    whole = run_to_end(chaos.victim(tmp_path / "zero-0", world, ZERO_0)) if LONG else straight
    begin, runs = time.monotonic(), 0
    while len(kills) < (200 if LONG else 4) or sum(kill.inside for kill in kills) < (50 if LONG else 1):
        alone = LONG and runs % 2 == 1
        victim = chaos.victim(tmp_path / str(runs), world, ZERO_0 if alone else {})
        kills += chaos.kill_again_and_again(victim, random.Random(runs))
        runs += 1
        assert same(victim, whole if alone else straight), victim.folder
        assert max(kill.lost for kill in kills) <= SAVE_EVERY
        inside = sum(kill.inside for kill in kills)
        print(f"{len(kills)} kills, {inside} inside a save, {runs} runs, {time.monotonic() - begin:.0f} s", flush=True)
    took = [kill.seconds for kill in kills if kill.how != "job"]
    lost = sum(kill.lost for kill in kills) / len(kills)
    figures += [
        ("SIGKILLs, of which inside a save; equal ends", f"{len(kills)}, {inside}; {runs} of {runs}"),
        (f"steps lost per kill, of at most {SAVE_EVERY}: mean, most", f"{lost:.1f}, {max(k.lost for k in kills)}"),
        ("a rank killed: seconds until the other had ended, most", f"{max(took, default=0):.1f} of {len(took)}"),
    ]
    assert max(took, default=0) <= 5.0


def test_a_life_that_begins_while_another_goes_on_waits_until_that_ends(
    world: World, straight: Victim, tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    """As where the launcher alone was killed."""
    victim = chaos.victim(tmp_path, world)
    first = chaos.begin(victim)
    assert first.until(lambda: victim.saved != [])
    second = chaos.begin(victim)
    assert first.end() == [0, 0], first.output[-3000:]
    codes = second.end()
    assert codes == [0, 0] or "another process trains in this folder" in second.output, second.output[-3000:]
    run_to_end(victim)
    assert same(victim, straight)
    assert "step 1/" not in second.output
    figures.append(("the same command while ranks of a dead launcher live: waits, equal end", "yes"))


Content = dict[str, torch.Tensor]


def content(step: int, draft: str) -> Content:
    """What a save of this step holds, which of its drafts."""
    return {"weight": torch.full((200, 100), float(step)), draft: torch.zeros(3)}


def save(folder: Path, step: int, draft: str = "") -> None:
    """As a run does, with two files."""
    store = CheckpointStore(folder)
    path = store.begin(step)
    files = [(path / "state" / "a.pt", content(step, draft)), (path / "state" / "b.pt", {"step": step})]
    store.commit(path, {"step": step}, write(files, path))


def after_two_and_leftovers(folder: Path) -> Callable[[], None]:
    """The oldest goes, and what a crash and a damage have left."""
    for step in (1, 2):
        save(folder, step)
    for name in ("step-000000003.draft", "step-000000001.removed", "step-000000009.damaged"):
        (folder / name / "state").mkdir(parents=True)
        (folder / name / "state" / "a.pt").write_text("x")
    return partial(save, folder, 3)


def in_place_of_one_of_the_same_name(folder: Path) -> Callable[[], None]:
    for step in (1, 2):
        save(folder, step)
    return partial(save, folder, 2, "again")


@pytest.mark.root
@pytest.mark.parametrize("work", [after_two_and_leftovers, in_place_of_one_of_the_same_name])
def test_a_save_that_is_killed_at_any_file_operation_leaves_a_valid_checkpoint(
    work: Callable[[Path], Callable[[], None]], tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    calls = changes(work, tmp_path / "whole")
    assert {"fsync", "write", "unlinkat"} <= {name for name, _ in calls}
    new = _saved_step(tmp_path / "whole")
    steps = set()
    for name, nth in calls:
        folder = tmp_path / f"{name}-{nth}"
        assert killed(work, folder, call=(name, nth)) == -signal.SIGKILL
        steps.add(_saved_step(folder))
        save(folder, new)  # the next life does, as if nothing had been
        assert _saved_step(folder) == new
        assert not list(folder.glob("*.*"))
    assert steps == {new - 1, new}
    name = work.__name__.replace("_", " ")
    figures.append((f"a save {name} killed at each file operation: a valid one left", f"{len(calls)} of {len(calls)}"))


def _saved_step(folder: Path) -> int:
    """Of the newest valid checkpoint, whose content is that of one of its drafts."""
    newest = CheckpointStore(folder).newest()
    assert newest is not None
    step = read_metadata(newest)["step"]
    saved = torch.load(newest / "state" / "a.pt", weights_only=True)
    assert any(saved.keys() == content(step, draft).keys() for draft in ("", "again"))
    assert torch.equal(saved["weight"], content(step, "")["weight"])
    return int(step)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    world: World, straight: Victim, tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    victim, whole = chaos.victim(tmp_path, world), tmp_path / "whole"
    dice, times = random.Random(0), 20 if LONG else 1
    stopped_at(victim, STEPS - 20)
    shutil.copytree(victim.folder, whole)
    for _ in range(times):
        newest, before = victim.saved[-1].name, read_metadata(victim.saved[-2])["step"]
        damage = random_damage(victim.saved[-1], dice)
        life = chaos.begin(victim)
        assert life.end() == [0, 0], (damage, life.output[-3000:])
        assert f"{newest}: damaged (" in life.output, damage
        assert f"step {before + 1}/" in life.output, damage
        assert same(victim, straight), damage
        shutil.rmtree(victim.folder)
        shutil.copytree(whole, victim.folder)
    figures.append(("a damaged engine checkpoint: reported, the one before taken, equal ends", f"{times} of {times}"))


@pytest.mark.parametrize("stage", [0, 1, 2] if LONG else [1])
def test_a_run_that_goes_on_with_fewer_and_again_with_more_processes_ends_as_one_that_does_not(
    stage: int, world: World, straight: Victim, tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    """The weights are equal bit for bit; the mean loss of a row is summed in another order."""
    changes = {"deepspeed.zero_optimization": {"stage": stage}}
    whole = straight if stage == 1 else run_to_end(chaos.victim(tmp_path / "whole", world, changes))
    seeds = range(3 if LONG else 1)
    for seed in seeds:
        dice, victim = random.Random(seed), chaos.victim(tmp_path / str(seed), world, changes)
        first, second = sorted(dice.sample(range(2, STEPS - 20), 2))
        stopped_at(victim, first, ranks=2)
        stopped_at(victim, second, ranks=1)
        run_to_end(victim)
        assert victim.weights == whole.weights
        assert victim.losses == pytest.approx(whole.losses, rel=1e-6)
    times = f"{len(seeds)} of {len(seeds)}"
    figures.append((f"processes 2, 1, 2 at random steps under ZeRO {stage}: equal ends", times))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "chaos", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all that is left of a disk."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return path


def on_a_full_disk(world: World, folder: Path, disk: Path) -> tuple[Victim, chaos.Life, Path]:
    """A run that had saved when the disk filled up, its first life, and the file that fills it."""
    victim = chaos.victim(folder, world, runs=disk)
    life = chaos.begin(victim)
    assert life.until(lambda: victim.saved != [])
    return victim, life, fill(disk)


@pytest.mark.root
def test_a_full_disk_costs_rows_and_a_save_and_nothing_else(
    world: World, straight: Victim, tmp_path: Path, small_disk: Path, figures: list[tuple[str, str]]
) -> None:
    victim, life, filler = on_a_full_disk(world, tmp_path, small_disk)
    assert life.until(lambda: "could not be saved" in life.output)
    assert victim.saved != []
    assert victim.damaged == []
    filler.unlink()
    assert life.end() == [0, 0], life.output[-3000:]
    assert victim.weights == straight.weights
    lost = straight.losses.keys() - victim.losses.keys()
    assert all(f"the row of step {step} is lost" in life.output for step in lost)
    assert all(victim.losses[step] == straight.losses[step] for step in victim.losses)
    figures.append(
        ("the disk is full for a while: the run goes on; rows lost, all of them reported", f"yes; {len(lost)}")
    )


@pytest.mark.root
def test_a_disk_that_stays_full_ends_the_run_until_the_disk_has_room(
    world: World, straight: Victim, tmp_path: Path, small_disk: Path, figures: list[tuple[str, str]]
) -> None:
    victim, life, filler = on_a_full_disk(world, tmp_path, small_disk)
    assert life.end() == [75, 75], life.output[-3000:]
    assert "saving failed again and again" in life.output
    assert "No space left on device" in life.output
    assert victim.damaged == []
    filler.unlink()
    run_to_end(victim)
    assert victim.weights == straight.weights
    figures.append(("full for three saves: 75 and why; equal end once there is room", "yes"))


@pytest.mark.root
@pytest.mark.parametrize("rank", RANKS)
def test_a_disk_that_errs_costs_a_save_and_nothing_else(
    rank: int, world: World, straight: Victim, tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    victim = chaos.victim(tmp_path, world)
    life = chaos.begin(victim)
    assert life.until(lambda: victim.saved != [])
    with failing(life.pids[rank], "fsync", "EIO"):
        assert life.until(lambda: "could not be saved" in life.output)
    assert f"rank {rank}: OSError: [Errno 5]" in life.output
    assert life.end() == [0, 0], life.output[-3000:]
    assert same(victim, straight)
    assert victim.damaged == []
    figures.append((f"fsync of rank {rank} ends with EIO: the run goes on, equal ends", "yes"))


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_that_stands_still_is_named_and_the_run_goes_on_without_loss(
    rank: int, world: World, straight: Victim, tmp_path: Path, figures: list[tuple[str, str]]
) -> None:
    bound = 4.0
    victim = chaos.victim(tmp_path, world, {"run.watchdog_timeout": bound})
    life = chaos.begin(victim)
    assert life.until(lambda: victim.reached >= 12)
    begin = time.monotonic()
    life.signal(signal.SIGSTOP, [rank])
    name = f"rank {rank} on {socket.gethostname()} (pid {life.pids[rank]})"
    assert life.until(lambda: f"no answer for {bound:.0f} s: {name}" in life.output)
    named = time.monotonic() - begin
    codes = life.end()
    assert (codes[1 - rank], codes[rank]) == (75, -signal.SIGKILL)
    assert "Thread" in (victim.folder / "stacks" / f"rank-{1 - rank:05}.txt").read_text()
    lost = victim.reached - victim.saved_step
    assert lost <= SAVE_EVERY
    run_to_end(victim)
    assert same(victim, straight)
    assert named <= bound + 2.0
    figures.append((f"rank {rank} stopped: named after seconds, of a bound of {bound:.0f}", f"{named:.1f}"))
