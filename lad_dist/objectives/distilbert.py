"""DistilBERT: logits, labels and the direction of the last hidden states."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.base import check_same_width
from lad_dist.objectives.kd import KD, Weight


class DistilBERT(KD):
    """DistilBERT's three terms (Sanh et al., 2019).

        L = soft · T² KL(softmax(z_t / T) || softmax(z_s / T)) + hard · CE(z_s, y) + cosine · (1 - cos(h_s, h_t))

    z [R, V] are logits: of the MLM head at the masked positions, where CE is MLM's own loss, or of a task. h [N, D] are
    last hidden states of equal width; their term is a mean over tokens. Weights and temperature are the authors'.

    On a corpus `soft_tokens = "all"` takes the soft term over all real tokens, as the authors' published command does:
    its z are then [N, V]. "masked" is their option `restrict_ce_to_mask`; the head then computes a seventh as much.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        cosine: Weight = 1.0,
        soft: Weight = 5.0,
        soft_tokens: Annotated[
            Literal["masked", "all"], Field(description="on a corpus: tokens whose logits are compared")
        ] = "masked",
        hard: Weight = 2.0,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        """Build the objective; beside kd's errors raise UserError for other widths, or for all tokens of a task."""
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("distilbert", student, teacher)
        if soft_tokens == "all" and student.head != "mlm":
            raise UserError(
                'objective.soft_tokens = "all" is for a corpus; leave it away on a task, whose head reads no others'
            )
        self.cosine = cosine
        self.student_layer, self.teacher_layer = student.num_hidden_layers, teacher.num_hidden_layers
        self.all_tokens = soft_tokens == "all" and soft > 0
        self.student_spec = self.student_spec._replace(hidden=(self.student_layer,), all_tokens=self.all_tokens)
        self.teacher_spec = self.teacher_spec._replace(hidden=(self.teacher_layer,), all_tokens=self.all_tokens)

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return KD's terms, and "cosine", the distance of the last hidden states."""
        assert teacher is not None
        s, t = student.hidden[self.student_layer].float(), teacher.hidden[self.teacher_layer].float()
        distances = 1 - F.cosine_similarity(s, t, dim=-1)
        terms = self._logit_terms(student, teacher, batch)
        return terms | {"cosine": self.cosine * losses.mean_over_tokens(distances, batch)}

    def _logit_terms(self, student: ModelOutputs, teacher: ModelOutputs, batch: Batch) -> dict[str, Tensor]:
        """Return KD's terms, of which the soft one is over all tokens if it is to be."""
        if not self.all_tokens:
            return super().forward(student, teacher, batch)
        assert student.logits is not None
        assert teacher.logits is not None
        total = losses.soft_label_sum(*self.comparable_logits(student.logits, teacher.logits), self.temperature)
        terms = {"soft": self.soft * total / batch.divisors.tokens}
        if self.hard:
            masked = student.logits.index_select(0, batch.head_positions)
            terms["hard"] = self.hard * losses.hard_label_loss(masked, batch, self.head)
        return terms
