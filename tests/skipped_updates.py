"""Tiny engines, and what becomes of their weights when an update is spoilt.

usage: torchrun tests/skipped_updates.py OUT.json: rank 0 leaves what `outcomes` says of every case on each rank, and
who dissents before and after a bit flips in the last rank's weights.
"""

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
from lad_dist.distributed import processes
from lad_dist.distributed.replica_check import divergent_ranks
from lad_dist.training import optimization
from lad_dist.training.update_guard import SkipPolicy, UpdateGuard

STEPS, SLOTS, SPOILT = 5, 4, 2
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
    """A regression. What is wrong with a batch is its `fault`: an infinite loss with finite gradients, or a finite
    loss, 0 more than it was, with a gradient that is not."""

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
    words = OptimConfig(lr=1e-2)
    optimizer = optimization.adamw(optimization.parameter_groups(model, nn.Identity(), words), words, stage)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": SLOTS,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": SLOTS // processes.world_size(),
            "gradient_clipping": 1.0,
            "steps_per_print": sys.maxsize,
            "zero_optimization": zero,
            **({precision: HALF[precision]} if precision in HALF else {}),
        },
    )
    return made


def train(stage: int, precision: str, fault: str = "", leave_out: int | None = None) -> tuple[list[str], list[Tensor]]:
    """Fates of the steps, and the weights after each. `fault`: of the last slot of step SPOILT."""
    made = engine(stage, precision)
    guard = UpdateGuard(made, SkipPolicy(max_skips=3))
    fates, weights = [], []
    for step in range(STEPS):
        if step == leave_out:
            continue
        for slot in range(processes.rank(), SLOTS, processes.world_size()):
            batch = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + slot))
            wrong = fault if (step, slot) == (SPOILT, SLOTS - 1) else ""
            guard.backward(made(batch.to(processes.device()), wrong))
            made.step()
        fates.append(guard.action(step).value)
        with deepspeed.zero.GatheredParameters(list(made.module.parameters())):
            weights.append(torch.cat([p.detach().float().flatten() for p in made.module.parameters()]).cpu())
    return fates, weights


def outcomes(cases: list[tuple[int, str, str]]) -> dict[str, Any]:
    """By case: the fates, whether each update but the first changed the weights, and whether the run ended as one that
    leaves the spoilt step out."""
    found = {}
    last = {(stage, precision): train(stage, precision, leave_out=SPOILT)[1][-1] for stage, precision, _ in cases}
    for stage, precision, fault in cases:
        fates, weights = train(stage, precision, fault)
        found[f"{stage} {precision} {fault}"] = {
            "fates": fates,
            "changed": [not torch.equal(before, after) for before, after in itertools.pairwise(weights)],
            "ends_as_without": torch.equal(weights[-1], last[stage, precision]),
        }
    return found


def dissent() -> list[list[int]]:
    made = engine(1, "bf16")
    before = divergent_ranks(made.module.parameters())
    if processes.rank() == processes.world_size() - 1:
        made.module.layers[0].bias.data.view(torch.int16)[5] ^= 1
    return [before, divergent_ranks(made.module.parameters())]


if __name__ == "__main__":
    processes.start()
    result = {"outcomes": processes.all_gather(outcomes(CASES)), "dissent": processes.all_gather(dissent())}
    if processes.is_main():
        Path(sys.argv[1]).write_text(json.dumps(result))
