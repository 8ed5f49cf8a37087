"""MiniLM (Wang et al., NeurIPS 2020): the student's last layer attends as the teacher's does.

    L = 1/(A |x|) Σ_{a, i} KL(P_t[a, i] || P_s[a, i]) + 1/(A |x|) Σ_{a, i} KL(R_t[a, i] || R_s[a, i])
    P = softmax(Q Kᵀ / √d)    R = softmax(V Vᵀ / √d)

over the A attention heads and the tokens of x, in the last layers. Widths may differ, numbers of heads may not; the
teacher needs no head of its own. No head is trained: on a task it is the first of two phases, and kd the second.
"""

from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import Objective, check_same_heads


class MiniLM(Objective):
    trains_no_head = True

    def __init__(self, student: ModelDims, teacher: ModelDims):
        super().__init__()
        check_same_heads("minilm", student, teacher)
        self.heads = teacher.num_attention_heads
        self.last = (student.num_hidden_layers, teacher.num_hidden_layers)
        self.student_outputs = OutputSpec(qkv=(student.num_hidden_layers,))
        self.teacher_outputs = OutputSpec(qkv=(teacher.num_hidden_layers,))

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        mine, its = self.last
        (qs, ks, vs), (qt, kt, vt) = student.qkv[mine], teacher.qkv[its]
        return {
            "attention": losses.relation((qs, ks), (qt, kt), batch, self.heads),
            "value": losses.relation((vs, vs), (vt, vt), batch, self.heads),
        }
