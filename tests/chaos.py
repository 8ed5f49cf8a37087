"""What a cluster does to a run, done to a toy run on purpose.

Victim          a run: how far it came, what it has saved, what came out
begin(victim)   a life of it: the launch script in so many processes, forked from one that has imported everything
launch(victim)  the same by a real launcher
Life            its processes: kill, stop, wait
kill_again_and_again   the same command until the run is done, and every life but the last one is killed
"""

import ctypes
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import tomli_w
import toy
from conftest import World
from launching import FORKS, ROOT, environment, free_port, launcher, rank_variables, run_script

from lad_dist.checkpointing import store
from lad_dist.config.load import apply_overrides

LONG = os.environ.get("LAD_DIST_CHAOS") == "long"
STEPS = 240 if LONG else 48
SAVE_EVERY = 8
SCRIPT = ROOT / "launch" / "task_distill.py"
SLOW_SYNC = 0.03  # seconds: a network file system's; else too few kills would fall into a save
POLL_SECONDS = 0.01
PATIENCE = 180.0  # seconds for anything that a life does by itself
MARK = "LAD_DIST_CHAOS_LIFE"  # in the environment of all processes of a launched life


@dataclass(frozen=True)
class Victim:
    folder: Path  # of the run
    config: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def losses(self) -> dict[int, float]:
        """Return the losses by step, of the rows that are whole."""
        losses = {}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            row = _row(line)
            if "loss" in row:
                losses[row["step"]] = row["loss"]
        return losses

    @property
    def reached(self) -> int:
        """The last step that the run has reported."""
        return max(self.losses, default=0)

    @property
    def saved(self) -> list[Path]:
        return store.CheckpointStore(self.checkpoints)._checkpoint_paths()

    @property
    def saved_step(self) -> int:
        return store.read_metadata(self.saved[-1])["step"] if self.saved else 0

    @property
    def drafts(self) -> set[tuple[str, int]]:
        """Saves that were begun and not committed: names, and when."""
        drafts = set()
        for path in self.checkpoints.glob("step-*.draft"):
            with suppress(FileNotFoundError):
                drafts.add((path.name, path.stat().st_ctime_ns))
        return drafts

    @property
    def damaged(self) -> list[str]:
        """The faults of checkpoints that look whole."""
        return [f"{path.name}: {fault}" for path in self.saved if (fault := store._fault(path))]

    @property
    def done(self) -> bool:
        return (self.folder / "results.json").exists()

    @property
    def weights(self) -> str:
        return hashlib.sha256((self.folder / "export" / "model.safetensors").read_bytes()).hexdigest()


def _row(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def victim(folder: Path, world: World, changes: Mapping[str, Any] | None = None, runs: Path | None = None) -> Victim:
    """Return a run of STEPS steps of two micro-batches, of which both processes write the checkpoints.

    `runs` is the folder of its run folder, if not beside its log.
    """
    runs = runs or folder / "runs"
    tables = toy.task_config(runs, world.files, world.teacher, world.pretrained)
    all_changes = {
        "run.steps": STEPS, "run.save_every": SAVE_EVERY, "data.micro_batches_per_step": 2, "data.num_workers": 0,
        "student.dropout": 0.1, "deepspeed.zero_optimization": {"stage": 1}, **(changes or {}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(apply_overrides(tables, all_changes.items())))
    return Victim(runs / "toy", path)


@dataclass
class Life:
    """pids: of the ranks. began: by time.monotonic()."""

    log: Path
    pids: list[int]
    wait: Callable[[float], list[int | None]]  # within seconds: exit codes, negative of a signal, None while it runs
    began: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def has_ended(self) -> bool:
        return None not in self.wait(0.0)

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def end(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes. Raises TimeoutError, and kills it then."""
        codes = self.wait(seconds)
        if None in codes:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"{codes} after {seconds} s: {self.output[-3000:]}")
        return codes  # type: ignore[return-value]

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Waits for it; False when the life is over before. Raises TimeoutError, and kills it then."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.has_ended:
                return condition()
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(self.output[-3000:])
            time.sleep(POLL_SECONDS)
        return True


def nothing() -> None: ...


def may_be_traced() -> None:
    """By a process that is no ancestor of this one, where the kernel asks for leave."""
    set_ptracer, anybody = 0x59616D61, -1
    ctypes.CDLL(None).prctl(set_ptracer, ctypes.c_ulong(anybody), 0, 0, 0)


def slow_disk() -> None:
    sync = os.fsync

    def slow(file: int) -> None:
        time.sleep(SLOW_SYNC)
        sync(file)

    os.fsync = slow


def begin(
    victim: Victim,
    ranks: int = 2,
    prepare: Callable[[], None] = nothing,
    words: Sequence[str] = (),
    variables: Sequence[Mapping[str, str]] = ({}, {}),
) -> Life:
    """prepare: called in each process before the script. words: after the config. variables: of each rank."""
    log = victim.config.with_name(f"{time.monotonic_ns()}.log")
    log.touch()
    port = free_port()
    processes = []
    for rank in range(ranks):
        all_variables = rank_variables(rank, ranks, port) | variables[rank]
        process = FORKS.Process(target=_live, args=(log, all_variables, [str(victim.config), *words], prepare))
        process.start()
        processes.append(process)

    def wait_codes(seconds: float) -> list[int | None]:
        deadline = time.monotonic() + seconds
        while left := [each.sentinel for each in processes if each.exitcode is None]:
            if not wait(left, max(0.0, deadline - time.monotonic())):
                break
        return [each.exitcode for each in processes]

    return Life(log, [each.pid or 0 for each in processes], wait_codes)


def launch(victim: Victim, by: str, words: Sequence[str] = ()) -> Life:
    """By torchrun or deepspeed, in a session of its own. `pids` is that of the launcher."""
    log = victim.config.with_name(f"{time.monotonic_ns()}.log")
    command = [*launcher(by, 2), str(SCRIPT), str(victim.config), *words]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | {MARK: str(log)}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip

    def wait_codes(seconds: float) -> list[int | None]:
        try:
            return [process.wait(seconds)]
        except subprocess.TimeoutExpired:
            return [None]

    return Life(log, [process.pid], wait_codes)


def processes_of(life: Life) -> tuple[dict[int, int], list[int]]:
    """Of a launched life: the pids of its ranks, and of what launched them."""
    ranks, others = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = dict(x.partition("=")[::2] for x in (folder / "environ").read_text().split("\0"))
            if variables.get(MARK) == str(life.log):
                if "RANK" in variables:
                    ranks[int(variables["RANK"])] = int(folder.name)
                else:
                    others.append(int(folder.name))
    return ranks, others


def run_to_end(victim: Victim) -> Victim:
    """After a life without disturbance."""
    life = begin(victim)
    assert life.end() == [0, 0], life.output[-3000:]
    return victim


def same(one: Victim, other: Victim) -> bool:
    """Bit for bit, on the way and in the end."""
    return one.weights == other.weights and one.losses == other.losses


def _live(log: Path, variables: dict[str, str], words: list[str], prepare: Callable[[], None]) -> None:
    os.environ.update(variables)
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    may_be_traced()
    prepare()
    run_script(SCRIPT, *words)


@dataclass(frozen=True)
class Kill:
    """A kill, and what it cost."""

    how: str  # job, or rank and its number
    inside: bool  # a save was begun and not committed
    lost: int  # steps that had to be done again
    seconds: float  # until the last process had ended


def kill_again_and_again(victim: Victim, dice: random.Random) -> list[Kill]:
    """Give the same command until the run is complete, and kill every life but the last.

    A life is killed once it has saved, after a random while; now and then already at its start, but never twice in a
    row: three lives without a checkpoint would be the end.
    """
    kills: list[Kill] = []
    early = False
    while True:
        early = dice.random() < 0.15 and not early
        before = victim.drafts
        life = begin(victim, prepare=slow_disk)
        if early:
            life.wait(dice.uniform(0.0, 3.0))
        else:
            _await_random_time(victim, life, dice)
        how = dice.choice(["job", "rank 0", "rank 1"])
        if life.has_ended:
            codes = life.end()
            assert codes == [0, 0], (codes, life.output[-3000:])
            return kills
        kills.append(_kill(victim, life, "job" if early else how, before))


def _await_random_time(victim: Victim, life: Life, dice: random.Random) -> None:
    """Any, or one within a save, once it has saved."""
    before = [path.name for path in victim.saved]
    life.until(lambda: victim.saved[-1:] != [] and victim.saved[-1].name not in before)
    if dice.random() < 0.4:
        life.wait(dice.uniform(0.0, 1.0))
    else:
        old = victim.drafts
        life.until(lambda: victim.drafts - old != set())
        life.wait(dice.uniform(0.0, 6 * SLOW_SYNC))


def _kill(victim: Victim, life: Life, how: str, drafts: set[tuple[str, int]]) -> Kill:
    begin = time.monotonic()
    life.signal(signal.SIGKILL, None if how == "job" else [int(how[-1])])
    codes = life.end()
    assert -signal.SIGKILL in codes or victim.done, (codes, life.output[-3000:])
    assert victim.damaged == []
    lost = 0 if victim.done else victim.reached - victim.saved_step
    return Kill(how, victim.drafts - drafts != set(), lost, time.monotonic() - begin)
