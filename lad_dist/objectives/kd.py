"""Plain knowledge distillation (Hinton et al., 2015):

    L = hard · CE(z_s, y) + soft · T² KL(softmax(z_t / T) || softmax(z_s / T))

z are logits: of a task (for tagging at each word; for question answering over the tokens of a sequence, where the
answer begins and where it ends), or of the MLM head at the masked positions.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective

Weight = Annotated[float, Field(ge=0)]


class KD(Objective):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        super().__init__()
        if soft and teacher.head == "none":
            raise UserError(
                "objective.soft: the teacher has no head to learn from; set objective.soft = 0 or take minilm2"
            )
        self.soft, self.hard, self.temperature = soft, hard, temperature
        self.head = student.head
        self.student_outputs = OutputSpec(logits=bool(soft or hard))
        self.teacher_outputs = OutputSpec(logits=soft > 0)

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        terms = {}
        if self.hard:
            assert student.logits is not None
            terms["hard"] = self.hard * losses.hard(student.logits, batch, self.head)
        if self.soft:
            assert student.logits is not None
            assert teacher.logits is not None
            distance = losses.soft(student.logits, teacher.logits, batch, self.head, self.temperature)
            terms["soft"] = self.soft * distance
        return terms
