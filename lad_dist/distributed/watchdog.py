"""Health: a rank that dies or hangs is found, named, and nobody waits for it.

    Watch(stacks, hang_seconds)      around the loop, on every rank, after processes.start()
    watch.mark(step, phase, slot)    progress of the main thread, by the same marks on every rank: an assignment
    watch.paused()                   around what takes long without a mark

A thread on each rank sends a line a second over a star of TCP connections with rank 0 in the middle. What it finds:

    a rank died       its connection ends without a goodbye, or its host does not acknowledge: the others name it and
                      end with 1. (A process that is merely stopped still acknowledges: its kernel does.)
    a rank failed     it says so when an exception leaves the `with`; the others end with the exception's `code`, or 1,
                      unless their own loops end in the meantime: a user's mistake is met by all of them alike
    a rank hangs      nobody made progress for max(hang_seconds, 10 x the median step); who is silent is to blame, else
                      who made least progress: the others wait for it. All leave their stacks and end with 75

They end by os._exit: a main thread that waits in a collective cannot be asked.
"""

import contextlib
import faulthandler
import itertools
import math
import os
import selectors
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from lad_dist.config.errors import EXIT_FAULT, Fault, UserError
from lad_dist.distributed import processes
from lad_dist.distributed.cluster_state import (
    GRACE,
    NO_PROGRESS_YET,
    ClusterState,
    Diagnosis,
    Failure,
    Peer,
    ProgressMark,
)
from lad_dist.distributed.connections import FLUSH_SECONDS, connect_all

HEARTBEAT_SECONDS = 1.0  # seconds between the lines of a rank
SILENT_BEATS = 5  # beats without a line after which a rank counts as silent, once nobody makes progress
START_SECONDS = 600.0  # compilation, the first collectives
MIN_STEPS = 3  # after which there is a median
MEDIAN_WINDOW = 64  # steps


class Watchdog:
    """See the module. hang_seconds: 0 looks for no hangs, only for deaths. start_seconds: in place of it before
    there is a median, where it is more. In a thread that is not the main one, as a search's trial, it does nothing:
    who ends such a process is not ours to say."""

    def __init__(self, stacks: Path, hang_seconds: float = 60.0, start_seconds: float = START_SECONDS) -> None:
        self.rank = processes.rank()
        self._hang_seconds = hang_seconds or math.inf
        self._start_seconds = max(start_seconds, self._hang_seconds)
        self._beat = min(HEARTBEAT_SECONDS, self._hang_seconds / 10)
        self._path = stacks / f"rank-{self.rank:05}.txt"
        self._mark = NO_PROGRESS_YET
        self._pauses = 0
        self._begun: deque[float] = deque(maxlen=MEDIAN_WINDOW + 1)  # when the last steps began
        self._file: TextIO | None = None
        self._leaving: dict[str, Any] | None = None  # the last words
        self._thread: threading.Thread | None = None

    def mark(self, step: int, phase: str, slot: int = 0) -> None:
        """The main thread begins this phase of this micro-batch."""
        before = self._mark
        if step != before.step or not self._begun:
            self._begun.append(time.monotonic())
        self._mark = ProgressMark(before.number + 1, step, phase, slot)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody counts as hanging while any rank is in here."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        if not faulthandler.is_enabled():
            faulthandler.enable(sys.__stderr__ or 2)
        members = processes.all_gather(Peer(socket.gethostname(), os.getpid(), _pid_namespace()))
        self._links = connect_all(len({member.space for member in members}) == 1)
        self._roster = ClusterState(members, time.monotonic())
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            processes.barrier()  # until all are here, a death is seen
        self._leaving = {"bye": True} if error is None else {"failed": _failure(error)}
        self._may_follow = isinstance(error, Exception) and not isinstance(error, UserError | Fault)
        self._wake.send(b".")
        self._thread.join()
        self._thread = None
        for end in (self._woken, self._wake, *(link.socket for link in self._links.values())):
            end.close()
        self._tidy()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._woken, selectors.EVENT_READ, None)
        for rank, link in self._links.items():
            selector.register(link.socket, selectors.EVENT_READ, rank)
        due = self._beaten = time.monotonic()
        leave = math.inf
        while (now := time.monotonic()) < leave:
            for key, _ in selector.select(max(0.0, min(due, leave) - now)):
                if key.data is None:
                    selector.unregister(self._woken)
                    leave = self._last_words()
                elif not self._read(key.data):
                    selector.unregister(key.fileobj)
            if time.monotonic() >= due:
                self._look()
                due = time.monotonic() + self._beat

    def _last_words(self) -> float:
        """Says why this rank leaves, and until when it listens to the others before it does."""
        assert self._leaving is not None
        for link in self._links.values():
            link.send(**self._leaving)
        if not self._may_follow or not self._links:
            return 0.0
        now = time.monotonic()
        self._roster.on_failure(self.rank, Failure(*self._leaving["failed"]), now)
        return now + GRACE + self._beat

    def _read(self, rank: int) -> bool:
        """Takes what another rank says; whether it may say more."""
        link, member = self._links[rank], self._roster.peers[rank]
        messages, stands = link.receive()
        for message in messages:
            self._hear(rank, message)
        if not stands and not member.left and member.failure is None:
            self._end(self._roster.diagnose_death(rank))
        return stands

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "mark" in message:
            self._roster.on_heartbeat(rank, ProgressMark(*message["mark"]), message["paused"], now)
        elif "failed" in message:
            self._roster.on_failure(rank, Failure(*message["failed"]), now)
        elif "end" in message:
            self._leave_all(Diagnosis(**message["end"]))
        else:
            self._roster.peers[rank].left = True

    def _look(self) -> None:
        """Says where this rank stands, and looks at where all do."""
        now, bound = time.monotonic(), self._bound()
        if now - self._beaten > bound / 2:
            self._roster.reset_timers(now)
        self._beaten = now
        paused = self._pauses > 0
        self._roster.on_heartbeat(self.rank, self._mark, paused, now)
        for link in self._links.values():
            if not link.clogged:
                link.send(mark=self._mark, paused=paused)
        self._arm(math.inf if paused or not self._mark.number else bound)
        verdict = self._roster.diagnose_failure(now) or self._hang(now, bound)
        if verdict is not None:
            self._end(verdict)

    def _bound(self) -> float:
        """Seconds without progress that are a hang."""
        begun = list(self._begun)
        if len(begun) <= MIN_STEPS:
            return self._start_seconds
        median = statistics.median(b - a for a, b in itertools.pairwise(begun))
        return max(self._hang_seconds, 10 * median)

    def _arm(self, bound: float) -> None:
        """Stacks even of a process none of whose threads runs, because one of them keeps Python's lock."""
        if math.isfinite(bound):
            faulthandler.dump_traceback_later(bound, file=self._stacks())
        else:
            faulthandler.cancel_dump_traceback_later()

    def _hang(self, now: float, bound: float) -> Diagnosis | None:
        """Rank 0 hears all and decides; the others hear it alone and decide on it."""
        if self.rank == 0:
            return self._roster.diagnose_hang(now, bound, SILENT_BEATS * self._beat, range(len(self._roster.peers)))
        verdict = self._roster.diagnose_hang(now, bound, SILENT_BEATS * self._beat, (0, self.rank))
        return verdict if verdict is not None and 0 in verdict.silent else None

    def _end(self, verdict: Diagnosis) -> None:
        """Ends all ranks, this one too unless it failed by itself: then its main thread is on its way."""
        if self.rank in verdict.ranks and not verdict.stacks:
            return
        for link in self._links.values():
            link.send(end=verdict._asdict())
        if self.rank == self._speaker(verdict):
            os.write(2, f"{verdict.line}: all processes end\n".encode())
        self._leave_all(verdict)

    def _speaker(self, verdict: Diagnosis) -> int:
        """Rank 0, or where it is to blame the first of each host: all of them have found it."""
        here = self._roster.peers[self.rank].pid_namespace
        heirs = (rank for rank, member in enumerate(self._roster.peers) if rank and member.pid_namespace == here)
        return next(heirs, 0) if 0 in verdict.ranks else 0

    def _leave_all(self, verdict: Diagnosis) -> None:
        if self.rank in verdict.ranks and not verdict.stacks:
            return
        try:
            if verdict.stacks:
                self._leave_stacks(verdict.line)
            self._await_others()
            for rank in verdict.silent:
                self._kill(self._roster.peers[rank])
            self._tidy()
            _flush()
        finally:  # whatever else is broken
            os._exit(verdict.code)

    def _leave_stacks(self, line: str) -> None:
        file = self._stacks()
        with contextlib.suppress(OSError):
            file.write(f"{line}\n")
            file.flush()
        faulthandler.dump_traceback(file)

    def _await_others(self) -> None:
        """Until the others have read the last words, or for a second."""
        end = time.monotonic() + FLUSH_SECONDS
        while time.monotonic() < end and any(link.receive()[1] for link in self._links.values()):
            time.sleep(0.02)

    def _stacks(self) -> TextIO:
        """Opened while nothing hangs yet, but not before there is a run that may: a mistake leaves no trace. Where the
        disk takes no file, the log has to do."""
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a")
            except OSError:
                self._file = open(os.dup(2), "w")  # noqa: SIM115 (for as long as the watchdog runs)
        return self._file

    def _tidy(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # it is gone, or others have left something beside it
            self._file.close()
            if self._path.stat().st_size == 0:
                self._path.unlink()
                self._path.parent.rmdir()

    def _kill(self, member: Peer) -> None:
        """A stopped process would keep its memory and its device. Elsewhere its id is another process's."""
        if member.pid_namespace == _pid_namespace() and member.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member.pid, signal.SIGKILL)


def _failure(error: BaseException) -> Failure:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    code = getattr(error, "code", EXIT_FAULT)
    return Failure(text[:300], code if isinstance(code, int) else EXIT_FAULT)


def _pid_namespace() -> str:
    """What two processes have in common that mean the same one by an id: a running kernel, a name space in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _flush() -> None:
    """What was printed gets out, unless its reader does not read."""

    def flush() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(FLUSH_SECONDS)
