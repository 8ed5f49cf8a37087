"""What is known of all ranks at a time, and what follows from it: a pure state machine without sockets or threads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lad_dist.config.errors import EXIT_FAULT, EXIT_RUN_AGAIN

GRACE = 2.0  # seconds in which others may fail alike, or a failure may turn out to be another's death
MAX_NAMED = 4  # ranks in one line


class ProgressMark(NamedTuple):
    """Where a main thread stands. `number` grows with each mark."""

    number: int
    step: int
    phase: str
    micro_batch: int

    def __str__(self) -> str:
        return (
            f"in step {self.step}, {self.phase}, micro-batch {self.micro_batch}"
            if self.number
            else "before its first step"
        )


NO_PROGRESS_YET = ProgressMark(0, 0, "", 0)


class Failure(NamedTuple):
    text: str
    code: int


@dataclass
class Peer:
    """A rank as the others know it. `space` tells whose process ids mean the same."""

    host: str
    pid: int
    pid_namespace: str
    mark: ProgressMark = NO_PROGRESS_YET
    paused: bool = False
    left: bool = False
    last_heard: float = 0.0  # when
    failure: Failure | None = None


class Diagnosis(NamedTuple):
    """Why all end. `ranks` are to blame, of these `silent` cannot end by themselves."""

    code: int
    line: str
    ranks: list[int]
    silent: list[int] = []  # noqa: RUF012 (never changed)
    stacks: bool = False


class ClusterState:
    """What is known of all ranks at a time `now`, in seconds of any clock."""

    def __init__(self, members: Sequence[Peer], now: float) -> None:
        self.peers = list(members)
        self.failed: list[int] = []  # in the order in which they did
        self.failed_at = 0.0
        self.reset_timers(now)

    def reset_timers(self, now: float) -> None:
        """Counts time from now on: before, this process itself was stopped."""
        self.last_progress = now
        for member in self.peers:
            member.last_heard = now

    def on_heartbeat(self, rank: int, mark: ProgressMark, paused: bool, now: float) -> None:
        member = self.peers[rank]
        if paused or member.mark != mark:
            self.last_progress = now
        member.mark, member.paused, member.last_heard = mark, paused, now

    def on_failure(self, rank: int, failure: Failure, now: float) -> None:
        self.failed_at = self.failed_at if self.failed else now
        self.failed.append(rank)
        self.peers[rank].failure = failure

    def diagnose_death(self, rank: int) -> Diagnosis:
        return Diagnosis(EXIT_FAULT, f"{self._name(rank)} died, last seen {self.peers[rank].mark}", [rank])

    def diagnose_failure(self, now: float) -> Diagnosis | None:
        """The first that failed brings all down, after the grace."""
        if not self.failed or now - self.failed_at < GRACE:
            return None
        first = self.failed[0]
        failure = self.peers[first].failure
        assert failure is not None
        return Diagnosis(failure.code, f"{self._name(first)} failed: {failure.text}", [first])

    def diagnose_hang(self, now: float, bound: float, silence: float, known: Iterable[int]) -> Diagnosis | None:
        """Who keeps the others waiting, of the `known` ranks, where none of these moved within `bound`."""
        still = now - self.last_progress
        here = [rank for rank in known if not self.peers[rank].left]
        if still <= bound or not here:
            return None
        silent = [rank for rank in here if now - self.peers[rank].last_heard > silence]
        least = min(self.peers[rank].mark.number for rank in here)
        blamed = silent or [rank for rank in here if self.peers[rank].mark.number == least]
        names = ", ".join(f"{self._name(rank)} {self.peers[rank].mark}" for rank in blamed[:MAX_NAMED])
        more = f" and {len(blamed) - MAX_NAMED} more" if len(blamed) > MAX_NAMED else ""
        how = "no answer" if silent else "no progress"
        return Diagnosis(EXIT_RUN_AGAIN, f"{how} for {still:.0f} s: {names}{more}", blamed, silent, stacks=True)

    def _name(self, rank: int) -> str:
        member = self.peers[rank]
        return f"rank {rank} on {member.host} (pid {member.pid})"
