"""What a person sees of a running search: a line for each trial that ends, and a table every half minute."""

import time
from collections.abc import Mapping
from datetime import timedelta

from lad_dist.distributed.logs import get_logger
from lad_dist.runs.search_record import TrialState, cost
from lad_dist.search.plan import SearchPlan
from lad_dist.search.record import SearchRecord
from lad_dist.utils import progress
from lad_dist.utils.text import plain_number

TABLE_SECONDS = 30.0
MOST_VALUES = 4  # of a sample, in a line

logger = get_logger(__name__)


class StatusTable:
    """Shows how far a search is."""

    def __init__(self, plan: SearchPlan, record: SearchRecord):
        self._plan = plan
        self._record = record
        self._last = time.monotonic()
        self._begun = time.monotonic()
        self._ended_before = self._num_ended()

    def show_score(self, trial: TrialState) -> None:
        """Show an evaluation beside the bar."""
        progress.report(self._name, self._num_ended(), self._total(), f"{trial.name} step {trial.step}")

    def show_end(self, trial: TrialState) -> None:
        """Show how a trial ended."""
        score = f"  {self._score(trial)}" if trial.values else ""
        details = f": {trial.error}" if trial.error else f"{score}  {describe(trial.sample)}"
        step = f" at step {trial.step}" if trial.step and trial.status != "failed" else ""
        logger.info("%s %s%s%s", trial.name, trial.status, step, details.rstrip())
        progress.report(self._name, self._num_ended(), self._total(), "trials")

    def show(self, running: Mapping[str, float]) -> None:
        """Show the table, if it was not shown just now."""
        if time.monotonic() - self._last < TABLE_SECONDS:
            return
        self._last = time.monotonic()
        for line in self.lines(running):
            logger.info("%s", line)

    def lines(self, running: Mapping[str, float]) -> list[str]:
        """Return the table: counts, the best trial, the time left, and a line for each running trial."""
        ended, total = self._num_ended(), self._total()
        counts = f"{ended} done, {len(running)} running, {max(0, total - ended - len(running))} to come"
        left = self._time_left(ended, total)
        lines = [f"{self._name}: {counts}{f', about {left} left' if left else ''}"]
        if best := self._best():
            lines.append(f"  best  {best.name}  {self._score(best)}  {describe(best.sample)}")
        for name, begun in sorted(running.items()):
            trial = self._record.trials[name]
            seconds = timedelta(seconds=round(time.monotonic() - begun))
            score = f"step {trial.step}  {self._score(trial)}" if trial.values else "no evaluation yet"
            lines.append(f"  {name}  {seconds}  {score}  {describe(trial.sample)}".rstrip())
        return lines

    @property
    def _name(self) -> str:
        return self._plan.config.search.name

    def _total(self) -> int:
        return self._plan.count(self._record)

    def _num_ended(self) -> int:
        return sum(trial.status not in (None, "lost") for trial in self._record.trials.values())

    def _time_left(self, ended: int, total: int) -> timedelta | None:
        done = ended - self._ended_before
        if not done:
            return None
        return timedelta(seconds=round((time.monotonic() - self._begun) / done * max(0, total - ended)))

    def _score(self, trial: TrialState) -> str:
        names = self._plan.metrics if self._plan.space is not None else [self._plan.metric(trial.name)]
        return "  ".join(f"{name} {plain_number(trial.values[name])}" for name in names if name in trial.values)

    def _best(self) -> TrialState | None:
        """Return the best trial of a space by one metric; of a grid or a front none is the best."""
        if self._plan.space is None or len(self._plan.metrics) > 1:
            return None
        metric, best = self._plan.metrics[0], None
        for trial in self._record.trials.values():
            if metric in trial.values and (
                best is None or cost(metric, trial.values[metric]) < cost(metric, best.values[metric])
            ):
                best = trial
        return best


def describe(sample: Mapping[str, object]) -> str:
    """Return a sample in a few words: the last part of each key, and its value."""
    pairs = [
        f"{key.rpartition('.')[2]} {plain_number(value) if isinstance(value, float) else value}"
        for key, value in list(sample.items())[:MOST_VALUES]
    ]
    return ", ".join(pairs) + (" …" if len(sample) > MOST_VALUES else "")
