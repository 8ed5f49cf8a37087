"""Learning from labels alone: `task` from a task's, `mlm` from the masked tokens themselves (Devlin et al., 2019)."""

from torch import Tensor

from lad_dist.flat import Batch, Needs, Shape, Trace
from lad_dist.objectives import losses
from lad_dist.objectives.objective import Objective


class Labels(Objective):
    """L = CE(z, y), squared error for regression."""

    taught = False
    student_needs = Needs(logits=True)

    def __init__(self, student: Shape, teacher: Shape | None):
        super().__init__()
        self.head = student.head

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        assert student.logits is not None
        return {"hard": losses.hard(student.logits, batch, self.head)}


class Task(Labels):
    runs_on = ("task",)


class MLM(Labels):
    runs_on = ("corpus",)
