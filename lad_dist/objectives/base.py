"""Base class of objectives, and what several of them share: layer maps, projections, checks of dimensions."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from torch import Tensor, nn

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.core.step_state import StepState


class Objective(nn.Module):
    """Base class of objectives: outputs of student and teacher, and a batch -> {name: weighted term}.

    A subclass takes the dimensions of both models and its own keyword-only arguments, which are its config schema. It
    sets `student_spec` and `teacher_spec`, and implements `forward`. The training loop sums the terms and logs them by
    name; it knows no objective. Gates and projections that an objective learns are its parameters. They are clipped,
    sharded and saved with the student's, and train at `optim.objective_lr`.

    Attributes:
        supported_data: Data that it can train on: "corpus" (unlabelled text), "task" (labelled examples).
        requires_teacher: Whether it learns from a teacher. If not, the config must have none.
        uses_mlm_head: Whether student and teacher have an MLM head on a corpus. On a task they have the task's head.
        student_spec: The tensors that it reads of the student's forward.
        teacher_spec: The tensors that it reads of the teacher's forward.
        learns_from_labels: Whether a term is a loss against the labels, which data.class_weights weigh.
        metrics: Detached scalars of the last forward, logged beside the terms.
    """

    supported_data: ClassVar[tuple[Literal["corpus", "task"], ...]] = ("corpus", "task")
    requires_teacher: ClassVar[bool] = True
    uses_mlm_head: ClassVar[bool] = True

    student_spec: OutputSpec
    teacher_spec: OutputSpec = OutputSpec()
    learns_from_labels: bool = False

    def __init__(self) -> None:
        """Start without metrics."""
        super().__init__()
        self.metrics: dict[str, Tensor] = {}

    def on_step_start(self, state: StepState) -> None:
        """Prepare for a step; called once before its micro-batches."""

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch, term by term.

        Args:
            student: Outputs of the student, as in `student_spec`.
            teacher: Outputs of the teacher, as in `teacher_spec`; None without a teacher.
            batch: The micro-batch that both models read.

        Returns:
            Terms by name: fp32 scalars, weights included. Their sum is the loss, and the loss of a step is the mean
            over its micro-batches. So a term is a sum over the micro-batch divided by one of `batch.divisors`.
        """
        raise NotImplementedError


def uniform_layer_map(name: str, student: ModelDims, teacher: ModelDims) -> list[tuple[int, int]]:
    """Return pairs of student layer m = 1 … M and teacher layer ⌊m L / M⌋; raise UserError if M exceeds L."""
    new, old = student.num_hidden_layers, teacher.num_hidden_layers
    if new > old:
        raise UserError(f"objective.name = {name}: {new} student layers, only {old} teacher layers")
    return [(m, m * old // new) for m in range(1, new + 1)]


def projection(student: ModelDims, teacher: ModelDims) -> nn.Module:
    """Return a map [N, student width] -> [N, teacher width]: learnt if the widths differ, the identity if not."""
    if student.hidden_size == teacher.hidden_size:
        return nn.Identity()
    return nn.Linear(student.hidden_size, teacher.hidden_size)


def teacher_layer_weights(m: int, weights: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return metrics `teacher_layer_weight/m/l` for student layer m; a run draws its heat map from them.

    The `weights` of teacher layers 1 … L in what student layer m learns sum to 1.
    """
    return {f"teacher_layer_weight/{m}/{layer}": weight for layer, weight in enumerate(weights, start=1)}


def check_same_width(name: str, student: ModelDims, teacher: ModelDims) -> None:
    """Raise UserError if an objective that compares hidden states one to one gets different widths."""
    if student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"objective.name = {name}: the student is {student.hidden_size} wide and the teacher "
            f"{teacher.hidden_size}; {name} compares hidden states one to one, take tinybert, emd or minilm2, "
            "or a student as wide as the teacher"
        )


def check_same_heads(name: str, student: ModelDims, teacher: ModelDims) -> None:
    """Raise UserError if an objective that compares attention head by head gets different numbers of heads."""
    if student.num_attention_heads != teacher.num_attention_heads:
        raise UserError(
            f"objective.name = {name}: the student has {student.num_attention_heads} heads and the teacher "
            f"{teacher.num_attention_heads}; {name} compares attention head by head, take minilm2 "
            "or a student with as many heads"
        )
