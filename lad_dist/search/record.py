"""The record of a search: a line for each thing that happened to a trial, on disk before it counts.

    {"event": "begin", "trial": "trial-003", "sample": {…}, "parameters": {…}, "seed": 0}
    {"event": "score", "trial": "trial-003", "step": 200, "values": {"accuracy": 0.81}}
    {"event": "end", "trial": "trial-003", "status": "completed", "values": {…}, "step": 400, "seconds": 61.5}

Everything that Tune or Optuna knew can be told to them again from these lines.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lad_dist.config.errors import UserError
from lad_dist.utils.atomic_io import append_text, fsync
from lad_dist.utils.strict_json import parse_json

# completed: it trained to its end. stopped: the scheduler ended it. failed: its training raised an error. refused: its
# student is above [limit]. lost: its process or node went away too often. A trial without a status runs or will run.
Status = Literal["completed", "stopped", "failed", "refused", "lost"]


@dataclass
class TrialState:
    """What is known of a trial.

    Attributes:
        name: of the trial and of its run folder.
        sample: Choices by axis, values by key.
        parameters: The same as Optuna stores it; None where it did not draw them.
        seed: Which of the seeds of its sample, from 0.
        status: How it ended; None while it has not.
        scores: (step, values of the metrics) of its evaluations.
        values: Its last values, by metric.
        seconds: that it ran.
        error: Why it failed, in one line.
    """

    name: str
    sample: dict[str, Any]
    parameters: dict[str, Any] | None = None
    seed: int = 0
    status: Status | None = None
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    error: str | None = None


class SearchRecord:
    """The trials of a search, in the order in which they began."""

    def __init__(self, file: Path):
        self.file = file
        self.trials: dict[str, TrialState] = {}
        if file.exists():
            self._read()

    def _read(self) -> None:
        text = self.file.read_text(encoding="utf-8", errors="replace")
        whole, newline, rest = text.rpartition("\n")
        if rest:  # a line that a crash cut off
            with self.file.open("r+b") as file:
                file.truncate(len(f"{whole}{newline}".encode()))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._apply(parse_json(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.file}:{number}: damaged ({type(error).__name__}: {error}); remove the line to forget it"
                ) from None

    def begin(self, trial: TrialState) -> None:
        """Record that a trial begins, or that one which failed or was lost begins again."""
        sample = {"sample": trial.sample, "parameters": trial.parameters, "seed": trial.seed}
        self._append({"event": "begin", "trial": trial.name, **sample})

    def score(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation."""
        self._append({"event": "score", "trial": name, "step": step, "values": dict(values)})

    def end(self, name: str, status: Status, *, seconds: float = 0.0, **details: Any) -> None:
        """Record how a trial ended; details are `values`, `step` and `error`."""
        self._append({"event": "end", "trial": name, "status": status, "seconds": seconds, **details})

    def pause(self, name: str, seconds: float) -> None:
        """Record that the search ends before the trial."""
        self._append({"event": "pause", "trial": name, "seconds": seconds})

    def _append(self, event: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_text(self.file, json.dumps(event) + "\n")
        fsync(self.file)
        self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        name = event["trial"]
        match event["event"]:
            case "begin":
                state = TrialState(name, event["sample"], event["parameters"], event["seed"])
                trial = self.trials.setdefault(name, state)
                trial.status = trial.error = None
            case "score":
                trial = self.trials[name]
                trial.scores = [row for row in trial.scores if row[0] < event["step"]]  # it may run a step again
                trial.scores.append((event["step"], event["values"]))
                trial.values, trial.step = trial.values | event["values"], event["step"]
            case "pause":
                self.trials[name].seconds += event["seconds"]
            case "end":
                trial = self.trials[name]
                trial.status, trial.error = event["status"], event.get("error")
                trial.values = trial.values | event.get("values", {})
                trial.step = event.get("step", trial.step)
                trial.seconds += event["seconds"]
            case other:
                raise ValueError(f"unknown event {other}")
