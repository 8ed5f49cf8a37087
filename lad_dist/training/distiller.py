"""The module that trains: student and objective, with one forward and one loss. The DeepSpeed engine holds it."""

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
    """A student and its objective. `initial_values`: what was measured when the student was built, by name."""

    def __init__(
        self, student: PreTrainedModel, objective: Objective, initial_values: Mapping[str, float] = MappingProxyType({})
    ):
        super().__init__()
        self.initial_values = dict(initial_values)
        self.student = student
        self.objective = objective

    def on_step_start(self, state: StepState) -> None:
        """Advance all schedules, once before the micro-batches of each step."""
        for module in compressed_module.compressed_modules(self.student):
            module.on_step_start(state)
        self.objective.on_step_start(state)

    def on_step_end(self) -> None:
        """Let compressed modules take note of a step, once after its micro-batches."""
        for module in compressed_module.compressed_modules(self.student):
            module.on_step_end()

    def is_final(self, state: StepState) -> bool:
        """Return whether all compressed modules have their final form after a step."""
        return all(module.is_final(state) for module in compressed_module.compressed_modules(self.student))

    def newly_pruned(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the weights that the last `on_step_start` pruned, with masks that are True where they stay."""
        modules = compressed_module.compressed_modules(self.student)
        return [pair for module in modules for pair in module.newly_pruned()]

    def forward(self, batch: Batch, target: ModelOutputs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss, and by name its terms and the metrics of the objective (detached scalars)."""
        outputs = compute_outputs(self.student, batch, self.objective.student_spec)
        terms = self.objective(outputs, target, batch)
        loss = torch.stack(list(terms.values())).sum()
        return loss, {name: x.detach() for name, x in (terms | self.objective.metrics).items()}

    def export(self) -> PreTrainedModel:
        """Return the student as a plain model, in place: compressed modules merged, without the objective."""
        compressed_module.merge_all(self.student)
        return self.student
