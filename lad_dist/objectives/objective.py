"""Objective: what a student is to learn.

An objective is built from two Shapes and its own keyword-only arguments, which are its config schema. It says what it
needs of the two forwards (`student_needs`, `teacher_needs`), and turns their traces into named weighted terms; the
loop sums them and logs them by name without knowing either. What it learns itself (gates, projections) are its
parameters: clipped, sharded and saved with the student's.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from lad_dist.config import UserError
from lad_dist.flat import Batch, Needs, Shape, Trace


class Objective(nn.Module):
    """(student trace, teacher trace, batch) -> {name: weighted term}."""

    runs_on: ClassVar[tuple[Literal["corpus", "task"], ...]] = ("corpus", "task")
    taught: ClassVar[bool] = True
    headless: ClassVar[bool] = False  # trains no head, and asks none of the teacher

    student_needs: Needs
    teacher_needs: Needs = Needs()

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Tensor] = {}
        """Detached scalars of the last forward that are worth a curve."""

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


def same_width(name: str, student: Shape, teacher: Shape) -> None:
    """Raises UserError where an objective compares hidden states of different widths."""
    if student.width != teacher.width:
        raise UserError(
            f"objective.name = {name}: the student is {student.width} wide and the teacher {teacher.width}; "
            "it compares hidden states one to one, take minilm or a student as wide as its teacher"
        )
