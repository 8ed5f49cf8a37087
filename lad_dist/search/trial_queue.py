"""The trials that Tune is given, and what it says about them."""

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import Searcher

from lad_dist.config.errors import UserError
from lad_dist.runs.search_record import Status, TrialState
from lad_dist.search.plan import SearchPlan, next_name
from lad_dist.search.record import SearchRecord
from lad_dist.search.status import StatusTable
from lad_dist.search.trial import Trial

if TYPE_CHECKING:
    from lad_dist.search.sampler import SpaceSampler

MOST_REFUSED = 200  # samples in a row above the limit, after which the search ends


class TrialQueue(Searcher):
    """Hands out trials: those that are known, then samples as long as there are to be more.

    Attributes:
        mistake: What ended the queue: a sample that does not fit the schema of a run.
        may_stop: Whether the scheduler may stop these trials early.
        begun: When each running trial began, by name.
        is_ending: Whether the search ends, so that Tune ends trials for no reason of their own.
    """

    is_ending: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(
        self,
        plan: SearchPlan,
        record: SearchRecord,
        known: Sequence[TrialState],
        sampler: "SpaceSampler | None" = None,
        *,
        may_stop: bool,
    ):
        super().__init__()
        self.may_stop = may_stop
        self.begun: dict[str, float] = {}
        self.mistake: str | None = None
        self._plan = plan
        self._record = record
        self._known = deque(known)
        self._sampler = sampler
        self._names: dict[str, str] = {}
        self._unfinished: set[str] = set()

    @property
    def is_empty(self) -> bool:
        """Whether all trials were handed out and have ended."""
        more = self._sampler is not None and self._plan.samples_left(self._record)
        return not self._known and not more and not self._unfinished

    def name_of(self, trial_id: str) -> str:
        """Return the name of one of Tune's trials."""
        return self._names[trial_id]

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial for Tune."""
        try:
            trial = self._next()
        except UserError as error:
            self.mistake = str(error)
            trial = None
        if trial is None:
            return Searcher.FINISHED
        self._names[trial_id] = trial.name
        self._unfinished.add(trial.name)
        return {"request": trial.request()}

    def _next(self) -> Trial | None:
        if self._known:
            state = self._known.popleft()
            if state.name not in self._record.trials or state.status is not None:
                self._record.begin(state)
            return self._plan.build(state)
        if self._sampler is None:
            return None
        for _ in range(MOST_REFUSED):
            if not self._plan.samples_left(self._record):
                return None
            name = next_name(self._record)
            parameters, sample = self._sampler.draw(name)
            state = TrialState(name, sample.choices, parameters)
            trial = self._plan.build(state)
            self._record.begin(state)
            excess = self._plan.excess(trial)
            if excess is None:
                return trial
            self._record.end(name, "refused", error=excess)
            self._sampler.learn(name, None)
        raise UserError(f"limit: none of {MOST_REFUSED} samples in a row keeps to it; the last: {excess}")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Learn nothing from an evaluation: a sample counts by its last values."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record that the scheduler stopped a trial where nothing else ended it; let the sampler learn from it."""
        if self.is_ending():
            return
        name = self._names[trial_id]
        state = self._record.trials[name]
        if state.status is None and not error:
            self._record.end(name, "stopped", seconds=self.seconds(name))
        self._unfinished.discard(name)
        if self._sampler is not None and state.parameters is not None:
            self._sampler.learn(name, state.values if state.has_result else None)

    def seconds(self, name: str) -> float:
        """Return the time since a trial began, which ends now."""
        return time.monotonic() - self.begun.pop(name, time.monotonic())

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the record has all that counts."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: Any) -> "TrialQueue":
        return self


def next_queue(plan: SearchPlan, record: SearchRecord, *, again: Collection[Status]) -> TrialQueue | None:
    """Return what has to run next; None where nothing is left."""
    known = plan.unfinished(record, again=again)
    if plan.space is None:
        return TrialQueue(plan, record, known, may_stop=False) if known else None
    if known or plan.samples_left(record):
        if not record.trials and plan.base_sample is not None:
            known = [TrialState(next_name(record), plan.base_sample)]
        sampler = _sampler(plan, record, [trial.name for trial in known])
        return TrialQueue(plan, record, known, sampler, may_stop=len(plan.metrics) == 1)
    repetitions = plan.repetitions(record, again=again)
    return TrialQueue(plan, record, repetitions, may_stop=False) if repetitions else None


def _sampler(plan: SearchPlan, record: SearchRecord, unfinished: Sequence[str]) -> "SpaceSampler":
    """Return a sampler that has seen what became of the samples so far."""
    from lad_dist.search.sampler import SpaceSampler  # noqa: PLC0415 (optuna is an extra, which a grid does not need)

    assert plan.space is not None
    options = plan.config.search
    drawn = [trial for trial in plan.samples(record) if trial.parameters is not None]
    points = [*(trial.parameters or {} for trial in drawn), *plan.points[len(drawn) :]]
    sampler = SpaceSampler(plan.space, options.algorithm, plan.directions, options.seed, points)
    for trial in drawn:
        sampler.draw(trial.name)
        if trial.name not in unfinished:
            sampler.learn(trial.name, trial.values if trial.has_result else None)
    return sampler


class StatusCallback(tune.Callback):
    """Records what happens to trials, and shows it.

    Attributes:
        mistake: What the user has to mend: a trial that could not begin to train.
    """

    def __init__(self, plan: SearchPlan, record: SearchRecord, queue: TrialQueue, end: Callable[[], None]):
        self.mistake: str | None = None
        self._record = record
        self._queue = queue
        self._end = end
        self._table = StatusTable(plan, record)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Note when a trial begins."""
        self._queue.begun[self._queue.name_of(trial.trial_id)] = time.monotonic()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Record an evaluation, or the end of a training."""
        name = self._queue.name_of(trial.trial_id)
        state = self._record.trials[name]
        match result.get("status"):
            case None:
                if "values" in result:
                    self._record.score(name, result["step"], result["values"])
                    self._table.show_score(state)
            case "mistake":
                self.mistake = self.mistake or f"{name}: {result['error']}"
                self._end()
            case "failed":
                self._record.end(name, "failed", seconds=self._queue.seconds(name), error=result["error"])
            case _:
                end = {"values": result["values"], "step": result["step"]}
                self._record.end(name, "completed", seconds=self._queue.seconds(name), **end)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Show how a trial ended."""
        if not self._queue.is_ending():
            self._table.show_end(self._record.trials[self._queue.name_of(trial.trial_id)])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record that a trial was lost for good."""
        name = self._queue.name_of(trial.trial_id)
        if not self._queue.is_ending():
            self._record.end(name, "lost", seconds=self._queue.seconds(name), error=_first_line(trial))
            self._table.show_end(self._record.trials[name])

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Show the table now and then."""
        self._table.show(self._queue.begun)

    def close(self) -> None:
        """Record the time of trials that run while the search ends."""
        for name in list(self._queue.begun):
            self._record.pause(name, self._queue.seconds(name))


def _first_line(trial: Any) -> str:
    """Return why Tune gave a trial up: the first line of the error, which says what was lost."""
    error = trial.get_error()
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] if error else []
    return lines[0] if lines else "a process or node was lost"
