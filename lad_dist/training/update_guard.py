"""Anomalies: updates that must not happen, and the steps that a run leaves out because of them.

    Judge(max_skips, spike_sigma, left_out)   the rules, on plain numbers
    Guard(engine, judge)                      an engine's updates, watched
    guard.backward(loss)                      in place of engine.backward(loss)
    guard.verdict(step)                       after a step's last engine.step(): what becomes of the run, the same on
                                              all processes

A loss that is not finite, or stands out, goes backward times NaN. Then no gradient norm is finite, after reduction on
no process, and the optimizer leaves weights and moments as they are: DeepSpeed's of stages 1 to 3 and of fp16 by
themselves, optim.CheckedAdamW in stage 0. So all processes skip the same updates without agreeing on
it, DeepSpeed counts and clears as ever, and nothing waits for the device that did not before. (A spike has to be
known before the update: looking for spikes waits for the device once per step.)

Updates skipped in a row say that the weights are spoilt, by one of the steps before. The run then goes back to before
those, and leaves out the skipped steps and as many before them (PaLM, arXiv 2204.02311, section 5.1: restart before
the spike and skip the batches seen before and in it). Where that does not help, the next row widens what is left out.
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

WINDOW = 128  # losses that a spike is measured against, as OLMo's SkipStepOptimizer
MIN_LOSSES = WINDOW // 2  # before there are as many, nothing is a spike
MAX_FUTILE_ROLL_BACKS = 10  # times max_skips: a longer stretch of steps that are left out is no accident


class UpdateAction(enum.Enum):
    PROCEED = "proceed"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"
    GIVE_UP = "give up"


class SkipPolicy:
    """Rules on what became of steps, in their order. `left_out`: the steps that the run leaves out, ascending;
    `back_to`: after ROLL_BACK, the step that the run goes back to: it takes the newest checkpoint that is not later, or
    the first one there is."""

    def __init__(self, max_skips: int, spike_sigma: float = 0.0, left_out: Iterable[int] = ()) -> None:
        self.skipped_steps = sorted(left_out)
        self.back_to = 0
        self._max_skips, self._sigma = max_skips, spike_sigma
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._skipped: list[int] = []  # in a row

    @property
    def wants_losses(self) -> bool:
        return self._sigma > 0

    def spikes(self, loss: float) -> bool:
        """Whether a loss stands out above those of the last updates."""
        if not self.wants_losses or len(self._losses) < MIN_LOSSES:
            return False
        return loss > statistics.fmean(self._losses) + self._sigma * statistics.pstdev(self._losses)

    def updated(self, loss: float | None = None) -> UpdateAction:
        self._skipped = []
        if loss is not None:
            self._losses.append(loss)
        return UpdateAction.PROCEED

    def skipped(self, step: int) -> UpdateAction:
        self._skipped.append(step)
        if len(self._skipped) < self._max_skips:
            return UpdateAction.SKIPPED
        first = self._leave_out(self._skipped)
        self._skipped, self.back_to = [], first
        return (
            UpdateAction.GIVE_UP if step - first >= MAX_FUTILE_ROLL_BACKS * self._max_skips else UpdateAction.ROLL_BACK
        )

    def _leave_out(self, steps: list[int]) -> int:
        """Leaves out the steps and as many before them; the first of the stretch that they end."""
        gone = {*self.skipped_steps, *steps}
        first, more = steps[0], len(steps)
        while first > 0 and (more or first - 1 in gone):
            first -= 1
            more -= first not in gone
            gone.add(first)
        self.skipped_steps = sorted(gone)
        return first

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for the run to go on as if it had not stopped."""
        return {"losses": list(self._losses), "skipped": self._skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """`left_out` stays as it is: it is newer than the checkpoint."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._skipped = [step for step in state["skipped"] if step not in self.skipped_steps]


class UpdateGuard:
    """Watches the updates of a DeepSpeed engine. `why`: of the last update that was skipped."""

    def __init__(self, engine: Any, judge: SkipPolicy) -> None:
        self.policy, self.reason = judge, ""
        self._engine = engine
        self._losses: list[Tensor] = []  # of the step's micro-batches
        self._mean: float | None = None  # of these, once it is known

    def backward(self, loss: Tensor) -> None:
        """loss: scalar, of one micro-batch."""
        seen = loss.detach()
        self._losses.append(seen)
        spikes = self.policy.wants_losses and self._engine.is_gradient_accumulation_boundary() and self._spikes()
        self._engine.backward(loss * (math.nan if spikes else 1 + (seen - seen)))  # 1, or NaN where it is not finite

    def action(self, step: int) -> UpdateAction:
        """What becomes of the run after the last micro-batch of a step."""
        applied = self._engine.was_step_applied()
        mean = self._mean_loss() if self.policy.wants_losses or not applied else None
        stands_out = not applied and self._spikes()
        self._losses, self._mean = [], None
        if mean is None or applied:
            return self.policy.updated(mean)
        if self._engine.fp16_enabled() and self._engine.dynamic_loss_scale() and math.isfinite(mean) and not stands_out:
            return UpdateAction.PROCEED  # DeepSpeed's loss scale was too high: it has lowered it
        what = "" if stands_out or not math.isfinite(mean) else "; a gradient is not finite"
        self.reason = f"loss {mean:.6g}{what}"
        return self.policy.skipped(step)

    def _spikes(self) -> bool:
        return self.policy.spikes(self._mean_loss())

    def _mean_loss(self) -> float:
        if self._mean is None:
            self._mean = processes.means({"": torch.stack(self._losses).mean()})[""]
        return self._mean
