"""Find a rank that died or hangs, name it, and end all ranks so that nobody waits for it.

    Watchdog(stacks, timeout)               around the loop, on every rank, after processes.start()
    watchdog.mark(step, phase, micro_batch) progress of the main thread, by the same marks on every rank; an assignment
    watchdog.paused()                       around what takes long without a mark

A thread on each rank exchanges a heartbeat a second with rank 0, which decides; the others watch rank 0 alone:

    a rank died       Its connection ends, or its host does not acknowledge. The others name it and end with 1. (A
                      process that is merely stopped still acknowledges: its kernel does.)
    a rank failed     It sends its exception when that leaves the `with`. The others end with the exception's `code`, or
                      1, unless their own loops end in the meantime: all ranks meet a user's mistake alike.
    a rank hangs      Nobody made progress for max(timeout, 10 x the median step). Silent ranks are to blame, else those
                      with the least progress: the others wait for them. All write their stacks and end with 75.

They end by os._exit, because a main thread that waits in a collective cannot react. Launchers do not replace this: they
see deaths alone, and torchrun waits half a minute for a stopped process to end. Nor does a TCPStore: its server does
not tell who died, and its clients wait for a stopped server beyond every timeout.
"""

import contextlib
import faulthandler
import itertools
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from lad_dist.config.errors import EXIT_FAULT, Fault, UserError
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.cluster_state import ClusterState, Diagnosis, Heartbeat
from lad_dist.distributed.connections import connect_all

HEARTBEAT_SECONDS = 1.0
SILENT_BEATS = 5  # beats without a heartbeat after which a rank counts as silent, once nobody makes progress
GRACE = 2.0  # seconds in which others may fail alike, or a failure may turn out to be another's death
FLUSH_SECONDS = 0.2  # for the others to read the diagnosis
STACKS_SECONDS = 1.0  # for the others to write their stacks, before this rank or a launcher kills them
START_SECONDS = 600.0  # of a hang before there is a median step: compilation, the first collectives
MIN_STEPS = 3  # after which there is a median
MEDIAN_WINDOW = 64  # steps


class Watchdog:
    """The thread that finds dead and hung ranks, as a context manager; see the module.

    In a thread that is not the main one, as in a search's trial, it does nothing: it must not end that process.
    """

    def __init__(self, stacks: Path, timeout: float) -> None:
        """Prepare the watchdog.

        Args:
            stacks: The folder of the stacks that hung ranks write.
            timeout: Seconds without progress that are a hang; 0 finds deaths alone.
        """
        self.rank = ranks.rank()
        self._timeout = timeout or math.inf
        self._beat_seconds = min(HEARTBEAT_SECONDS, self._timeout / 10)
        self._stacks_path = stacks / f"rank-{self.rank:05}.txt"
        self._heartbeat = Heartbeat()
        self._pauses = 0
        self._step = -1
        self._step_starts: deque[float] = deque(maxlen=MEDIAN_WINDOW + 1)  # times of the last steps
        self._failures: dict[int, tuple[float, Diagnosis]] = {}  # when the others end by them; the first one counts
        self._is_blamed = False  # for a failure: the main thread is about to end this process
        self._thread: threading.Thread | None = None

    def mark(self, step: int, phase: str, micro_batch: int = 0) -> None:
        """Record that the main thread begins this phase of this micro-batch."""
        if step != self._step:
            self._step = step
            self._step_starts.append(time.monotonic())
        self._heartbeat = Heartbeat(self._heartbeat.marks + 1, f"in step {step}, {phase}, micro-batch {micro_batch}")

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
        # Process ids mean the same in one name space of a running kernel.
        namespace = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        peers = processes.all_gather((socket.gethostname(), os.getpid(), namespace))
        self._local_pids = {rank: pid for rank, (_, pid, other) in enumerate(peers) if other == namespace}
        self._connections = connect_all()
        names = [f"rank {rank} on {host} (pid {pid})" for rank, (host, pid, _) in enumerate(peers)]
        self._state = ClusterState(names, [self.rank, *self._connections], time.monotonic())
        self._inbox, self._outbox = Pipe(duplex=False)
        self._stacks = self._open_stacks()
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
        else:
            code = getattr(error, "code", EXIT_FAULT)
            line = " ".join(f"{self._state.names[self.rank]} failed: {type(error).__name__}: {error}".split())[:400]
            self._outbox.send(Diagnosis(code if isinstance(code, int) else EXIT_FAULT, line, [self.rank], grace=GRACE))
            if self._connections and isinstance(error, Exception) and not isinstance(error, UserError | Fault):
                # Another rank's death or failure may be the cause: then that ends this rank.
                self._thread.join(2 * GRACE)
        self._outbox.send(None)
        self._thread.join()
        self._thread = None
        if error is None:
            processes.barrier()  # no thread is left that takes the end of a connection for a death
        for connection in (self._inbox, self._outbox, *self._connections.values()):
            connection.close()
        self._close_stacks()

    def _run(self) -> None:
        """Take messages, those of the main thread too, until that sends None or this rank is to blame for the end."""
        ranks = {connection: rank for rank, connection in self._connections.items()} | {self._inbox: self.rank}
        due = time.monotonic()
        while not self._is_blamed:
            for connection in ranks.keys() & set(wait(list(ranks), max(0.0, due - time.monotonic()))):
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    rank = ranks.pop(connection)
                    if rank not in self._failures:
                        self._end_all(self._state.diagnose_death(rank))
                    continue
                if message is None:
                    return
                self._on_message(ranks[connection], message)
            if (now := time.monotonic()) >= due:
                self._beat(now, now - due)
                due = time.monotonic() + self._beat_seconds

    def _on_message(self, rank: int, message: Heartbeat | Diagnosis) -> None:
        now = time.monotonic()
        if isinstance(message, Heartbeat):
            self._state.on_heartbeat(rank, message, now)
        elif message.grace:
            self._failures[rank] = (now + message.grace, message._replace(grace=0.0))
            if rank == self.rank:
                self._send(message)
        else:
            self._end_all(message)

    def _send(self, message: Heartbeat | Diagnosis, silent: Sequence[int] = ()) -> None:
        """Send a message, but not to the `silent` ranks: they take none, and this thread must not wait for them."""
        for rank in self._connections.keys() - set(silent):
            with contextlib.suppress(OSError):  # a broken connection shows when it is read
                self._connections[rank].send(message)

    def _beat(self, now: float, late: float) -> None:
        """Send this rank's position, and diagnose the state of all."""
        state, timeout, silence = self._state, self._current_timeout(), SILENT_BEATS * self._beat_seconds
        if late > timeout / 2:
            state.reset_timers(now)
        heartbeat = self._heartbeat._replace(paused=self._pauses > 0)
        state.on_heartbeat(self.rank, heartbeat, now)
        self._send(heartbeat, state.silent_ranks(now, silence))
        end, failure = next(iter(self._failures.values()), (math.inf, None))
        hang = state.diagnose_hang(now, timeout, silence)
        if failure is not None and now >= end:
            self._end_all(failure)
        elif hang is not None and (self.rank == 0 or 0 in hang.lost):
            self._end_all(hang)
        faulthandler.cancel_dump_traceback_later()
        if not heartbeat.paused and math.isfinite(timeout):
            # One thread may hold Python's lock and stop this one, until the others name this rank.
            faulthandler.dump_traceback_later(max(silence, state.last_progress + timeout - now), file=self._stacks)

    def _current_timeout(self) -> float:
        """Return the seconds without progress that are a hang."""
        starts = list(self._step_starts)
        if len(starts) <= MIN_STEPS:
            return max(START_SECONDS, self._timeout)
        median = statistics.median(b - a for a, b in itertools.pairwise(starts))
        return max(self._timeout, 10 * median)

    def _end_all(self, diagnosis: Diagnosis) -> None:
        """End all ranks, this one too unless it failed by itself: then its main thread is about to end it."""
        self._send(diagnosis)
        self._is_blamed = self.rank in diagnosis.lost and not diagnosis.hang
        if self._is_blamed:
            return
        try:
            faulthandler.cancel_dump_traceback_later()
            line = f"{diagnosis.line}: all processes end\n".encode()
            if self.rank == min(set(range(ranks.world_size())) - set(diagnosis.lost), default=0):
                os.write(2, line)  # not by a logger: the main thread may hold its lock, and never release it
            if diagnosis.hang:
                with contextlib.suppress(OSError):
                    os.write(self._stacks.fileno(), line)
                faulthandler.dump_traceback(self._stacks)
            time.sleep(STACKS_SECONDS if diagnosis.hang else FLUSH_SECONDS)
            stopped = set(diagnosis.lost) - {self.rank} if diagnosis.hang else set()  # they keep memory and device
            for rank in stopped & self._local_pids.keys():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self._local_pids[rank], signal.SIGKILL)
            self._close_stacks()
        finally:  # whatever else is broken
            os._exit(diagnosis.code)

    def _open_stacks(self) -> TextIO:
        """Open the file for the stacks while nothing hangs yet. Where the disk takes none, standard error has to do."""
        with contextlib.suppress(OSError):
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            return self._stacks_path.open("a")
        return open(os.dup(2), "w")

    def _close_stacks(self) -> None:
        """Close the file, and remove it where it is empty."""
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # the file is gone, or other ranks have files beside it
            self._stacks.close()
            if self._stacks_path.stat().st_size == 0:
                self._stacks_path.unlink()
                self._stacks_path.parent.rmdir()
