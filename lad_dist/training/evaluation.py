"""Scores of student and teacher on what a run does not train on: a task's dev set, or the held-out text of a corpus.

All processes call the methods together. The teacher's scores are empty where it predicts nothing that can be scored.
Outputs that are not finite have no scores: they end the run, but for those of a student in the midst of training, which
may yet go back to an earlier checkpoint.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar

from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.data.datasets import CorpusDataset
from lad_dist.data.tasks.examples import Thresholds
from lad_dist.distributed import processes
from lad_dist.distributed.logs import get_logger
from lad_dist.evaluation import evaluate
from lad_dist.evaluation.baseline import weakness
from lad_dist.evaluation.evaluate import Dev, DevPredictions
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import FrozenModel
from lad_dist.objectives.losses import hard_label_loss
from lad_dist.training.distiller import Distiller

Scores = dict[str, float]

BROKEN_STUDENT = "the student's outputs are not finite: no scores of this step"

logger = get_logger(__name__)


@dataclass
class TaskEvaluation:
    """The metrics of a task. The teacher predicts once."""

    distiller: Distiller
    teacher: FrozenModel | None
    dev: Dev
    teacher_dev: Dev  # the same examples in the teacher's tokens
    test: Dev  # the test set in the place of a dev set; empty where there is none
    teacher_test: Dev
    thresholds: dict[str, Thresholds] = field(default_factory=dict)  # of labels, tuned on dev by `compare`; by role

    def check_teacher(self, baseline_check: bool) -> None:
        """Raise UserError where the teacher is broken, or with `baseline_check` where it has a `weakness`."""
        predictions = self._teacher_predictions
        if self.teacher is None or predictions is None or not baseline_check:
            return
        reason = weakness(self.teacher, self.teacher_dev["dev"], predictions["dev"].logits)
        if reason is not None:
            raise UserError(f"{self.teacher.path}: {reason}; teacher.baseline_check = false trains nevertheless")

    def student_scores(self) -> Scores:
        """Return the student's metrics, loss and loyalty, none where its outputs are not finite."""
        predictions = self._student_predictions()
        if any(dev_predictions.broken_rows for dev_predictions in predictions.values()):
            logger.warning(BROKEN_STUDENT)
            return {}
        return evaluate.compare(self.dev, predictions, self.teacher_dev, self._teacher_predictions)["student"]

    def teacher_scores(self) -> Scores:
        predictions = self._teacher_predictions
        return {} if predictions is None else evaluate.task_scores(self.teacher_dev, predictions)

    def compare(self) -> dict[str, Scores]:
        """Return the scores of "student" and "teacher" on the dev set, on which this tunes their thresholds.

        Raises:
            UserError: The logits of one are not finite.
        """
        student, teacher = self._student_predictions(), self._teacher_predictions
        evaluate.check_finite("the student", student)
        self.thresholds = {"student": self.dev["dev"].tuned_thresholds(student["dev"].logits)}
        if teacher is not None:
            self.thresholds["teacher"] = self.teacher_dev["dev"].tuned_thresholds(teacher["dev"].logits)
        return evaluate.compare(self.dev, student, self.teacher_dev, teacher, self.thresholds)

    def compare_on_test(self) -> dict[str, Scores]:
        """Return the scores of "student" and "teacher" on the test set, with thresholds tuned on the dev set.

        There are none where there is no test set.

        Raises:
            UserError: The logits of one are not finite.
        """
        if not self.test:
            return {}
        self.distiller.eval()
        student = evaluate.predict_all(self._logits, self.test)
        evaluate.check_finite("the student", student)
        teacher = self._predictions_of_teacher(self.teacher_test)
        return evaluate.compare(self.test, student, self.teacher_test, teacher, self.thresholds)

    def _student_predictions(self) -> DevPredictions:
        self.distiller.eval()
        return evaluate.predict_all(self._logits, self.dev)

    def _logits(self, batch: Batch) -> Tensor:
        logits = compute_outputs(self.distiller.student, batch, evaluate.LOGITS).logits
        assert logits is not None
        return logits

    @cached_property
    def _teacher_predictions(self) -> DevPredictions | None:
        return self._predictions_of_teacher(self.teacher_dev)

    def _predictions_of_teacher(self, examples: Dev) -> DevPredictions | None:
        if self.teacher is None:
            return None
        predictions = evaluate.predict_all(partial(evaluate.logits_of, self.teacher), examples)
        evaluate.check_finite(self.teacher.path, predictions)
        return predictions


@dataclass
class CorpusEvaluation:
    """The student's loss terms, and the MLM loss of a teacher that has the head for it."""

    distiller: Distiller
    teacher: FrozenModel | None
    dataset: CorpusDataset
    teacher_has_head: bool
    thresholds: ClassVar[Mapping[str, Thresholds]] = {}  # a corpus has no labels

    def check_teacher(self, baseline_check: bool) -> None:
        """Raise UserError where what the objective reads of the teacher is not finite in the first micro-batch."""
        if self.teacher is None:
            return
        batch = self.dataset.batch(0, 0).to(processes.device())
        outputs = self.teacher(batch, self.distiller.objective.teacher_spec)
        tensors = [outputs.logits, *outputs.hidden.values(), *itertools.chain(*outputs.qkv.values())]
        if not all(bool(x.isfinite().all()) for x in tensors if x is not None):
            raise UserError(f"{self.teacher.path}: broken, as outputs are not finite in the first micro-batch")

    def student_scores(self) -> Scores:
        """Return the student's terms, none where one is not finite."""
        scores = self._mean_student_terms()
        if not all(map(math.isfinite, scores.values())):
            logger.warning(BROKEN_STUDENT)
            return {}
        return scores

    def teacher_scores(self) -> Scores:
        return evaluate.mean_terms(self._teacher_terms, self.dataset.held_out) if self.teacher_has_head else {}

    def compare(self) -> dict[str, Scores]:
        """Return the scores of "student".

        Raises:
            UserError: One of them is not finite.
        """
        scores = self._mean_student_terms()
        if broken := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise UserError(f"the student: broken, as {broken[0]} on held-out text is not finite")
        return {"student": scores}

    def compare_on_test(self) -> dict[str, Scores]:
        """Return nothing: a corpus has no test set."""
        return {}

    def _mean_student_terms(self) -> Scores:
        self.distiller.eval()
        return evaluate.mean_terms(self._student_terms, self.dataset.held_out)

    def _student_terms(self, batch: Batch) -> dict[str, Tensor]:
        target = self.teacher(batch, self.distiller.objective.teacher_spec) if self.teacher else None
        loss, terms = self.distiller(batch, target)
        return {"loss": loss, **terms}

    def _teacher_terms(self, batch: Batch) -> dict[str, Tensor]:
        assert self.teacher is not None
        return {"mlm_loss": hard_label_loss(evaluate.logits_of(self.teacher, batch), batch, "mlm")}


Evaluation = TaskEvaluation | CorpusEvaluation
