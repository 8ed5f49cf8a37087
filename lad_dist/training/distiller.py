"""Method: all that trains, in one module with one forward and one loss. It is what the DeepSpeed engine holds."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lad_dist.compression import compressed_module
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelOutputs
from lad_dist.core.step_state import StepState
from lad_dist.models.forward import compute_outputs
from lad_dist.models.loading import PreTrainedModel
from lad_dist.objectives.base import Objective


class Distiller(nn.Module):
    """A student and its objective. `found`: what was measured when the student was made, by name."""

    def __init__(
        self, student: PreTrainedModel, objective: Objective, initial_values: Mapping[str, float] = MappingProxyType({})
    ):
        super().__init__()
        self.initial_values = dict(initial_values)
        self.student = student
        self.objective = objective

    def on_step_start(self, moment: StepState) -> None:
        """Moves all schedules, once before the micro-batches of each step."""
        for piece in compressed_module.compressed_modules(self.student):
            piece.on_step_start(moment)
        self.objective.on_step_start(moment.progress)

    def newly_pruned(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights of which the last `at` took some away, with masks that are True where they stay."""
        return [pair for piece in compressed_module.compressed_modules(self.student) for pair in piece.newly_pruned()]

    def forward(self, batch: Batch, target: ModelOutputs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss, and by name its terms and what the objective observed (detached scalars)."""
        seen = compute_outputs(self.student, batch, self.objective.student_outputs)
        terms = self.objective(seen, target, batch)
        loss = torch.stack(list(terms.values())).sum()
        return loss, {name: x.detach() for name, x in (terms | self.objective.metrics).items()}

    def export(self) -> PreTrainedModel:
        """The student as a plain model: Parts folded, the objective left behind. In place."""
        compressed_module.merge_all(self.student)
        return self.student
