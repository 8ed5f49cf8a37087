"""Objective: what a student is to learn.

An objective is built from two Shapes and its own keyword-only arguments, which are its config schema. It says what it
needs of the two forwards (`student_needs`, `teacher_needs`), and turns their traces into named weighted terms; the
loop sums them and logs them by name without knowing either. What it learns itself (gates, projections) are its
parameters: clipped, sharded and saved with the student's.
"""

from collections.abc import Iterable
from typing import ClassVar, Literal

from torch import Tensor, nn

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec


class Objective(nn.Module):
    """(student trace, teacher trace, batch) -> {name: weighted term}."""

    supported_data: ClassVar[tuple[Literal["corpus", "task"], ...]] = ("corpus", "task")
    requires_teacher: ClassVar[bool] = True
    trains_no_head: ClassVar[bool] = False  # trains no head, and asks none of the teacher: a corpus's student has none

    student_outputs: OutputSpec
    teacher_outputs: OutputSpec = OutputSpec()

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, Tensor] = {}
        """Detached scalars of the last forward that are worth a curve."""

    def on_step_start(self, progress: float) -> None:
        """Told once before each step how much of the training lies behind, in [0, 1]."""

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


def uniform_layer_map(name: str, student: ModelDims, teacher: ModelDims) -> list[tuple[int, int]]:
    """Student layers m = 1 … M with the teacher layers ⌊m L / M⌋. Raises UserError where M > L."""
    if student.num_hidden_layers > teacher.num_hidden_layers:
        raise UserError(
            f"objective.name = {name}: {student.num_hidden_layers} student layers, only {teacher.num_hidden_layers} teacher layers"
        )
    return [
        (m, m * teacher.num_hidden_layers // student.num_hidden_layers) for m in range(1, student.num_hidden_layers + 1)
    ]


def projection(student: ModelDims, teacher: ModelDims) -> nn.Module:
    """[N, D of the student] -> [N, D of the teacher]: learnt where they differ, nothing where they do not."""
    return (
        nn.Identity()
        if student.hidden_size == teacher.hidden_size
        else nn.Linear(student.hidden_size, teacher.hidden_size)
    )


def teacher_layer_weights(m: int, shares: Iterable[Tensor]) -> dict[str, Tensor]:
    """Student layer m's shares of teacher layers 1 … L, as observed: a run's heat map is drawn from them."""
    return {f"teacher_layer_weight/{m}/{layer}": share for layer, share in enumerate(shares, start=1)}


def check_same_width(name: str, student: ModelDims, teacher: ModelDims) -> None:
    """Raises UserError where an objective compares hidden states of different widths."""
    if student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"objective.name = {name}: the student is {student.hidden_size} wide and the teacher {teacher.hidden_size}; "
            "it compares hidden states one to one, take tinybert, emd or minilm2, or a student as wide as its teacher"
        )


def check_same_heads(name: str, student: ModelDims, teacher: ModelDims) -> None:
    """Raises UserError where an objective compares attention of different numbers of heads."""
    if student.num_attention_heads != teacher.num_attention_heads:
        raise UserError(
            f"objective.name = {name}: the student has {student.num_attention_heads} heads and the teacher {teacher.num_attention_heads}; "
            "it compares attention head by head, take minilm2 or a student with as many heads"
        )
