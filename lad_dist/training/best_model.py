"""Which student a run exports: the one of the last step, or with `run.best_metric` the one of its best evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.config.schema import CorpusDataConfig, RunConfig, TrainConfig
from lad_dist.core.step_state import StepState
from lad_dist.data.shards.reader import Shards
from lad_dist.data.tasks.task import Task
from lad_dist.distributed import processes
from lad_dist.runs.search_record import cost
from lad_dist.training.distiller import Distiller
from lad_dist.utils.suggest import did_you_mean

LOYALTY = ("label_loyalty", "probability_loyalty")
NUMBER_LOYALTY = ("teacher_pearson",)  # of a regression
LOSS = "loss"


def score_names(config: TrainConfig, task: Task | None) -> list[str]:
    """Return the names of a student's scores, a task's first metric first; a corpus has the held-out loss alone."""
    if task is None:
        return [LOSS]
    loyalty = NUMBER_LOYALTY if task.kind == "regression" else LOYALTY
    return [*task.metrics, *(loyalty if config.teacher else ()), LOSS]


def check_metric(key: str, metric: str, name: str, known: Sequence[str]) -> None:
    """Raise UserError where a metric is not among those that are known of `name`; `key` is where it is set."""
    if metric not in known:
        raise UserError(f'{key}: {name} has no "{metric}", it has {", ".join(known)}; {did_you_mean(metric, known)}')


def check_best_metric(config: TrainConfig, task: Task | None) -> None:
    """Raise UserError where the evaluations of a run do not give `run.best_metric`."""
    metric = config.run.best_metric
    if metric is None:
        return
    check_metric("run.best_metric", metric, config.run.name if task is None else task.name, score_names(config, task))
    if isinstance(config.data, CorpusDataConfig) and not Shards(config.data.shards, "held_out").streams:
        raise UserError(
            f"run.best_metric: {config.data.shards} has no held-out text; prepare the corpus with held_out above 0"
        )


def check_evaluations(config: RunConfig, distiller: Distiller, steps: int) -> None:
    """Raise UserError where compressions leave no evaluation before the last step that `run.best_metric` may choose."""
    if config.best_metric is None:
        return
    evaluations = range(config.eval_every, steps, config.eval_every)
    if evaluations and not any(distiller.is_final(StepState(step - 1, steps, config.seed)) for step in evaluations):
        raise UserError(
            f"run.best_metric: the compression changes the student's form after each of the {len(evaluations)} "
            f"evaluations before step {steps}, so that none can be the best; set the end of the compression, or "
            "run.eval_every, to less"
        )


@dataclass
class BestModel:
    """The best evaluation of a run so far.

    Attributes:
        metric: What decides; None where the last step is exported.
        patience: Evaluations in a row without improvement that end the training; 0 is never.
        step: Of the best evaluation; 0 before the first.
        value: Its metric.
        without_improvement: Evaluations since then, all of them in a row.
    """

    metric: str | None
    patience: int
    step: int = 0
    value: float = 0.0
    without_improvement: int = 0
    _last: int = 0  # evaluation

    def update(self, step: int, scores: Mapping[str, float]) -> bool:
        """Take note of an evaluation; return whether it is the best so far, the same on all processes.

        A score that is missing or not finite is never the best; of equal ones the first is.
        """
        if self.metric is None:
            return False
        self._last = step
        value = processes.from_main(scores.get(self.metric, math.nan))
        is_best = math.isfinite(value) and (not self.step or cost(self.metric, value) < cost(self.metric, self.value))
        if is_best:
            self.step, self.value, self.without_improvement = step, value, 0
        elif self.step:
            self.without_improvement += 1
        return is_best

    @property
    def ends_training(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.without_improvement

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that a resumed run chooses as one that did not stop."""
        return {"step": self.step, "value": self.value, "without_improvement": self.without_improvement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what a checkpoint stored."""
        self.step, self.value, self.without_improvement = (
            state[key] for key in ("step", "value", "without_improvement")
        )

    def last_step(self, steps: int) -> int:
        """Return how many of `steps` steps were made in the end."""
        return self._last if self.ends_training else steps

    def summary(self, steps: int, data: str) -> str:
        """Return in words which student was exported, and whether training ended before the last of `steps` steps.

        `data` names what the student was evaluated on.
        """
        last = self.last_step(steps)
        if self.metric is None:
            return f"the last step, {last:,}"
        if not self.step:
            return f"the last step, {last:,}, as {data} {self.metric} was a number in no evaluation"
        text = f"best {data} {self.metric} at step {self.step:,} of {steps:,}"
        if last == steps:
            return text
        return (
            f"{text}; stopped early at step {last:,}, after {self.without_improvement} evaluations without improvement"
        )
