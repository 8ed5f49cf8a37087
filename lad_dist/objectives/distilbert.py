"""DistilBERT's three terms (Sanh et al., 2019):

    L = soft · T² KL(softmax(z_t / T) || softmax(z_s / T)) + hard · CE(z_s, y) + cosine · (1 - cos(h_s, h_t))

z are logits: of the MLM head at the masked positions, where CE is MLM's own loss, or of a task. h [N, D] are last
hidden states, of equal width; their term is a mean over tokens. Weights and temperature are the authors'.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.base import check_same_width
from lad_dist.objectives.kd import KD, Weight


class DistilBERT(KD):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        cosine: Weight = 1.0,
        soft: Weight = 5.0,
        hard: Weight = 2.0,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("distilbert", student, teacher)
        self.cosine = cosine
        self.last = (student.num_hidden_layers, teacher.num_hidden_layers)
        self.student_outputs = self.student_outputs._replace(hidden=(student.num_hidden_layers,))
        self.teacher_outputs = self.teacher_outputs._replace(hidden=(teacher.num_hidden_layers,))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        mine, its = self.last
        angles = losses.cosine(student.hidden[mine], teacher.hidden[its])
        return super().forward(student, teacher, batch) | {"cosine": self.cosine * losses.over_tokens(angles, batch)}
