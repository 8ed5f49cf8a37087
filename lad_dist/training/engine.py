"""The engine: DeepSpeed, made, checked and copied. With resize.py the only importer of deepspeed.

check(table)               [deepspeed] in DeepSpeed's own words, by DeepSpeed's own checks
build(method, config)      the engine that trains a method
snapshot(engine, folder)   the files of a checkpoint in that folder, in memory
forget(engine, pruned)     the optimizer's moments of weights that were taken away
whole(method, stage)       within it every process has all weights
release(engine)            what it held may go
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger
from pydantic import ValidationError
from torch import Tensor, nn

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.async_save import Files, HostSnapshotEngine
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.distributed import processes
from lad_dist.training import optimization
from lad_dist.training.distiller import Distiller

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

BLOCKS = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
# Of shares, in weights: as many as a CPU computes at once, or a multiple. It rounds those left over at a share's end in
# another way, so they must not be there, or what is learnt depends on where shares end.
ALIGNMENT = 16
CACHED = 2**16  # numbers that a CPU core's cache holds in fp64
VERSION: str = deepspeed.__version__


def check_deepspeed_config(table: Mapping[str, Any]) -> None:
    """The values in DeepSpeed's blocks, by its own checks; plan.make has seen to the keys. Raises UserError."""
    for name, schema in BLOCKS.items():
        try:
            schema(**table.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(f"deepspeed.{name}.{key}: {first['msg']}") from None


def build_engine(method: Distiller, config: TrainConfig) -> Any:
    """Under ZeRO-1 and 2 in fp32 on a CPU, what it learns does not depend on how its shares are cut."""
    logger.setLevel("ERROR")
    DeepSpeedZeroOptimizer.nccl_start_alignment_factor = property(lambda _: ALIGNMENT, lambda *_: None)
    DeepSpeedZeroOptimizer.get_grad_norm_direct = _share_of_norm
    # Its shared-memory collectives compile C++ at first use; gloo serves a CPU, and nccl a GPU.
    deepspeed.ops.__compatible_ops__ = {}
    words = {
        "train_batch_size": config.data.micro_batches_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.micro_batches_per_step // processes.world_size(),
        "gradient_clipping": 1.0,
        "steps_per_print": sys.maxsize,
        "zero_force_ds_cpu_optimizer": False,  # [optim] decides, with weights offloaded too
        **config.deepspeed,
    }
    groups = optimization.parameter_groups(method.student, method.objective, config.optim)
    if zero := config.deepspeed.get("zero_optimization"):
        trained = sum(weight.numel() for group in groups for weight in group["params"])
        words["zero_optimization"] = {**zero, "reduce_bucket_size": optimization.bucket_size(zero, trained)}
    optimizer = optimization.adamw(groups, config.optim, config.zero_stage)
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=words)
    engine.checkpoint_engine = HostSnapshotEngine(reshard.read)
    engine._copy_recovery_script = lambda _: None  # a checkpoint holds no code
    return engine


def _share_of_norm(optimizer: Any, gradients: Iterable[Tensor], parameters: Any, norm_type: float = 2) -> Tensor:
    """The norm of all processes' shares of a group's gradients: summed in fp64 to the end, as rounding each share's sum
    makes the clipped gradients depend on who has which share."""
    assert norm_type == 2
    real = [x for x in gradients if not hasattr(x, "_zero_padding")]
    mine = [torch.linalg.vector_norm(piece, dtype=torch.float64) for x in real for piece in _pieces(x)]
    total = torch.stack(mine).square().sum() if mine else torch.zeros((), dtype=torch.float64, device=optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    mask_nan_or_inf_with_val_inplace(norm, device=norm.device)
    return norm


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """A CPU writes out what it widens to fp64; piece by piece that stays in its cache. A GPU widens as it sums."""
    return x.flatten().split(CACHED) if x.device.type == "cpu" else (x,)


def snapshot(engine: Any, folder: Path) -> Files:
    """All processes call it together; each gets the files that are its own to write."""
    client = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
    engine.save_checkpoint(str(folder), tag=reshard.TAG, client_state=client, save_latest=False)
    return engine.checkpoint_engine.taken()


def reset_optimizer_state(engine: Any, pruned: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Zeroes the moments of weights where their masks are False, in ZeRO's stages up to 2: what is gone must not go on
    drifting."""
    if not pruned:
        return  # as in most steps
    places = {
        parameter: (number, place)
        for number, group in enumerate(reshard.groups(engine))
        for place, parameter in enumerate(group)
    }
    for parameter, kept in pruned:
        if parameter in places:  # or it is frozen
            _reset_state(engine.optimizer, parameter, kept.flatten(), *places[parameter])


def _reset_state(optimizer: Any, parameter: nn.Parameter, kept: Tensor, group: int, place: int) -> None:
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return  # all of it lies with other processes
        (flat,) = optimizer.optimizer.param_groups[group]["params"]
        whole, here = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        for moment in _moments(optimizer.optimizer, flat):
            stays = kept.narrow(0, whole.start, whole.numel)
            moment.narrow(0, here.start, here.numel).mul_(stays.to(moment.device))  # it may be offloaded
        return
    half = hasattr(optimizer, "fp32_groups")
    weight = optimizer.fp32_groups[group][place] if half else parameter
    for moment in _moments(optimizer.optimizer if half else optimizer, weight):
        moment.view(-1).mul_(kept.to(moment.device))


def _moments(optimizer: Any, weight: Tensor) -> list[Tensor]:
    """Of a weight's size; none before the first update."""
    return [x for x in optimizer.state.get(weight, {}).values() if isinstance(x, Tensor) and x.shape == weight.shape]


def gathered_parameters(method: Distiller, stage: int) -> contextlib.AbstractContextManager[Any]:
    """Under ZeRO-3, whole weights on every process."""
    if stage < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(list(method.parameters()))


def release(engine: Any) -> None:
    """Takes its hooks off the weights, so that they are freed once nobody names them: another run of this process needs
    the room. Under ZeRO-3 DeepSpeed 0.19 still keeps them."""
    engine.destroy()


def communication_seconds() -> float:
    """What DeepSpeed's timers measured in collectives so far, under its `comms_logger`; reading resets them. (The
    logger's own table adds up running totals.)"""
    return sum(timer.elapsed() for timer in deepspeed.comm.comm.timers.get_timers().values()) / 1000
