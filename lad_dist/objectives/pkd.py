"""PKD, patient knowledge distillation (Sun et al., EMNLP 2019): plain distillation beside the layers in between.

    L = hidden · mean over m, sequences and width of (S_m - H_l(m))² + hard · CE + soft · T² KL       m = 1 … M - 1

S_m and H_l(m) [B, D] are first tokens of student and teacher layers, divided by their Euclidean norm. Of M student and
L teacher layers, "skip" matches m with l(m) = ⌊m L / M⌋, "last" with L - M + m; the last ones, which the logits teach,
are left out. `tokens = "all"` compares all real tokens, `normalised = False` hidden states as they are. As in the
authors' code the error is a mean over the width, so their weights (10 to 1000) hold. Widths must be equal.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives import losses
from lad_dist.objectives.base import check_same_width, uniform_layer_map
from lad_dist.objectives.kd import KD, Weight


class PKD(KD):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        hidden: Weight = 100.0,
        mapping: Literal["skip", "last"] = "skip",
        tokens: Literal["first", "all"] = "first",
        normalised: Annotated[bool, Field(description="divide hidden states by their norm")] = True,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 5.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("pkd", student, teacher)
        if student.num_hidden_layers == 1:
            raise UserError("objective.name = pkd: a student of one layer has none before its last; take kd")
        skip = uniform_layer_map("pkd", student, teacher)[:-1]
        last = [(m, teacher.num_hidden_layers - student.num_hidden_layers + m) for m, _ in skip]
        self.matches = {"skip": skip, "last": last}[mapping]
        self.hidden, self.tokens, self.normalised = hidden, tokens, normalised
        self.student_outputs = self.student_outputs._replace(hidden=tuple(m for m, _ in self.matches))
        self.teacher_outputs = self.teacher_outputs._replace(hidden=tuple(layer for _, layer in self.matches))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        pairs = [(student.hidden[m], teacher.hidden[layer]) for m, layer in self.matches]
        patience = torch.stack([self.distance(s, t, batch) for s, t in pairs]).mean()
        return super().forward(student, teacher, batch) | {"hidden": self.hidden * patience}

    def distance(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Of hidden states [N, D] and [N, D]."""
        if self.tokens == "first":
            student, teacher = (losses.first_tokens(x, batch) for x in (student, teacher))
        if self.normalised:
            student, teacher = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
        mean = losses.over_sequences if self.tokens == "first" else losses.over_tokens
        return mean(losses.squared(student, teacher), batch)
