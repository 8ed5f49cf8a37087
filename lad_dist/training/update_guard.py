"""Bad updates: skip them, and leave out the steps that spoilt the weights.

A loss that is not finite, or a spike, goes backward times NaN (`UpdateGuard.backward` explains why). So the optimizer
leaves weights and moments as they are: DeepSpeed's optimizers of stages 1 to 3 and of fp16 do it by themselves,
optimization.CheckedAdamW in stage 0. A spike has to be known before the update: with `spike_sigma` each step waits for
the device once.

Skipped updates in a row mean that one of the steps before has spoilt the weights. The run then goes back to before
them, and leaves out the skipped steps and as many before them (PaLM, arXiv 2204.02311, section 5.1: restart before the
spike and skip the batches before and in it). Where that does not help, the next row widens what is left out.
"""

import enum
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lad_dist.distributed import processes

WINDOW = 128  # losses that a spike is compared with, as in OLMo's SkipStepOptimizer
MIN_LOSSES = WINDOW // 2  # with fewer losses nothing is a spike
MAX_FUTILE_ROLL_BACKS = 10  # times max_skips: where more steps in a row are left out, the run gives up


class UpdateAction(enum.Enum):
    """How a run continues after a step."""

    PROCEED = "proceed"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"
    GIVE_UP = "give up"


class SkipPolicy:
    """The rules that decide how a run continues after each step.

    Attributes:
        skipped_steps: The steps that the run leaves out, ascending.
        rollback_step: After ROLL_BACK, the step that the run goes back to. It loads the newest checkpoint that is not
            later, or the first one.
    """

    def __init__(self, max_skips: int, spike_sigma: float = 0.0, skipped_steps: Iterable[int] = ()) -> None:
        self.skipped_steps = sorted(skipped_steps)
        self.rollback_step = 0
        self._max_skips, self._sigma = max_skips, spike_sigma
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._skips: list[int] = []  # steps in a row

    @property
    def detects_spikes(self) -> bool:
        """Whether the policy needs the loss of each step."""
        return self._sigma > 0

    def is_spike(self, loss: float) -> bool:
        """Return whether a loss is spike_sigma standard deviations above those of the last updates."""
        if not self.detects_spikes or len(self._losses) < MIN_LOSSES:
            return False
        return loss > statistics.fmean(self._losses) + self._sigma * statistics.pstdev(self._losses)

    def on_update(self, loss: float | None = None) -> UpdateAction:
        """Record that a step updated the weights."""
        self._skips = []
        if loss is not None:
            self._losses.append(loss)
        return UpdateAction.PROCEED

    def on_skip(self, step: int) -> UpdateAction:
        """Record that the update of a step was skipped, and return how the run continues."""
        self._skips.append(step)
        if len(self._skips) < self._max_skips:
            return UpdateAction.SKIPPED
        first = self._leave_out(self._skips)
        self._skips, self.rollback_step = [], first
        gives_up = step - first >= MAX_FUTILE_ROLL_BACKS * self._max_skips
        return UpdateAction.GIVE_UP if gives_up else UpdateAction.ROLL_BACK

    def _leave_out(self, steps: list[int]) -> int:
        """Leave out the steps and as many before them; return the first step of the stretch that they end."""
        left_out = {*self.skipped_steps, *steps}
        first, remaining = steps[0], len(steps)
        while first > 0 and (remaining or first - 1 in left_out):
            first -= 1
            remaining -= first not in left_out
            left_out.add(first)
        self.skipped_steps = sorted(left_out)
        return first

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that the run continues as if it had not stopped."""
        return {"losses": list(self._losses), "skipped": self._skips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what a checkpoint stored. `skipped_steps` stays as it is: it is newer than the checkpoint."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._skips = [step for step in state["skipped"] if step not in self.skipped_steps]


class UpdateGuard:
    """Skips bad updates of a DeepSpeed engine. `reason`: why the last skipped update was skipped."""

    def __init__(self, engine: Any, policy: SkipPolicy) -> None:
        self.policy, self.reason = policy, ""
        self._engine = engine
        self._losses: list[Tensor] = []  # of the step's micro-batches
        self._mean: float | None = None  # of these, once it is computed

    def backward(self, loss: Tensor) -> None:
        """Run backward for the scalar loss of one micro-batch, so that a bad loss makes the engine skip the update."""
        value = loss.detach()
        self._losses.append(value)
        is_last = self._engine.is_gradient_accumulation_boundary()
        poisoned = self.policy.detects_spikes and is_last and self.policy.is_spike(self._mean_loss())
        # Reduced with NaN gradients, the gradient norm is NaN on every process, and each optimizer skips the update. So
        # all processes skip the same updates without another exchange, DeepSpeed counts and clears its state as after
        # its own skips, and nothing waits for the device. x - x is NaN where x is not finite, else 0.
        poison = math.nan if poisoned else 1 + (value - value)
        self._engine.backward(loss * poison)

    def action(self, step: int) -> UpdateAction:
        """Return how the run continues after a step's last `engine.step()`, the same on all processes."""
        applied = self._engine.was_step_applied()
        mean = self._mean_loss() if self.policy.detects_spikes or not applied else None
        is_spike = not applied and self.policy.is_spike(self._mean_loss())
        self._losses, self._mean = [], None
        if mean is None or applied:
            return self.policy.on_update(mean)
        if self._engine.fp16_enabled() and self._engine.dynamic_loss_scale() and math.isfinite(mean) and not is_spike:
            return UpdateAction.PROCEED  # DeepSpeed's loss scale was too high, and DeepSpeed has lowered it
        cause = "" if is_spike or not math.isfinite(mean) else "; a gradient is not finite"
        self.reason = f"loss {mean:.6g}{cause}"
        return self.policy.on_skip(step)

    def _mean_loss(self) -> float:
        if self._mean is None:
            self._mean = processes.means({"": torch.stack(self._losses).mean()})[""]
        return self._mean
