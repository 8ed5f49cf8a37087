"""The record of a search: a line for each thing that happened to a trial, on disk before it counts.

Everything that Tune or Optuna knew can be told to them again from these lines; `runs.search_record` says what they hold
and reads them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lad_dist.runs.search_record import Status, TrialState, apply_event, read_trials
from lad_dist.utils.atomic_io import append_text, fsync


class SearchRecord:
    """The trials of a search, in the order in which they began."""

    def __init__(self, file: Path):
        self.file = file
        if file.exists():
            _remove_cut_off_line(file)
        self.trials = read_trials(file)

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
        apply_event(self.trials, event)


def _remove_cut_off_line(file: Path) -> None:
    """Remove what follows the last whole line."""
    lines = file.read_bytes()
    whole = lines.rfind(b"\n") + 1
    if whole < len(lines):
        with file.open("r+b") as opened:
            opened.truncate(whole)
