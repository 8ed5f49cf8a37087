"""Scores of student and teacher on what a run does not train on: a task's dev set, or the held-out text of a corpus.

All processes call the methods together. The teacher's scores are empty where it predicts nothing that can be scored.
"""

from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.data.datasets import CorpusDataset
from lad_dist.evaluation import evaluate
from lad_dist.evaluation.evaluate import Dev, DevPredictions
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import FrozenModel
from lad_dist.objectives.losses import hard_label_loss
from lad_dist.training.distiller import Distiller

Scores = dict[str, float]


@dataclass
class TaskEvaluation:
    """The metrics of a task. The teacher predicts once."""

    distiller: Distiller
    teacher: FrozenModel | None
    dev: Dev
    teacher_dev: Dev  # the same examples in the teacher's tokens

    def student_scores(self) -> Scores:
        return evaluate.task_scores(self.dev, self._student_predictions())

    def teacher_scores(self) -> Scores:
        predictions = self._teacher_predictions
        return {} if predictions is None else evaluate.task_scores(self.teacher_dev, predictions)

    def compare(self) -> dict[str, Scores]:
        """Return the scores of "student" and "teacher"."""
        return evaluate.compare(self.dev, self._student_predictions(), self.teacher_dev, self._teacher_predictions)

    def _student_predictions(self) -> DevPredictions:
        self.distiller.eval()
        return evaluate.predict_all(self._logits, self.dev)

    def _logits(self, batch: Batch) -> Tensor:
        logits = compute_outputs(self.distiller.student, batch, evaluate.LOGITS).logits
        assert logits is not None
        return logits

    @cached_property
    def _teacher_predictions(self) -> DevPredictions | None:
        if self.teacher is None:
            return None
        return evaluate.predict_all(partial(evaluate.logits_of, self.teacher), self.teacher_dev)


@dataclass
class CorpusEvaluation:
    """The student's loss terms, and the MLM loss of a teacher that has the head for it."""

    distiller: Distiller
    teacher: FrozenModel | None
    dataset: CorpusDataset
    teacher_has_head: bool

    def student_scores(self) -> Scores:
        self.distiller.eval()
        return evaluate.mean_terms(self._student_terms, self.dataset.held_out)

    def teacher_scores(self) -> Scores:
        return evaluate.mean_terms(self._teacher_terms, self.dataset.held_out) if self.teacher_has_head else {}

    def compare(self) -> dict[str, Scores]:
        return {"student": self.student_scores()}

    def _student_terms(self, batch: Batch) -> dict[str, Tensor]:
        target = self.teacher(batch, self.distiller.objective.teacher_spec) if self.teacher else None
        loss, terms = self.distiller(batch, target)
        return {"loss": loss, **terms}

    def _teacher_terms(self, batch: Batch) -> dict[str, Tensor]:
        assert self.teacher is not None
        return {"mlm_loss": hard_label_loss(evaluate.logits_of(self.teacher, batch), batch, "mlm")}


Evaluation = TaskEvaluation | CorpusEvaluation
