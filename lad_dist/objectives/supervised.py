"""Learning from labels alone: those of a task, or the masked tokens of a corpus."""

from typing import ClassVar, Literal

from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective


class Supervised(Objective):
    """Supervised training on a task, L = CE(z, y); squared error for regression, binary CE for several labels.

    z [R, V] are the student's logits, y the labels (Devlin et al., NAACL 2019).
    """

    supported_data: ClassVar[tuple[Literal["corpus", "task"], ...]] = ("task",)
    requires_teacher = False
    learns_from_labels = True
    student_spec = OutputSpec(logits=True)

    def __init__(self, student: ModelDims, teacher: ModelDims | None):
        """Build the objective for a student; `teacher` is None."""
        super().__init__()
        self.head = student.head

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return "hard", the loss against the labels of the batch."""
        assert student.logits is not None
        return {"hard": losses.hard_label_loss(student.logits, batch, self.head)}


class MLM(Supervised):
    """Masked language modelling on a corpus, L = CE(z, y) (Devlin et al., NAACL 2019).

    z [R, V] are the logits of the MLM head at the masked positions, y the tokens that stood there.
    """

    supported_data = ("corpus",)
