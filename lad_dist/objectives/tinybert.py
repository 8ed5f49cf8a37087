"""TinyBERT's intermediate distillation (Jiao et al., Findings of EMNLP 2020, equations 6 to 9):

    L = embedding · MSE(E_s W, E_t) + Σ_m (hidden · MSE(S_m W, H_l) + attention · MSE(A_m, A_l))     l = ⌊m L / M⌋

E [N, D] are embedding outputs, S_m and H_l [N, D] the outputs of student layer m = 1 … M and teacher layer l, A the
attention scores Q Kᵀ / √d before the softmax: a mean over heads and pairs of tokens of one sequence. One learnt map W
with a bias serves all layers, as in the authors' code; where the widths are equal there is none. Numbers of heads must
be equal.

It trains no head: on a corpus it is general distillation, on a task the first of two phases, and kd with hard = 0 from
its export the second.
"""

import torch
from torch import Tensor

from lad_dist.flat import Batch, Needs, Shape, Trace
from lad_dist.objectives import losses
from lad_dist.objectives.kd import Weight
from lad_dist.objectives.objective import Objective, projection, same_heads, uniform


class TinyBERT(Objective):
    headless = True

    def __init__(
        self,
        student: Shape,
        teacher: Shape,
        *,
        embedding: Weight = 1.0,
        hidden: Weight = 1.0,
        attention: Weight = 1.0,
    ):
        super().__init__()
        same_heads("tinybert", student, teacher)
        self.heads = teacher.heads
        self.matches = uniform("tinybert", student, teacher)
        self.embedding, self.hidden, self.attention = embedding, hidden, attention
        self.projection = projection(student, teacher)
        mine, its = (tuple(layers) for layers in zip(*self.matches, strict=True))
        self.student_needs = Needs(hidden=(0, *mine), qkv=mine)
        self.teacher_needs = Needs(hidden=(0, *its), qkv=its)

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        states = [self.states(student.hidden[m], teacher.hidden[layer], batch) for m, layer in self.matches]
        scores = [
            losses.scores(student.qkv[m][:2], teacher.qkv[layer][:2], batch, self.heads) for m, layer in self.matches
        ]
        return {
            "embedding": self.embedding * self.states(student.hidden[0], teacher.hidden[0], batch),
            "hidden": self.hidden * torch.stack(states).sum(),
            "attention": self.attention * torch.stack(scores).sum(),
        }

    def states(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of hidden states, the student's mapped to the teacher's width."""
        return losses.over_tokens(losses.squared(self.projection(student), teacher), batch)
