"""The state of training at a step: what schedules are functions of."""

from typing import NamedTuple


class StepState(NamedTuple):
    """Where a training stands: the same on all processes."""

    step: int
    steps: int
    seed: int

    @property
    def progress(self) -> float:
        """Of all steps, in [0, 1]."""
        return self.step / self.steps
