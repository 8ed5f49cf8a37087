"""The state of training at a step: the argument of schedules."""

from typing import NamedTuple


class StepState(NamedTuple):
    """The step of a training, the number of its steps and its seed: the same on all processes."""

    step: int
    steps: int
    seed: int

    @property
    def progress(self) -> float:
        """The share of the steps that are done, in [0, 1]."""
        return self.step / self.steps
