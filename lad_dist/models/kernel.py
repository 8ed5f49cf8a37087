"""Where the variable-length attention kernel runs. Without transformers, so that `lad-dist env` answers soon."""

from functools import cache

import torch

KERNEL_COMPUTE_CAPABILITY = (8, 0)  # what the kernel requires of a GPU


@cache
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel computes in this data type on this device."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= KERNEL_COMPUTE_CAPABILITY
