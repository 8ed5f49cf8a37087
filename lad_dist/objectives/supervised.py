"""Learning from labels alone: `task` from a task's, `mlm` from the masked tokens themselves (Devlin et al., 2019)."""

from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective


class _SupervisedObjective(Objective):
    """L = CE(z, y), squared error for regression."""

    requires_teacher = False
    student_outputs = OutputSpec(logits=True)

    def __init__(self, student: ModelDims, teacher: ModelDims | None):
        super().__init__()
        self.head = student.head

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert student.logits is not None
        return {"hard": losses.hard(student.logits, batch, self.head)}


class Supervised(_SupervisedObjective):
    supported_data = ("task",)


class MLM(_SupervisedObjective):
    supported_data = ("corpus",)
