"""MiniLM: attention and value relations of the last layer."""

from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective, check_same_heads


class MiniLM(Objective):
    """MiniLM (Wang et al., NeurIPS 2020): the student's last layer attends as the teacher's does.

        L = 1/(A |x|) Σ_{a, i} KL(P_t[a, i] || P_s[a, i]) + 1/(A |x|) Σ_{a, i} KL(R_t[a, i] || R_s[a, i])
        P = softmax(Q Kᵀ / √d)    R = softmax(V Vᵀ / √d)

    Sums are over the A attention heads and the tokens of x, in the last layers. Widths may differ, numbers of heads may
    not. The teacher needs no head. No head is trained: on a task it is the first of two phases, and kd the second.
    """

    uses_mlm_head = False

    def __init__(self, student: ModelDims, teacher: ModelDims):
        """Build the objective; raise UserError if the numbers of attention heads differ."""
        super().__init__()
        check_same_heads("minilm", student, teacher)
        self.heads = teacher.num_attention_heads
        self.student_layer, self.teacher_layer = student.num_hidden_layers, teacher.num_hidden_layers
        self.student_spec = OutputSpec(qkv=(self.student_layer,))
        self.teacher_spec = OutputSpec(qkv=(self.teacher_layer,))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Return "attention" and "value", the divergences of the last layers' relations."""
        assert teacher is not None
        (qs, ks, vs), (qt, kt, vt) = student.qkv[self.student_layer], teacher.qkv[self.teacher_layer]
        return {
            "attention": losses.relation_loss((qs, ks), (qt, kt), batch, self.heads),
            "value": losses.relation_loss((vs, vs), (vt, vt), batch, self.heads),
        }
