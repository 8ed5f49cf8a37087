"""MiniLMv2 (Wang et al., Findings of ACL 2021): the tokens of one student layer relate as those of a teacher layer do.

    L = 1/3 Σ_{X in Q, K, V} 1/(A |x|) Σ_{a, i} KL(R_t[a, i] || R_s[a, i]),     R = softmax(X Xᵀ / √d)

Q, K and V are re-split into A relation heads, so widths and head counts may differ, and the teacher needs no head. No
head is trained: on a task it is the first of two phases, and kd the second.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import QKV, ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective


class MiniLM2(Objective):
    trains_no_head = True

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        teacher_layer: Annotated[int | None, Field(ge=1, description="default: the last")] = None,
        student_layer: Annotated[int | None, Field(ge=1, description="default: the last")] = None,
        heads: Annotated[int | None, Field(ge=1, description="relation heads; default: the teacher's heads")] = None,
    ):
        super().__init__()
        self.heads = teacher.num_attention_heads if heads is None else heads
        self.student_layer = _layer("student_layer", student_layer, student)
        self.teacher_layer = _layer("teacher_layer", teacher_layer, teacher)
        for shape in (student, teacher):
            if shape.hidden_size % self.heads:
                raise UserError(f"objective.heads = {self.heads} does not divide a width of {shape.hidden_size}")
        self.student_outputs = OutputSpec(qkv=(self.student_layer,))
        self.teacher_outputs = OutputSpec(qkv=(self.teacher_layer,))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        pairs = zip(QKV, student.qkv[self.student_layer], teacher.qkv[self.teacher_layer], strict=True)
        return {name: losses.relation((s, s), (t, t), batch, self.heads) / len(QKV) for name, s, t in pairs}


def _layer(key: str, number: int | None, shape: ModelDims) -> int:
    if number is not None and number > shape.num_hidden_layers:
        raise UserError(f"objective.{key} = {number}, but there are {shape.num_hidden_layers} layers")
    return shape.num_hidden_layers if number is None else number
