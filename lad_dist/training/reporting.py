"""The rows of metrics that a training reports: into the run folder, and to whoever called `train`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lad_dist.distributed.logs import get_logger
from lad_dist.distributed.watchdog import Watchdog
from lad_dist.runs.run_folder import Run
from lad_dist.training.optimization import optimizer_metrics
from lad_dist.training.trainer import Trainer
from lad_dist.utils.text import plain_number

Row = dict[str, Any]
Report = Callable[[Row], None]

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

    def start(self) -> None:
        """Report what is known before the first step: initial values of the student, and the teacher's scores."""
        teacher = self.trainer.evaluation.teacher_scores()
        if teacher:
            scores = "  ".join(f"{name} {plain_number(value)}" for name, value in teacher.items())
            logger.info("%s step 0/%d  teacher %s", self.trainer.config.run.name, self.trainer.steps, scores)
        values = self.trainer.engine.module.initial_values | _prefixed("teacher", teacher)
        if values:
            self.record(0, values)

    def log(self, step: int) -> None:
        """Report the means since the last row, learning rates and the norm of the gradients."""
        self.record(step, self.trainer.metrics.row() | optimizer_metrics(self.trainer.engine))

    def evaluate(self, step: int) -> None:
        """Report the student's scores on what it does not train on."""
        with self.watchdog.paused():
            self.record_scores(step, self.trainer.evaluate())

    def record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Report scores of the student."""
        self.record(step, _prefixed("dev", scores))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Report a row."""
        row = {"step": step, **values}
        self.run.record(row)
        self.report(row | {"steps": self.trainer.steps})


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
