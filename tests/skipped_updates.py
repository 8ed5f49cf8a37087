"""Tiny engines, and what becomes of their weights when an update is spoilt."""

import itertools
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger

from lad_dist.config.schema import OptimConfig
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.replica_check import divergent_ranks
from lad_dist.training import optimization
from lad_dist.training.update_guard import SkipPolicy, UpdateGuard

STEPS, MICRO_BATCHES, SPOILT = 5, 4, 2
HALF = {"bf16": {"enabled": True}, "fp16": {"enabled": True, "loss_scale": 128.0}}
PRECISIONS = ["fp32", "bf16", *(["fp16"] if torch.cuda.is_available() else [])]  # DeepSpeed has no fp16 on a CPU
CASES = [
    (stage, precision, fault)
    for stage in range(4)
    for precision in PRECISIONS
    for fault in (("loss", "gradient") if precision == "fp32" else ("loss",))
    if (stage, precision) != (0, "bf16")
]


class Tiny(nn.Module):
    """A regression, some of whose batches have a `fault`.

    "loss" is an infinite loss with finite gradients; "gradient" adds 0 to the loss, with a gradient that is not finite.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, fault: str) -> Tensor:
        x = x.to(self.layers[0].weight.dtype)
        y = self.layers(x)
        loss = (y - x.sum(1, keepdim=True)).float().square().mean()
        return loss + {"": 0.0, "loss": math.inf, "gradient": (y.sum() * 0).float().sqrt()}[fault]


def engine(stage: int, precision: str) -> Any:
    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = {}
    torch.manual_seed(0)
    model = Tiny().to(processes.device())
    options = OptimConfig(lr=1e-2)
    optimizer = optimization.adamw(optimization.parameter_groups(model, nn.Identity(), options), options, stage)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    new_engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": MICRO_BATCHES,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES // ranks.world_size(),
            "gradient_clipping": 1.0,
            "steps_per_print": sys.maxsize,
            "zero_optimization": zero,
            **({precision: HALF[precision]} if precision in HALF else {}),
        },
    )
    return new_engine


def train(
    stage: int, precision: str, fault: str = "", skipped_step: int | None = None
) -> tuple[list[str], list[Tensor]]:
    """Return the actions of the steps, and the weights after each. `fault`: in the last micro-batch of step SPOILT."""
    tiny = engine(stage, precision)
    guard = UpdateGuard(tiny, SkipPolicy(max_skips=3))
    actions, weights = [], []
    for step in range(STEPS):
        if step == skipped_step:
            continue
        for micro_batch in range(ranks.rank(), MICRO_BATCHES, ranks.world_size()):
            batch = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + micro_batch))
            spoilt = fault if (step, micro_batch) == (SPOILT, MICRO_BATCHES - 1) else ""
            guard.backward(tiny(batch.to(processes.device()), spoilt))
            tiny.step()
        actions.append(guard.action(step).value)
        with deepspeed.zero.GatheredParameters(list(tiny.module.parameters())):
            weights.append(torch.cat([p.detach().float().flatten() for p in tiny.module.parameters()]).cpu())
    return actions, weights


def action_table(cases: list[tuple[int, str, str]]) -> dict[str, Any]:
    """Return for each case the actions and what became of the weights.

    `changed`: whether each update but the first changed them. `ends_as_without`: whether they end as those of a run
    that skips the spoilt step.
    """
    results = {}
    last = {(stage, precision): train(stage, precision, skipped_step=SPOILT)[1][-1] for stage, precision, _ in cases}
    for stage, precision, fault in cases:
        actions, weights = train(stage, precision, fault)
        results[f"{stage} {precision} {fault}"] = {
            "actions": actions,
            "changed": [not torch.equal(before, after) for before, after in itertools.pairwise(weights)],
            "ends_as_without": torch.equal(weights[-1], last[stage, precision]),
        }
    return results


def divergence() -> list[list[int]]:
    tiny = engine(1, "bf16")
    before = divergent_ranks(tiny.module.named_parameters())
    if ranks.rank() == ranks.world_size() - 1:
        tiny.module.layers[0].bias.data.view(torch.int16)[5] ^= 1
    return [before, divergent_ranks(tiny.module.named_parameters())]


def write_tables(out: Path) -> None:
    """On each rank the `action_table` of every case, and which ranks diverge before and after a bit flips.

    The bit is in the weights of the last rank.
    """
    processes.start()
    result = {"cases": processes.all_gather(action_table(CASES)), "divergence": processes.all_gather(divergence())}
    if ranks.is_main():
        out.write_text(json.dumps(result))
