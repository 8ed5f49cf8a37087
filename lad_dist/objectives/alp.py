"""ALP-KD, attention-based layer projection (Passban et al., AAAI 2021): each student layer reads all teacher layers.

    e_m = softmax over l of S_m · H_l        C_m = Σ_l e_ml H_l
    L = hidden · Σ_m MSE(S_m, C_m) + hard · CE + soft · T² KL                              m = 1 … M, l = 1 … L

S_m and H_l [B, D] are first tokens of student and teacher layers; MSE is a mean over sequences and width. The attention
e has no weights of its own and is differentiated like the rest. Widths must be equal. `teacher_layer_weight/m/l` is logged:
the mean of e_ml.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.base import check_same_width, teacher_layer_weights
from lad_dist.objectives.kd import KD, Weight


class ALP(KD):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        hidden: Weight = 0.2,
        soft: Weight = 0.7,
        hard: Weight = 0.1,
        temperature: Annotated[float, Field(gt=0)] = 20.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("alp", student, teacher)
        self.hidden = hidden
        self.student_outputs = self.student_outputs._replace(hidden=tuple(range(1, student.num_hidden_layers + 1)))
        self.teacher_outputs = self.teacher_outputs._replace(hidden=tuple(range(1, teacher.num_hidden_layers + 1)))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        layers = [losses.first_tokens(teacher.hidden[layer], batch).float() for layer in self.teacher_outputs.hidden]
        target = torch.stack(layers, dim=1)  # [B, L, D]
        distances = []
        for m in self.student_outputs.hidden:
            mine = losses.first_tokens(student.hidden[m], batch).float()
            attention = torch.softmax(torch.einsum("bd,bld->bl", mine, target), dim=-1)
            mixed = torch.einsum("bl,bld->bd", attention, target)
            distances.append(losses.over_sequences(losses.squared(mine, mixed), batch))
            self.metrics |= teacher_layer_weights(
                m, (losses.over_sequences(e, batch) for e in attention.detach().unbind(dim=1))
            )
        return super().forward(student, teacher, batch) | {"hidden": self.hidden * torch.stack(distances).sum()}
