"""The rows of metrics that a training reports: into the run folder, and to whoever called `train`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any

from lad_dist.distributed import processes, ranks
from lad_dist.distributed.logs import get_logger
from lad_dist.distributed.watchdog import Watchdog
from lad_dist.models.dims import count_parameters
from lad_dist.models.loading import PreTrainedModel
from lad_dist.runs.run_folder import Run
from lad_dist.training.evaluation import Scores
from lad_dist.training.optimization import optimizer_metrics
from lad_dist.training.trainer import RunStatus, Trainer
from lad_dist.utils import progress
from lad_dist.utils.text import plain_number, si_number

Row = dict[str, Any]
Report = Callable[[Row], None]

TIMED_STEPS = 5  # for the estimate of a run's time

logger = get_logger(__name__)


def silent(row: Row) -> None:
    """Report nothing: the run folder has all rows."""


@dataclass
class Reporter:
    """Reports rows. The methods that take nothing but the number of steps done are hooks."""

    run: Run
    report: Report
    trainer: Trainer
    watchdog: Watchdog
    choose: Callable[[int, Scores], RunStatus | None]
    _first: int = 0  # step of this session
    _clock: float = 0.0

    def start(self, first: int) -> None:
        """Report what is known before the first step.

        Data, models, steps and device; in a new run also initial values of the student, and the teacher's scores.
        """
        name, trainer = self.trainer.config.run.name, self.trainer
        for line in summary(trainer):
            logger.info("%s: %s", name, line)
        if first > 0:
            logger.info("%s: resumed from step %d of %d", name, first, trainer.steps)
        else:
            teacher = trainer.evaluation.teacher_scores()
            if teacher:
                scores = "  ".join(f"{metric} {plain_number(value)}" for metric, value in teacher.items())
                logger.info("%s step 0/%d  teacher %s", name, trainer.steps, scores)
            values = trainer.engine.module.initial_values | _prefixed("teacher", teacher)
            if values:
                self.record(0, values)
        self._first = first
        self.show_step(first)

    def show_step(self, step: int) -> None:
        """Show how far the run is, on a terminal; its texts are those of the last rows."""
        progress.report(self.trainer.config.run.name, step, self.trainer.steps)

    def estimate(self, step: int) -> None:
        """Log how long the run will take, once its first steps show it."""
        done = step - self._first
        if done == 1:  # the first step is slower than others
            self._clock = monotonic()
        elif done == 1 + TIMED_STEPS and step < self.trainer.steps:
            seconds = (monotonic() - self._clock) / TIMED_STEPS
            left = timedelta(seconds=round(seconds * (self.trainer.steps - step)))
            name = self.trainer.config.run.name
            logger.info("%s: about %s to go at %.3g s a step, without evaluation", name, left, seconds)

    def log(self, step: int) -> None:
        """Report the means since the last row, learning rates and the norm of the gradients."""
        self.record(step, self.trainer.metrics.row() | optimizer_metrics(self.trainer.engine))

    def evaluate(self, step: int) -> RunStatus | None:
        """Report the student's scores on what it does not train on; `choose` decides whether training goes on."""
        with self.watchdog.paused():
            scores = self.trainer.evaluate()
            self.record_scores(step, scores)
        return self.choose(step, scores)

    def record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Report scores of the student, if there are any."""
        if scores:
            self.record(step, _prefixed("dev", scores))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Report a row."""
        row = {"step": step, **values}
        self.run.record(row)
        self.report(row | {"steps": self.trainer.steps})


def summary(trainer: Trainer) -> list[str]:
    """Return what a run is, in lines for a person: data, models, steps and device."""
    config, teacher = trainer.config, trainer.evaluation.teacher
    models = {"student": trainer.engine.module.student, **({"teacher": teacher.model} if teacher else {})}
    sizes = [f"{role} {_size(model)}" for role, model in models.items()]
    world = ranks.world_size()
    count = f"{world} processes" if world > 1 else "1 process"
    micro_batches = config.data.micro_batches_per_step
    steps = f"{trainer.steps:,} steps of {micro_batches} micro-batch{'es' * (micro_batches > 1)}"
    precision = "bf16" if trainer.engine.bfloat16_enabled() else "fp16" if trainer.engine.fp16_enabled() else "fp32"
    return [
        trainer.dataset.description,
        "; ".join(sizes),
        f"{steps} on {processes.device_name()}, {count}, {precision}",
    ]


def _size(model: PreTrainedModel) -> str:
    config = model.config
    parameters = si_number(count_parameters(model))
    layers = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)}"
    return f"{parameters} parameters, {layers} x {config.hidden_size}"


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
