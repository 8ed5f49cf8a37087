"""The record of a search, `trials.jsonl`, as it is read: what is known of each trial.

    {"event": "begin", "trial": "trial-003", "sample": {…}, "parameters": {…}, "seed": 0}
    {"event": "score", "trial": "trial-003", "step": 200, "values": {"accuracy": 0.81}}
    {"event": "pause", "trial": "trial-003", "seconds": 20.5}
    {"event": "end", "trial": "trial-003", "status": "completed", "values": {…}, "step": 400, "seconds": 61.5}

`search.record` writes it; reading is apart, as a report of a search reads it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lad_dist.config.errors import UserError
from lad_dist.utils.strict_json import parse_json

# completed: it trained to its end. stopped: the scheduler ended it. failed: its training raised an error. refused: its
# student is above [limit]. lost: its process or node went away too often. A trial without a status runs or will run.
Status = Literal["completed", "stopped", "failed", "refused", "lost"]

MINIMISED = {"loss", "latency", "parameters", "flops", "bytes"}  # metrics that are the better the smaller

FIELDS: dict[str, Any] = {
    "trial": str, "sample": dict, "parameters": dict | None, "seed": int, "step": int, "values": dict, "status": str,
    "seconds": int | float, "error": str | None,
}  # fmt: skip


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

    @property
    def has_result(self) -> bool:
        """Whether the last values count: it trained to the end, or was stopped as others did better."""
        return self.status in ("completed", "stopped")

    @property
    def sample_name(self) -> str:
        """The name of the trial of the same sample with the first seed."""
        return self.name.removesuffix(f"-seed{self.seed}") if self.seed else self.name


def cost(metric: str, value: float) -> float:
    """Return the value of a metric, with a sign that makes the smaller one the better."""
    return value if metric in MINIMISED else -value


def read_trials(file: Path) -> dict[str, TrialState]:
    """Return the trials of a record by name, in the order in which they began; none where there is no file.

    A last line without an end is one that is being written, or that a crash cut off: it counts for nothing.

    Raises:
        UserError: A line is damaged, or the file cannot be read.
    """
    trials: dict[str, TrialState] = {}
    try:
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            event = parse_json(line)
            _check_fields(event)
            apply_event(trials, event)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}:{number}: damaged ({type(error).__name__}: {error}); remove the line to forget it"
            ) from None
    return trials


def _check_fields(event: Any) -> None:
    """Raise TypeError where a field is not of its kind."""
    if not isinstance(event, dict):
        raise TypeError("no JSON object")
    for name, value in event.items():
        if name in FIELDS and not isinstance(value, FIELDS[name]):
            raise TypeError(f"{name} is {value!r}")
    for metric, value in event.get("values", {}).items():
        if not isinstance(value, int | float):
            raise TypeError(f"{metric} is {value!r}")


def apply_event(trials: dict[str, TrialState], event: Mapping[str, Any]) -> None:
    """Change what is known of trials by one event."""
    name = event["trial"]
    match event["event"]:
        case "begin":
            state = TrialState(name, event["sample"], event["parameters"], event["seed"])
            trial = trials.setdefault(name, state)
            trial.status = trial.error = None
        case "score":
            trial = trials[name]
            trial.scores = [row for row in trial.scores if row[0] < event["step"]]  # it may run a step again
            trial.scores.append((event["step"], event["values"]))
            trial.values, trial.step = trial.values | event["values"], event["step"]
        case "pause":
            trials[name].seconds += event["seconds"]
        case "end":
            trial = trials[name]
            trial.status, trial.error = event["status"], event.get("error")
            trial.values = trial.values | event.get("values", {})
            trial.step = event.get("step", trial.step)
            trial.seconds += event["seconds"]
        case other:
            raise ValueError(f"unknown event {other}")
