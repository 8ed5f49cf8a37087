"""What this package replaces in DeepSpeed: a function for each patch, with its reason."""

import warnings
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from lad_dist.checkpointing.async_save import HostSnapshotEngine

# As many weights as a CPU computes at once, or a multiple.
ALIGNMENT = 16
CACHED_NUMBERS = 2**16  # numbers that a CPU core's cache holds in fp64


def patch_library() -> None:
    """Apply the patches that all engines share."""
    align_shares()
    sum_gradient_norms_in_fp64()
    leave_out_compiled_operations()
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # which it calls


def patch_engine(engine: Any) -> None:
    """Apply the patches of one engine."""
    save_to_host_memory(engine)
    leave_out_recovery_scripts(engine)


def align_shares() -> None:
    """Make the number of weights of a share, under ZeRO-1 and 2, a multiple of ALIGNMENT.

    A CPU rounds a remainder at a share's end in another way, and then the result would depend on where shares end.
    """
    DeepSpeedZeroOptimizer.nccl_start_alignment_factor = property(lambda _: ALIGNMENT, lambda *_: None)


def sum_gradient_norms_in_fp64() -> None:
    """Sum the norm of the gradients, under ZeRO-1 and 2, in fp64.

    Rounding the sum of each share would make the clipped gradients depend on which process has which share.
    """
    DeepSpeedZeroOptimizer.get_grad_norm_direct = _gradient_norm


def _gradient_norm(optimizer: Any, gradients: Iterable[Tensor], parameters: Any, norm_type: float = 2) -> Tensor:
    """Return the norm of a group's gradients over all processes' shares."""
    assert norm_type == 2
    norms = []
    for x in gradients:
        if not hasattr(x, "_zero_padding"):
            # A CPU materializes the fp64 copy, which stays in the cache piece by piece.
            pieces = x.flatten().split(CACHED_NUMBERS) if x.device.type == "cpu" else (x,)
            norms += [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    zero = torch.zeros((), dtype=torch.float64, device=optimizer.device)
    total = torch.stack(norms).square().sum() if norms else zero
    dist.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    mask_nan_or_inf_with_val_inplace(norm, device=norm.device)
    return norm


def leave_out_compiled_operations() -> None:
    """Let DeepSpeed find no operation that it could compile.

    Its shared-memory collectives compile C++ at first use; gloo serves a CPU, and nccl a GPU.
    """
    deepspeed.ops.__compatible_ops__ = {}


def save_to_host_memory(engine: Any) -> None:
    """Let a save copy the state to host memory, from where a thread writes it while training goes on.

    Loading is replaced too: it never unpickles.
    """
    engine.checkpoint_engine = HostSnapshotEngine()


def leave_out_recovery_scripts(engine: Any) -> None:
    """Let a save copy no scripts into the checkpoint, which holds no code and only files with a digest."""
    engine._copy_recovery_script = lambda _: None
