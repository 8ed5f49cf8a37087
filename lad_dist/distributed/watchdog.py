"""Find a rank that died or hangs, name it, and end all ranks so that nobody waits for it.

    Watchdog(stacks, timeout)               around the loop, on every rank, after processes.start()
    watchdog.mark(step, phase, micro_batch) progress of the main thread, by the same marks on every rank; an assignment
    watchdog.paused()                       around what takes long without a mark

A thread on each rank sends a line a second over TCP connections with rank 0 in the middle. It diagnoses:

    a rank died       Its connection ends without a goodbye, or its host does not acknowledge. The others name it and
                      end with 1. (A process that is merely stopped still acknowledges: its kernel does.)
    a rank failed     It sends its exception when that leaves the `with`. The others end with the exception's `code`, or
                      1, unless their own loops end in the meantime: all ranks meet a user's mistake alike.
    a rank hangs      Nobody made progress for max(timeout, 10 x the median step). Silent ranks are to blame, else those
                      with the least progress: the others wait for them. All write their stacks and end with 75.

They end by os._exit, because a main thread that waits in a collective cannot react.
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
    """The thread that finds dead and hung ranks, as a context manager; see the module.

    In a thread that is not the main one, as in a search's trial, it does nothing: it must not end that process.
    """

    def __init__(self, stacks: Path, timeout: float = 60.0, start_timeout: float = START_SECONDS) -> None:
        """Prepare the watchdog.

        Args:
            stacks: The folder of the stacks that hung ranks write.
            timeout: Seconds without progress that are a hang; 0 finds deaths alone.
            start_timeout: Replaces `timeout` before there is a median step, where it is larger.
        """
        self.rank = processes.rank()
        self._timeout = timeout or math.inf
        self._start_timeout = max(start_timeout, self._timeout)
        self._beat_seconds = min(HEARTBEAT_SECONDS, self._timeout / 10)
        self._stacks_path = stacks / f"rank-{self.rank:05}.txt"
        self._mark = NO_PROGRESS_YET
        self._pauses = 0
        self._step_starts: deque[float] = deque(maxlen=MEDIAN_WINDOW + 1)  # times of the last steps
        self._stacks_file: TextIO | None = None
        self._farewell: dict[str, Any] | None = None  # the last message
        self._thread: threading.Thread | None = None

    def mark(self, step: int, phase: str, micro_batch: int = 0) -> None:
        """Record that the main thread begins this phase of this micro-batch."""
        previous = self._mark
        if step != previous.step or not self._step_starts:
            self._step_starts.append(time.monotonic())
        self._mark = ProgressMark(previous.number + 1, step, phase, micro_batch)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nobody as hanging while any rank is within this context."""
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
        peers = processes.all_gather(Peer(socket.gethostname(), os.getpid(), _pid_namespace()))
        self._connections = connect_all(len({peer.pid_namespace for peer in peers}) == 1)
        self._cluster = ClusterState(peers, time.monotonic())
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            processes.barrier()  # until all are here, a death is noticed
        self._farewell = {"bye": True} if error is None else {"failed": _failure(error)}
        # Another rank's death or failure may have caused this error: then this rank ends by that diagnosis.
        self._awaits_blame = isinstance(error, Exception) and not isinstance(error, UserError | Fault)
        self._wake_sender.send(b".")
        self._thread.join()
        self._thread = None
        sockets = (connection.socket for connection in self._connections.values())
        for end in (self._wake_receiver, self._wake_sender, *sockets):
            end.close()
        self._close_stacks()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wake_receiver, selectors.EVENT_READ, None)
        for rank, connection in self._connections.items():
            selector.register(connection.socket, selectors.EVENT_READ, rank)
        due = self._last_beat = time.monotonic()
        end = math.inf
        while (now := time.monotonic()) < end:
            for key, _ in selector.select(max(0.0, min(due, end) - now)):
                if key.data is None:
                    selector.unregister(self._wake_receiver)
                    end = self._send_farewell()
                elif not self._receive(key.data):
                    selector.unregister(key.fileobj)
            if time.monotonic() >= due:
                self._beat()
                due = time.monotonic() + self._beat_seconds

    def _send_farewell(self) -> float:
        """Send why this rank leaves; return until when it listens to the others before it does."""
        assert self._farewell is not None
        for connection in self._connections.values():
            connection.send(**self._farewell)
        if not self._awaits_blame or not self._connections:
            return 0.0
        now = time.monotonic()
        self._cluster.on_failure(self.rank, Failure(*self._farewell["failed"]), now)
        return now + GRACE + self._beat_seconds

    def _receive(self, rank: int) -> bool:
        """Take another rank's messages; return whether its connection stands."""
        peer = self._cluster.peers[rank]
        messages, stands = self._connections[rank].receive()
        for message in messages:
            self._on_message(rank, message)
        if not stands and not peer.left and peer.failure is None:
            self._end_all(self._cluster.diagnose_death(rank))
        return stands

    def _on_message(self, rank: int, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "mark" in message:
            self._cluster.on_heartbeat(rank, ProgressMark(*message["mark"]), message["paused"], now)
        elif "failed" in message:
            self._cluster.on_failure(rank, Failure(*message["failed"]), now)
        elif "end" in message:
            self._exit(Diagnosis(**message["end"]))
        else:
            self._cluster.peers[rank].left = True

    def _beat(self) -> None:
        """Send this rank's position, and diagnose the state of all."""
        now, timeout = time.monotonic(), self._current_timeout()
        if now - self._last_beat > timeout / 2:  # this process itself was stopped
            self._cluster.reset_timers(now)
        self._last_beat = now
        paused = self._pauses > 0
        self._cluster.on_heartbeat(self.rank, self._mark, paused, now)
        for connection in self._connections.values():
            if not connection.clogged:
                connection.send(mark=self._mark, paused=paused)
        self._schedule_stacks(math.inf if paused or not self._mark.number else timeout)
        diagnosis = self._cluster.diagnose_failure(now) or self._diagnose_hang(now, timeout)
        if diagnosis is not None:
            self._end_all(diagnosis)

    def _current_timeout(self) -> float:
        """Return the seconds without progress that are a hang."""
        starts = list(self._step_starts)
        if len(starts) <= MIN_STEPS:
            return self._start_timeout
        median = statistics.median(b - a for a, b in itertools.pairwise(starts))
        return max(self._timeout, 10 * median)

    def _schedule_stacks(self, timeout: float) -> None:
        """Let faulthandler write the stacks if no beat follows: one thread may hold Python's lock and stop all."""
        if math.isfinite(timeout):
            faulthandler.dump_traceback_later(timeout, file=self._open_stacks())
        else:
            faulthandler.cancel_dump_traceback_later()

    def _diagnose_hang(self, now: float, timeout: float) -> Diagnosis | None:
        """Diagnose a hang: rank 0 hears all and decides; the others hear it alone and judge it alone."""
        silence = SILENT_BEATS * self._beat_seconds
        if self.rank == 0:
            return self._cluster.diagnose_hang(now, timeout, silence, range(len(self._cluster.peers)))
        diagnosis = self._cluster.diagnose_hang(now, timeout, silence, (0, self.rank))
        return diagnosis if diagnosis is not None and 0 in diagnosis.silent else None

    def _end_all(self, diagnosis: Diagnosis) -> None:
        """End all ranks, this one too unless it failed by itself: then its main thread is about to end it."""
        if self.rank in diagnosis.ranks and not diagnosis.stacks:
            return
        for connection in self._connections.values():
            connection.send(end=diagnosis._asdict())
        if self.rank == self._reporting_rank(diagnosis):
            # Not by a logger: the main thread may hold its lock, and never release it.
            os.write(2, f"{diagnosis.line}: all processes end\n".encode())
        self._exit(diagnosis)

    def _reporting_rank(self, diagnosis: Diagnosis) -> int:
        """Return rank 0, or where it is to blame the first other rank of each host: all ranks have the diagnosis."""
        namespace = self._cluster.peers[self.rank].pid_namespace
        neighbors = (rank for rank, peer in enumerate(self._cluster.peers) if rank and peer.pid_namespace == namespace)
        return next(neighbors, 0) if 0 in diagnosis.ranks else 0

    def _exit(self, diagnosis: Diagnosis) -> None:
        if self.rank in diagnosis.ranks and not diagnosis.stacks:
            return
        try:
            if diagnosis.stacks:
                self._write_stacks(diagnosis.line)
            self._await_others()
            for rank in diagnosis.silent:
                self._kill(self._cluster.peers[rank])
            self._close_stacks()
            _flush_output()
        finally:  # whatever else is broken
            os._exit(diagnosis.code)

    def _write_stacks(self, line: str) -> None:
        file = self._open_stacks()
        with contextlib.suppress(OSError):
            file.write(f"{line}\n")
            file.flush()
        faulthandler.dump_traceback(file)

    def _await_others(self) -> None:
        """Wait until the others have read the last messages, or for FLUSH_SECONDS."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while time.monotonic() < deadline and any(peer.receive()[1] for peer in self._connections.values()):
            time.sleep(0.02)

    def _open_stacks(self) -> TextIO:
        """Open the file for the stacks while nothing hangs yet, but not before a run has begun that may hang.

        So a user's mistake leaves no file behind. Where the disk takes no file, standard error has to do.
        """
        if self._stacks_file is None:
            try:
                self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
                self._stacks_file = self._stacks_path.open("a")
            except OSError:
                self._stacks_file = open(os.dup(2), "w")  # noqa: SIM115 (for as long as the watchdog runs)
        return self._stacks_file

    def _close_stacks(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._stacks_file is None:
            return
        with contextlib.suppress(OSError):  # the file is gone, or other ranks have files beside it
            self._stacks_file.close()
            if self._stacks_path.stat().st_size == 0:
                self._stacks_path.unlink()
                self._stacks_path.parent.rmdir()

    def _kill(self, peer: Peer) -> None:
        """Kill a stopped process, which would keep its memory and its device; elsewhere its id is another process's."""
        if peer.pid_namespace == _pid_namespace() and peer.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(peer.pid, signal.SIGKILL)


def _failure(error: BaseException) -> Failure:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    code = getattr(error, "code", EXIT_FAULT)
    return Failure(text[:300], code if isinstance(code, int) else EXIT_FAULT)


def _pid_namespace() -> str:
    """Return what processes share in which an id means the same process: a running kernel and a name space in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _flush_output() -> None:
    """Flush what was printed, unless its reader does not read."""

    def flush() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(FLUSH_SECONDS)
