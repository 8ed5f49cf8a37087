"""Optimizer: four parameter groups {decay, no decay} x {student, objective}, how many gradients are sent at once, and a
learning rate that is a function of the step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lad_dist.config.schema import OptimConfig

BUCKET = 500_000_000  # gradients that DeepSpeed sends at once by default


def bucket_size(zero: Mapping[str, Any], trained: int) -> int:
    """Gradients that ZeRO sends at once, of so many weights: as its table says, or all up to the default. DeepSpeed
    takes memory for a whole bucket, however few there are."""
    return int(zero.get("reduce_bucket_size", min(BUCKET, trained)))


def parameter_groups(student: nn.Module, objective: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups, each with its peak learning rate under `peak`. Biases and norms do not decay. Empty groups are
    left away."""
    sides = [("student", student, optim.lr), ("objective", objective, optim.objective_lr or optim.lr)]
    rows = []
    for name, module, peak in sides:
        trained = [p for p in module.parameters() if p.requires_grad]
        norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        for decays in (True, False):
            members = [p for p in trained if (p.ndim > 1 and id(p) not in norms) is decays]
            decay = optim.weight_decay if decays else 0.0
            rows.append({"params": members, "lr": peak, "peak": peak, "weight_decay": decay, "name": name})
    return [row for row in rows if row["params"]]


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that changes nothing where the gradients' norm is not finite, and says so by `overflow`, as DeepSpeed's own
    optimizers do: in stage 0 it takes any as it is. Waits for the device once per update, as these do."""

    overflow = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not torch.nn.utils.get_total_norm(gradients).isfinite().item()
        if not self.overflow:
            super().step(closure)


def adamw(rows: list[dict[str, Any]], optim: OptimConfig, zero_stage: int = 0) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if zero_stage else CheckedAdamW
    return kind(rows, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at step 0 … steps - 1: a linear rise over the warm-up, then the schedule, which
    would reach 0 at `steps`."""
    rise = round(optim.warmup * steps)
    if step < rise:
        return (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    return {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}[optim.schedule]


def set_learning_rate(param_groups: Iterable[dict[str, Any]], share: float) -> None:
    for group in param_groups:
        group["lr"] = share * group["peak"]
