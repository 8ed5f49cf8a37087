"""The ranks that one rank hears, and whom to blame: a state machine without sockets and threads."""

from collections.abc import Sequence
from typing import NamedTuple

from lad_dist.config.errors import EXIT_FAULT, EXIT_RUN_AGAIN

MAX_NAMED = 4  # ranks in one line


class Heartbeat(NamedTuple):
    """The message of a rank that lives. `marks` is the number of its marks, `position` the last one."""

    marks: int = 0
    position: str = "before the first step"
    paused: bool = False


class Diagnosis(NamedTuple):
    """The message that ends all ranks but the `lost` ones: these died, failed or are silent."""

    code: int
    line: str
    lost: list[int]
    hang: bool = False
    grace: float = 0.0  # seconds until then


class ClusterState:
    """The last heartbeats of ranks. Times are seconds of any clock."""

    def __init__(self, names: Sequence[str], ranks: Sequence[int], now: float) -> None:
        """Begin with a heartbeat of each of `ranks`; `names` are those of all ranks."""
        self.names = names
        self.heartbeats = dict.fromkeys(ranks, Heartbeat())
        self.reset_timers(now)

    def reset_timers(self, now: float) -> None:
        """Count time from now on: before, this process itself was stopped."""
        self.last_progress = now
        self.last_heard = dict.fromkeys(self.heartbeats, now)

    def on_heartbeat(self, rank: int, heartbeat: Heartbeat, now: float) -> None:
        """Record the heartbeat of a rank."""
        if heartbeat.paused or heartbeat.marks != self.heartbeats[rank].marks:
            self.last_progress = now
        self.heartbeats[rank], self.last_heard[rank] = heartbeat, now

    def silent_ranks(self, now: float, silence: float) -> list[int]:
        """Return the ranks without a heartbeat for more than `silence` seconds."""
        return [rank for rank, heard in self.last_heard.items() if now - heard > silence]

    def diagnose_death(self, rank: int) -> Diagnosis:
        """Return the diagnosis for a rank whose connection ended although it did not fail."""
        return Diagnosis(EXIT_FAULT, f"{self.names[rank]} died, last seen {self.heartbeats[rank].position}", [rank])

    def diagnose_hang(self, now: float, timeout: float, silence: float) -> Diagnosis | None:
        """Blame the silent ranks, else those with the least progress, where nobody made any for `timeout` seconds."""
        seconds = now - self.last_progress
        if seconds <= timeout:
            return None
        silent = self.silent_ranks(now, silence)
        least = min(heartbeat.marks for heartbeat in self.heartbeats.values())
        blamed = silent or [rank for rank, heartbeat in self.heartbeats.items() if heartbeat.marks == least]
        names = ", ".join(f"{self.names[rank]} {self.heartbeats[rank].position}" for rank in blamed[:MAX_NAMED])
        more = f" and {len(blamed) - MAX_NAMED} more" if len(blamed) > MAX_NAMED else ""
        symptom = "no answer" if silent else "no progress"
        return Diagnosis(EXIT_RUN_AGAIN, f"{symptom} for {seconds:.0f} s: {names}{more}", silent, hang=True)
