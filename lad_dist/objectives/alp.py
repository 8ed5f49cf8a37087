"""ALP-KD: each student layer attends to all teacher layers."""

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
    """ALP-KD, attention-based layer projection (Passban et al., AAAI 2021).

        e_m = softmax over l of S_m · H_l        C_m = Σ_l e_ml H_l
        L = hidden · Σ_m MSE(S_m, C_m) + hard · CE + soft · T² KL                          m = 1 … M, l = 1 … L

    S_m and H_l [B, D] are first tokens of student and teacher layers of equal width; MSE is a mean over sequences and
    width. The attention e has no weights of its own and is differentiated like the rest. The objective logs
    `teacher_layer_weight/m/l`, the mean of e_ml.
    """

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
        """Build the objective; beside kd's errors raise UserError if the widths differ."""
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("alp", student, teacher)
        self.hidden = hidden
        self.student_spec = self.student_spec._replace(hidden=tuple(range(1, student.num_hidden_layers + 1)))
        self.teacher_spec = self.teacher_spec._replace(hidden=tuple(range(1, teacher.num_hidden_layers + 1)))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return KD's terms, and "hidden", the error between student layers and attended teacher layers."""
        assert teacher is not None
        layers = [losses.first_tokens(teacher.hidden[layer], batch).float() for layer in self.teacher_spec.hidden]
        teacher_states = torch.stack(layers, dim=1)  # [B, L, D]
        errors = []
        for m in self.student_spec.hidden:
            state = losses.first_tokens(student.hidden[m], batch).float()
            attention = torch.softmax(torch.einsum("bd,bld->bl", state, teacher_states), dim=-1)
            target = torch.einsum("bl,bld->bd", attention, teacher_states)
            errors.append(losses.mean_over_sequences(losses.squared_error(state, target), batch))
            weights = (losses.mean_over_sequences(e, batch) for e in attention.detach().unbind(dim=1))
            self.metrics |= teacher_layer_weights(m, weights)
        return super().forward(student, teacher, batch) | {"hidden": self.hidden * torch.stack(errors).sum()}
