"""The DeepSpeed engine: build it, check its config, copy its state.

check_deepspeed_config(config)          the values of [deepspeed], by DeepSpeed's own checks
build_engine(distiller, config)         the engine that trains a distiller
snapshot(engine, folder)                the files of a checkpoint in that folder, in memory
reset_optimizer_state(engine, pruned)   zeroes the moments of pruned weights
gathered_parameters(distiller, stage)   a context in which every process has all weights
release(engine)                         frees what the engine holds
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
from lad_dist.config.load import first_mistake
from lad_dist.config.schema import TrainConfig
from lad_dist.distributed import processes
from lad_dist.training import optimization
from lad_dist.training.distiller import Distiller

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

DEEPSPEED_SCHEMAS = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
# The number of weights of a share is a multiple of this: as many as a CPU computes at once, or a multiple. A CPU rounds
# a remainder at a share's end in another way, and then the result would depend on where shares end.
ALIGNMENT = 16
CACHED_NUMBERS = 2**16  # numbers that a CPU core's cache holds in fp64
VERSION: str = deepspeed.__version__


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Raise UserError where DeepSpeed's own checks refuse a value; resolve_run() has checked the keys."""
    for name, schema in DEEPSPEED_SCHEMAS.items():
        try:
            schema(**config.get(name, {}))
        except ValidationError as error:
            raise UserError(f"deepspeed.{name}.{first_mistake(error)}") from None


def build_engine(distiller: Distiller, config: TrainConfig) -> Any:
    """Return the engine that trains a distiller.

    Under ZeRO-1 and 2 in fp32 on a CPU, the result does not depend on where shares end.
    """
    logger.setLevel("ERROR")
    DeepSpeedZeroOptimizer.nccl_start_alignment_factor = property(lambda _: ALIGNMENT, lambda *_: None)
    DeepSpeedZeroOptimizer.get_grad_norm_direct = _gradient_norm
    # DeepSpeed's shared-memory collectives compile C++ at first use; gloo serves a CPU, and nccl a GPU.
    deepspeed.ops.__compatible_ops__ = {}
    options = {
        "train_batch_size": config.data.micro_batches_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.micro_batches_per_step // processes.world_size(),
        "gradient_clipping": 1.0,
        "steps_per_print": sys.maxsize,
        "zero_force_ds_cpu_optimizer": False,  # [optim] decides, with weights offloaded too
        **config.deepspeed,
    }
    groups = optimization.parameter_groups(distiller.student, distiller.objective, config.optim)
    if zero := config.deepspeed.get("zero_optimization"):
        num_weights = sum(weight.numel() for group in groups for weight in group["params"])
        options["zero_optimization"] = {**zero, "reduce_bucket_size": optimization.bucket_size(zero, num_weights)}
    optimizer = optimization.adamw(groups, config.optim, config.zero_stage)
    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=options)
    engine.checkpoint_engine = HostSnapshotEngine(reshard.read)
    engine._copy_recovery_script = lambda _: None  # a checkpoint holds no code
    return engine


def _gradient_norm(optimizer: Any, gradients: Iterable[Tensor], parameters: Any, norm_type: float = 2) -> Tensor:
    """Return the norm of a group's gradients over all processes' shares, summed in fp64.

    Rounding the sum of each share would make the clipped gradients depend on which process has which share.
    """
    assert norm_type == 2
    unpadded = [x for x in gradients if not hasattr(x, "_zero_padding")]
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for x in unpadded for piece in _pieces(x)]
    zero = torch.zeros((), dtype=torch.float64, device=optimizer.device)
    total = torch.stack(norms).square().sum() if norms else zero
    dist.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    mask_nan_or_inf_with_val_inplace(norm, device=norm.device)
    return norm


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """Split a tensor on the CPU: it materializes the fp64 copy, which stays in the cache piece by piece."""
    return x.flatten().split(CACHED_NUMBERS) if x.device.type == "cpu" else (x,)


def snapshot(engine: Any, folder: Path) -> Files:
    """Return the files of a checkpoint that this process writes; all processes call it together."""
    client = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
    engine.save_checkpoint(str(folder), tag=reshard.TAG, client_state=client, save_latest=False)
    return engine.checkpoint_engine.pop_files()


def reset_optimizer_state(engine: Any, pruned: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Zero the moments of weights where the masks are False, up to ZeRO-2: pruned weights must not drift."""
    if not pruned:
        return  # as in most steps
    positions = {
        parameter: (group_index, index)
        for group_index, group in enumerate(reshard.groups(engine))
        for index, parameter in enumerate(group)
    }
    for parameter, mask in pruned:
        if parameter in positions:  # not where it is frozen
            _reset_state(engine.optimizer, parameter, mask.flatten(), *positions[parameter])


def _reset_state(optimizer: Any, parameter: nn.Parameter, mask: Tensor, group_index: int, index: int) -> None:
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return  # other processes hold all of it
        (flat,) = optimizer.optimizer.param_groups[group_index]["params"]
        source, target = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        for moment in _moments(optimizer.optimizer, flat):
            piece = mask.narrow(0, source.start, source.numel)
            moment.narrow(0, target.start, target.numel).mul_(piece.to(moment.device))  # it may be offloaded
        return
    half = hasattr(optimizer, "fp32_groups")
    weight = optimizer.fp32_groups[group_index][index] if half else parameter
    for moment in _moments(optimizer.optimizer if half else optimizer, weight):
        moment.view(-1).mul_(mask.to(moment.device))


def _moments(optimizer: Any, weight: Tensor) -> list[Tensor]:
    """Return the moments of a weight, which have the weight's size; none before the first update."""
    return [x for x in optimizer.state.get(weight, {}).values() if isinstance(x, Tensor) and x.shape == weight.shape]


def gathered_parameters(distiller: Distiller, stage: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which every process has whole weights under ZeRO-3."""
    if stage < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(list(distiller.parameters()))


def release(engine: Any) -> None:
    """Remove the engine's hooks from the weights, so that they are freed once nothing refers to them.

    Another run of this process needs the memory. Under ZeRO-3 DeepSpeed 0.19 still holds them.
    """
    engine.destroy()


def communication_seconds() -> float:
    """Return the seconds in collectives since the last call, by the timers of DeepSpeed's `comms_logger`.

    Reading resets the timers. The logger's own table adds up running totals.
    """
    return sum(timer.elapsed() for timer in deepspeed.comm.comm.timers.get_timers().values()) / 1000
