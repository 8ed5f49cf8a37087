"""TinyBERT's intermediate distillation (Jiao et al., Findings of EMNLP 2020, equations 6 to 9):

    L = embedding · MSE(E_s W, E_t) + Σ_m (hidden · MSE(S_m W, H_l) + attention · MSE(A_m, A_l))     l = ⌊m L / M⌋
        + soft · T² KL(softmax(z_t / T) || softmax(z_s / T))

E [N, D] are embedding outputs, S_m and H_l [N, D] the outputs of student layer m = 1 … M and teacher layer l, A the
attention scores Q Kᵀ / √d before the softmax: a mean over heads and pairs of tokens of one sequence. One learnt map W
with a bias serves all layers, as in the authors' code; where the widths are equal there is none. Numbers of heads must
be equal, unless attention = 0.

With soft = 0 it trains no head: on a corpus it is general distillation, on a task the first of two phases, and kd with
hard = 0 from its export the second. Both at once, with soft > 0 on a task, are LadaBERT's four losses (Mao et al.,
2020, section 3.4).
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.base import check_same_heads, projection, uniform_layer_map
from lad_dist.objectives.kd import KD, Weight


class TinyBERT(KD):
    trains_no_head = True

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        embedding: Weight = 1.0,
        hidden: Weight = 1.0,
        attention: Weight = 1.0,
        soft: Weight = 0.0,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ):
        if soft and student.head == "none":
            raise UserError("objective.soft: on a corpus tinybert trains no head; set objective.soft = 0, or take kd")
        super().__init__(student, teacher, soft=soft, hard=0.0, temperature=temperature)
        if attention:
            check_same_heads("tinybert", student, teacher)
        self.heads = teacher.num_attention_heads
        self.weights = {"embedding": embedding, "hidden": hidden, "attention": attention}
        self.projection = projection(student, teacher)
        matches = uniform_layer_map("tinybert", student, teacher)
        self.states = [(0, 0)] * bool(embedding) + matches * bool(hidden)
        self.scores = matches * bool(attention)
        self.student_outputs, self.teacher_outputs = (
            needs._replace(
                hidden=tuple(match[side] for match in self.states),
                qkv=tuple(match[side] for match in self.scores),
            )
            for side, needs in enumerate((self.student_outputs, self.teacher_outputs))
        )

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        errors: dict[str, list[Tensor]] = {name: [] for name, weight in self.weights.items() if weight}
        for m, layer in self.states:
            mapped = self.projection(student.hidden[m])
            error = losses.over_tokens(losses.squared(mapped, teacher.hidden[layer]), batch)
            errors["hidden" if m else "embedding"].append(error)
        for m, layer in self.scores:
            mine, its = (losses.scores(qkv[:2], batch, self.heads) for qkv in (student.qkv[m], teacher.qkv[layer]))
            errors["attention"].append(losses.score_error(mine, its, batch))
        terms = {name: self.weights[name] * torch.stack(each).sum() for name, each in errors.items()}
        return terms | super().forward(student, teacher, batch)
