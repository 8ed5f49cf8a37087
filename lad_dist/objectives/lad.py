"""LAD, layer-wise adaptive distillation (Lin, Chen and Kao, Sensors 2023, 23(3):1483).

Gates aggregate all teacher layers H_1 … H_L, so that none is skipped:

    A_1 = H_1
    G_l = sigmoid(A_{l-1} W_l + b_l)
    A_l = LN_l(G_l · H_l + (1 - G_l) · A_{l-1})                          l = 2 … L

Student layer m of M is matched to A at teacher layer ⌊m L / M⌋, beside plain distillation:

    L = hidden · 1/M Σ_m MSE(S_m, A_⌊mL/M⌋) + hard · CE + soft · T² KL

One chain runs over all layers and is never restarted. The gates learn from the hidden term alone, at
`optim.objective_lr`. The first gate is bypassed, so it does not exist. The target is learnt, so it could collapse:
`gate/l` (mean openness) and `target/m` (variance over tokens) are logged.

`norm = "sequence"` normalises over [S, D] jointly with S · D affine weights, as the authors' code does, and needs
`data.pad_to`. `"token"` normalises over D alone: each token's target then has unit variance whatever the gates do, and
no padding is needed. On a corpus the same gates aggregate a pre-trained teacher.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lad_dist.config import UserError
from lad_dist.flat import Batch, Shape, Trace
from lad_dist.objectives import losses
from lad_dist.objectives.kd import KD, Weight
from lad_dist.objectives.objective import same_width, uniform


class Gate(nn.Module):
    """(aggregate, layer) -> (aggregate, openness), all [N, D]."""

    def __init__(self, width: int, length: int | None, affine: bool):
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.linear.weight)
        self.norm = nn.LayerNorm(width if length is None else [length, width], elementwise_affine=affine)

    def forward(self, aggregate: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        openness = torch.sigmoid(self.linear(aggregate))
        mixed = torch.lerp(aggregate, layer, openness)
        return self.norm(mixed.view(-1, *self.norm.normalized_shape)).view_as(mixed), openness


class LAD(KD):
    def __init__(
        self,
        student: Shape,
        teacher: Shape,
        *,
        hidden: Weight = 1.0,
        norm: Literal["token", "sequence"] = "token",
        affine: Annotated[bool, Field(description="learnt scale and shift after the norm")] = False,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        same_width("lad", student, teacher)
        if norm == "sequence" and teacher.span is None:
            raise UserError('objective.norm = "sequence": it normalises over whole sequences, so set data.pad_to')
        length = teacher.span if norm == "sequence" else None
        self.hidden = hidden
        self.matches = uniform("lad", student, teacher)
        self.gates = nn.ModuleList(Gate(teacher.width, length, affine) for _ in range(2, teacher.layers + 1))
        every_layer = tuple(range(1, teacher.layers + 1))
        self.student_needs = self.student_needs._replace(hidden=tuple(m for m, _ in self.matches))
        self.teacher_needs = self.teacher_needs._replace(hidden=every_layer)

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        targets = self.aggregate(teacher.hidden)
        distances = [losses.squared(student.hidden[m], targets[layer]).mean() for m, layer in self.matches]
        self.observed |= {f"target/{m}": targets[layer].detach().var(dim=0).mean() for m, layer in self.matches}
        return super().forward(student, teacher, batch) | {"hidden": self.hidden * torch.stack(distances).mean()}

    def aggregate(self, hidden: dict[int, Tensor]) -> dict[int, Tensor]:
        """Teacher layers {l: H_l [N, D]} to aggregates {l: A_l [N, D]}."""
        aggregates = {1: hidden[1]}
        self.observed = {}
        for layer, gate in enumerate(self.gates, start=2):
            aggregates[layer], openness = gate(aggregates[layer - 1], hidden[layer])
            self.observed[f"gate/{layer}"] = openness.detach().mean()
        return aggregates
