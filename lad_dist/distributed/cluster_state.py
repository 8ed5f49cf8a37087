"""The state of all ranks at a time, and what follows from it: a state machine without sockets and threads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lad_dist.config.errors import EXIT_FAULT, EXIT_RUN_AGAIN

GRACE = 2.0  # seconds in which others may fail alike, or a failure may turn out to be another's death
MAX_NAMED = 4  # ranks in one line


class ProgressMark(NamedTuple):
    """The position of a main thread. `number` grows with each mark."""

    number: int
    step: int
    phase: str
    micro_batch: int

    def __str__(self) -> str:
        if not self.number:
            return "before the first step"
        return f"in step {self.step}, {self.phase}, micro-batch {self.micro_batch}"


NO_PROGRESS_YET = ProgressMark(0, 0, "", 0)


class Failure(NamedTuple):
    """The exception that ended a rank, in one line, and its exit code."""

    text: str
    code: int


@dataclass
class Peer:
    """A rank as the others know it. Process ids mean the same in equal `pid_namespace`s."""

    host: str
    pid: int
    pid_namespace: str
    mark: ProgressMark = NO_PROGRESS_YET
    paused: bool = False
    left: bool = False
    last_heard: float = 0.0  # time of the last message
    failure: Failure | None = None


class Diagnosis(NamedTuple):
    """Why all ranks end. `ranks` are to blame; the `silent` ones among them cannot end by themselves."""

    code: int
    line: str
    ranks: list[int]
    silent: list[int] = []  # noqa: RUF012 (never changed)
    stacks: bool = False


class ClusterState:
    """The state of all ranks at a time `now`, in seconds of any clock."""

    def __init__(self, peers: Sequence[Peer], now: float) -> None:
        self.peers = list(peers)
        self.failed: list[int] = []  # in the order in which they did
        self.failed_at = 0.0
        self.reset_timers(now)

    def reset_timers(self, now: float) -> None:
        """Count time from now on: before, this process itself was stopped."""
        self.last_progress = now
        for peer in self.peers:
            peer.last_heard = now

    def on_heartbeat(self, rank: int, mark: ProgressMark, paused: bool, now: float) -> None:
        """Record the position of a rank."""
        peer = self.peers[rank]
        if paused or peer.mark != mark:
            self.last_progress = now
        peer.mark, peer.paused, peer.last_heard = mark, paused, now

    def on_failure(self, rank: int, failure: Failure, now: float) -> None:
        """Record that an exception ended a rank."""
        self.failed_at = self.failed_at if self.failed else now
        self.failed.append(rank)
        self.peers[rank].failure = failure

    def diagnose_death(self, rank: int) -> Diagnosis:
        """Return the diagnosis for a rank whose connection ended without a goodbye."""
        return Diagnosis(EXIT_FAULT, f"{self._name(rank)} died, last seen {self.peers[rank].mark}", [rank])

    def diagnose_failure(self, now: float) -> Diagnosis | None:
        """Blame the first rank that failed, once the grace is over."""
        if not self.failed or now - self.failed_at < GRACE:
            return None
        first = self.failed[0]
        failure = self.peers[first].failure
        assert failure is not None
        return Diagnosis(failure.code, f"{self._name(first)} failed: {failure.text}", [first])

    def diagnose_hang(self, now: float, timeout: float, silence: float, ranks: Iterable[int]) -> Diagnosis | None:
        """Blame who keeps the others waiting, where none of `ranks` made progress within `timeout`.

        Args:
            now: The time.
            timeout: Seconds without progress that are a hang.
            silence: Seconds without a message after which a rank counts as silent.
            ranks: The ranks that this process hears, itself among them.
        """
        seconds = now - self.last_progress
        present = [rank for rank in ranks if not self.peers[rank].left]
        if seconds <= timeout or not present:
            return None
        silent = [rank for rank in present if now - self.peers[rank].last_heard > silence]
        least = min(self.peers[rank].mark.number for rank in present)
        blamed = silent or [rank for rank in present if self.peers[rank].mark.number == least]
        names = ", ".join(f"{self._name(rank)} {self.peers[rank].mark}" for rank in blamed[:MAX_NAMED])
        more = f" and {len(blamed) - MAX_NAMED} more" if len(blamed) > MAX_NAMED else ""
        symptom = "no answer" if silent else "no progress"
        return Diagnosis(EXIT_RUN_AGAIN, f"{symptom} for {seconds:.0f} s: {names}{more}", blamed, silent, stacks=True)

    def _name(self, rank: int) -> str:
        peer = self.peers[rank]
        return f"rank {rank} on {peer.host} (pid {peer.pid})"
