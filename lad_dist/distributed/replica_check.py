"""Comparison of replicas: processes that should hold the same weights do, or it is known whose differ.

    parameter_hash(tensors)    64 bits that depend on each bit of each tensor, computed where the tensors are
    divergent_ranks(tensors)   the ranks whose tensors differ

A flipped bit in a device's memory, or a missed collective, leaves one process with other weights. Its gradients then
spoil the weights of all. A single flipped bit always changes the hash, any other change with all but certainty.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from lad_dist.distributed import processes

CHUNK = 1 << 18  # integers: few kernels, little memory
# An odd number, as every factor is: then no power of 2 times it is 0 modulo 2^64, and no single flipped bit is missed.
MULTIPLIER = 6364136223846793005
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@torch.no_grad()
def parameter_hash(tensors: Iterable[Tensor]) -> int:
    """Return the sum of odd factors times all bits read as integers, modulo 2^64; wait for the device once."""
    total: Tensor | None = None
    factors: Tensor | None = None
    for tensor in tensors:
        if factors is None:
            factors = _factors(tensor.device)
            total = factors.new_zeros(())
        for integers in _as_integers(tensor).split(CHUNK):
            assert total is not None
            total = total * MULTIPLIER + (integers * factors[: len(integers)]).sum()
    return 0 if total is None else int(total)


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(1 << 62), 1 << 62, (CHUNK,), generator=generator) * 2 + 1).to(device)


def _as_integers(tensor: Tensor) -> Tensor:
    """Return the bits as integers, of 64 bits where the tensor's size allows it."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() * flat.element_size() % 8:
        return flat.view(INTEGERS[flat.element_size()])
    aligned = flat if flat.data_ptr() % 8 == 0 else flat.clone()
    return aligned.view(torch.int64)


def divergent_ranks(tensors: Iterable[Tensor]) -> list[int]:
    """Return the ranks whose tensors are not those of most ranks; all ranks where no more than half of them agree.

    All processes call it together, and get the same answer.
    """
    hashes = processes.all_gather(parameter_hash(tensors))
    (common, count), *_ = Counter(hashes).most_common()
    has_majority = 2 * count > len(hashes)
    return [rank for rank, value in enumerate(hashes) if value != common or not has_majority]
