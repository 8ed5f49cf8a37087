"""KD: plain knowledge distillation, from the logits of the teacher."""

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
    """Plain knowledge distillation (Hinton et al., 2015).

        L = hard · CE(z_s, y) + soft · T² KL(softmax(z_t / T) || softmax(z_s / T))

    z [R, V] are logits of student and teacher: of the MLM head at the masked positions, or of a task. For tagging there
    is a row per word. Of several labels of a text each is a decision of its own: the CE is binary, the KL of Bernoulli
    distributions, and both are means over texts and labels. For question answering the distributions are over the
    tokens of a sequence, one for the start of the answer and one for its end. The KL of MLM heads is over the
    tokenizer's tokens: the vocabularies of student and teacher may be padded to other numbers.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        """Build the objective; raise UserError if `soft` is not 0 and the teacher has no head."""
        super().__init__()
        if soft and teacher.head == "none":
            raise UserError(
                "objective.soft: the teacher has no head to learn from; set objective.soft = 0 or take minilm2"
            )
        self.soft, self.hard, self.temperature = soft, hard, temperature
        self.learns_from_labels = hard > 0
        self.head, self.vocabulary = student.head, student.vocabulary
        self.student_spec = OutputSpec(logits=bool(soft or hard))
        self.teacher_spec = OutputSpec(logits=soft > 0)

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return "hard" and "soft", the losses against labels and the teacher's logits, but those of weight 0."""
        assert teacher is not None
        terms = {}
        if self.hard:
            assert student.logits is not None
            terms["hard"] = self.hard * losses.hard_label_loss(student.logits, batch, self.head)
        if self.soft:
            assert student.logits is not None
            assert teacher.logits is not None
            pair = self.comparable_logits(student.logits, teacher.logits)
            terms["soft"] = self.soft * losses.soft_label_loss(*pair, batch, self.head, self.temperature)
        return terms

    def comparable_logits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [R, V] of both without outputs that stand for no token of the tokenizer."""
        return student[:, : self.vocabulary], teacher[:, : self.vocabulary]
