"""MiniLMv2: self-attention relations between the tokens of one layer."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import QKV, ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective


class MiniLM2(Objective):
    """MiniLMv2 (Wang et al., Findings of ACL 2021): tokens of a student layer relate as those of a teacher layer.

        L = 1/3 Σ_{X in Q, K, V} 1/(A |x|) Σ_{a, i} KL(R_t[a, i] || R_s[a, i]),     R = softmax(X Xᵀ / √d)

    Q, K and V are split anew into A relation heads, so widths and numbers of heads may differ. The teacher needs no
    head. No head is trained: on a task it is the first of two phases, and kd the second.
    """

    uses_mlm_head = False

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        teacher_layer: Annotated[int | None, Field(ge=1, description="default: the last")] = None,
        student_layer: Annotated[int | None, Field(ge=1, description="default: the last")] = None,
        heads: Annotated[int | None, Field(ge=1, description="relation heads; default: the teacher's heads")] = None,
    ):
        """Build the objective for two models.

        Args:
            student: Dimensions of the student.
            teacher: Dimensions of the teacher.
            teacher_layer: Number of the teacher's layer, from 1; None: the last.
            student_layer: Number of the student's layer, from 1; None: the last.
            heads: Number A of relation heads; None: the teacher's number of heads.

        Raises:
            UserError: A layer does not exist, or `heads` does not divide a width.
        """
        super().__init__()
        self.heads = teacher.num_attention_heads if heads is None else heads
        self.student_layer = _layer_number("student_layer", student_layer, student)
        self.teacher_layer = _layer_number("teacher_layer", teacher_layer, teacher)
        for dims in (student, teacher):
            if dims.hidden_size % self.heads:
                raise UserError(f"objective.heads = {self.heads} does not divide a width of {dims.hidden_size}")
        self.student_spec = OutputSpec(qkv=(self.student_layer,))
        self.teacher_spec = OutputSpec(qkv=(self.teacher_layer,))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Compute the divergences of the query, key and value relations.

        Returns:
            "query", "key" and "value".
        """
        assert teacher is not None
        pairs = zip(QKV, student.qkv[self.student_layer], teacher.qkv[self.teacher_layer], strict=True)
        return {name: losses.relation_loss((s, s), (t, t), batch, self.heads) / len(QKV) for name, s, t in pairs}


def _layer_number(key: str, number: int | None, dims: ModelDims) -> int:
    """Return `number`, or that of the last layer if it is None; raise UserError if there is no such layer."""
    if number is not None and number > dims.num_hidden_layers:
        raise UserError(f"objective.{key} = {number}, but the model has {dims.num_hidden_layers} layers")
    return dims.num_hidden_layers if number is None else number
