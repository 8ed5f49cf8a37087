"""AdamW over four parameter groups {decay, no decay} x {student, objective}, and a learning rate by the step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lad_dist.config.schema import OptimConfig

DEFAULT_BUCKET_SIZE = 500_000_000  # gradients that DeepSpeed reduces at once by default


def bucket_size(zero: Mapping[str, Any], num_weights: int) -> int:
    """Return how many gradients ZeRO reduces at once: what the config sets, or all of them up to the default.

    DeepSpeed allocates a whole bucket, however few weights train.
    """
    return int(zero.get("reduce_bucket_size", min(DEFAULT_BUCKET_SIZE, num_weights)))


def parameter_groups(student: nn.Module, objective: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups, each with its peak learning rate under `peak`, without empty groups.

    Biases and norms do not decay.
    """
    modules = [("student", student, optim.lr), ("objective", objective, optim.objective_lr or optim.lr)]
    groups = []
    for name, module, peak in modules:
        parameters = [p for p in module.parameters() if p.requires_grad]
        norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        for decays in (True, False):
            members = [p for p in parameters if (p.ndim > 1 and id(p) not in norms) is decays]
            decay = optim.weight_decay if decays else 0.0
            groups.append({"params": members, "lr": peak, "peak": peak, "weight_decay": decay, "name": name})
    return [group for group in groups if group["params"]]


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that skips the update where the gradients' norm is not finite, and sets `overflow` then.

    DeepSpeed's own optimizers do so; stage 0 runs the plain optimizer. Like them, it waits for the device once per
    update.
    """

    overflow = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights, or set `overflow`."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not torch.nn.utils.get_total_norm(gradients).isfinite().item()
        if not self.overflow:
            super().step(closure)


def adamw(groups: list[dict[str, Any]], optim: OptimConfig, zero_stage: int = 0) -> torch.optim.Optimizer:
    """Return AdamW over parameter groups."""
    kind = torch.optim.AdamW if zero_stage else CheckedAdamW
    return kind(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Return what the peak learning rate is multiplied by at step 0 … steps - 1.

    It rises linearly over the warm-up. Then it follows the schedule, which would reach 0 at `steps`.
    """
    warmup_steps = round(optim.warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    remaining = (steps - step) / max(1, steps - warmup_steps)
    return {"linear": remaining, "cosine": 0.5 * (1 - math.cos(math.pi * remaining)), "constant": 1.0}[optim.schedule]


def set_learning_rate(param_groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Set the learning rate of each group to a fraction of its peak."""
    for group in param_groups:
        group["lr"] = factor * group["peak"]


def optimizer_metrics(engine: Any) -> dict[str, float]:
    """Return the learning rate of each group, and where the engine has it the norm of the gradients."""
    rates = {f"lr/{group['name']}": group["lr"] for group in engine.optimizer.param_groups}
    norm = engine.get_global_grad_norm()
    return rates if norm is None else {**rates, "grad_norm": float(norm)}
