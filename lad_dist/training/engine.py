"""The DeepSpeed engine: build it, copy its state, reset moments, free it."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.async_save import Files
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.distributed import processes, ranks
from lad_dist.training import deepspeed_patches, optimization
from lad_dist.training.distiller import Distiller
from lad_dist.utils.text import one_line


def check_precision(precision: str) -> None:
    """Raise UserError where DeepSpeed does not train in this data type on the device of this process."""
    accelerator = get_accelerator()
    supported = {"float16": accelerator.is_fp16_supported, "bfloat16": accelerator.is_bf16_supported}
    if precision in supported and not supported[precision]():
        key, device = {"float16": "fp16", "bfloat16": "bf16"}[precision], processes.device_name()
        raise UserError(f"deepspeed.{key}.enabled: DeepSpeed has no {key} on this device ({device}); set it to false")


def build_engine(distiller: Distiller, config: TrainConfig) -> Any:
    """Return the engine that trains a distiller.

    Under ZeRO-1 and 2 in fp32 on a CPU, the result does not depend on where shares end. Raise UserError for tables of
    [deepspeed] that DeepSpeed finds at fault only now.
    """
    logger.setLevel("ERROR")
    deepspeed_patches.patch_library()
    options = {
        "train_batch_size": config.data.micro_batches_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.micro_batches_per_step // ranks.world_size(),
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
    try:
        with contextlib.redirect_stdout(sys.stderr):
            engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=options)
    except Exception as error:
        # A RuntimeError is of memory or of the network; what DeepSpeed cannot combine is of many kinds.
        if not config.deepspeed or (isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)):
            raise
        raise UserError(f"deepspeed: {one_line(error)}") from error
    deepspeed_patches.patch_engine(engine)
    return engine


def snapshot(engine: Any, folder: Path) -> Files:
    """Return the files of a checkpoint that this process writes; all processes call it together."""
    client = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
    engine.save_checkpoint(str(folder), tag=reshard.TAG, client_state=client, save_latest=False)
    return engine.checkpoint_engine.pop_files()


def reset_optimizer_state(engine: Any, pruned: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Zero the moments of weights where the masks are False, up to ZeRO-2: pruned weights must not drift."""
    if not pruned:
        return  # as in most steps
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    positions = {
        parameter: (n, i) for n, group in enumerate(reshard.groups(engine)) for i, parameter in enumerate(group)
    }
    for parameter, mask in pruned:
        if parameter not in positions:
            continue  # it is frozen
        number, index = positions[parameter]
        weight, source, target = parameter, slice(None), slice(None)
        if hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is None:
                continue  # other processes hold all of it
            (weight,) = inner.param_groups[number]["params"]  # flat: this process's share of the group
            source, target = map(_slice, (mapping.lp_fragment_address, mapping.get_hp_fragment_address()))
        elif hasattr(optimizer, "fp32_groups"):
            weight = optimizer.fp32_groups[number][index]
        for state in inner.state.get(weight, {}).values():
            if isinstance(state, Tensor) and state.shape == weight.shape:  # a moment, no count
                state.view(-1)[target].mul_(mask.flatten()[source].to(state.device))  # it may be offloaded


def _slice(address: fragment_address) -> slice:
    return slice(address.start, address.start + address.numel)


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
