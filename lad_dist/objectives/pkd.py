"""PKD: patient knowledge distillation, from the first tokens of intermediate layers."""

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
    """Patient knowledge distillation (Sun et al., EMNLP 2019): plain distillation and the layers in between.

        L = hidden · mean over m, sequences and width of (S_m - H_l(m))² + hard · CE + soft · T² KL       m = 1 … M - 1

    S_m and H_l(m) [B, D] are first tokens of student and teacher layers, divided by their Euclidean norm. Of M student
    and L teacher layers, "skip" maps m to l(m) = ⌊m L / M⌋ and "last" maps it to L - M + m. The last layers are left
    out: the logits teach them. `tokens = "all"` compares all real tokens, `normalised = False` hidden states as they
    are. As in the authors' code the error is a mean over the width, so their weights (10 to 1000) apply. Their soft
    term is a mean over C labels too: their weight of it is C times the one here.
    """

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
        """Build the objective for two models.

        Args:
            student: Dimensions of the student.
            teacher: Dimensions of the teacher.
            hidden: Weight of the layers in between.
            mapping: Teacher layer of each student layer.
            tokens: Tokens of a sequence whose hidden states are compared.
            normalised: Whether hidden states are divided by their norm.
            soft: Weight of the teacher's logits.
            hard: Weight of the labels.
            temperature: T.

        Raises:
            UserError: The widths differ, the student has one layer or more than the teacher, or the teacher lacks the
                head that `soft` needs.
        """
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        check_same_width("pkd", student, teacher)
        if student.num_hidden_layers == 1:
            raise UserError("objective.name = pkd: a student of one layer has no layer before the last; take kd")
        skip = uniform_layer_map("pkd", student, teacher)[:-1]
        last = [(m, teacher.num_hidden_layers - student.num_hidden_layers + m) for m, _ in skip]
        self.layer_map = {"skip": skip, "last": last}[mapping]
        self.hidden, self.tokens, self.normalised = hidden, tokens, normalised
        self.student_spec = self.student_spec._replace(hidden=tuple(m for m, _ in self.layer_map))
        self.teacher_spec = self.teacher_spec._replace(hidden=tuple(layer for _, layer in self.layer_map))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Compute KD's terms and the error of the layers in between.

        Returns:
            KD's terms, and "hidden".
        """
        assert teacher is not None
        pairs = [(student.hidden[m], teacher.hidden[layer]) for m, layer in self.layer_map]
        error = torch.stack([self.distance(s, t, batch) for s, t in pairs]).mean()
        return super().forward(student, teacher, batch) | {"hidden": self.hidden * error}

    def distance(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared difference, a scalar, of hidden states [N, D] and [N, D] of one pair of layers."""
        if self.tokens == "first":
            student, teacher = (losses.first_tokens(x, batch) for x in (student, teacher))
        if self.normalised:
            student, teacher = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
        mean = losses.mean_over_sequences if self.tokens == "first" else losses.mean_over_tokens
        return mean(losses.squared_error(student, teacher), batch)
