"""Comparison of replicas: processes that should hold the same weights do, or it is known whose differ.

A flipped bit in a device's memory, or a missed collective, leaves one process with other weights. Its gradients then
spoil the weights of all. A single flipped bit always changes the hash, any other change with all but certainty.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from lad_dist.distributed import processes

CHUNK = 1 << 18  # integers: few kernels, little memory
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes


@torch.no_grad()
def parameter_hash(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and bits; read the bits where the tensors are, and wait for the device once."""
    headers, hashes = [], []
    for name, tensor in named_tensors:
        headers.append((name, tensor.dtype, tensor.shape))
        # At most 32 bits at a time: a factor moves the highest of 64 bits nowhere, and two such flips would cancel.
        integers = tensor.detach().contiguous().view(-1).view(INTEGERS[min(tensor.element_size(), 4)])
        for chunk in integers.split(CHUNK):
            if len(chunk):  # PyTorch hashes nothing that is empty
                offsets, factors = (of_places[: len(chunk)] for of_places in _of_places(tensor.device))
                hashes.append(torch.hash_tensor((chunk + offsets) * factors).view(torch.int64))
    values = torch.stack(hashes).tolist() if hashes else []
    return hashlib.sha256(repr((headers, values)).encode()).hexdigest()


@cache
def _of_places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an offset and a factor for each place, as `hash_tensor` is blind to order.

    Factors are odd, so that no flipped bit is missed. Without offsets two numbers of which a flip makes the negative
    ones, as of 2.0 in fp32, would cancel: -v and v differ in the same bits whatever the factor.
    """
    generator = torch.Generator().manual_seed(0)
    offsets, factors = torch.randint(-(1 << 62), 1 << 62, (2, CHUNK), generator=generator).to(device)
    return offsets, factors * 2 + 1


def divergent_ranks(named_tensors: Iterable[tuple[str, Tensor]]) -> list[int]:
    """Return the ranks whose tensors are not those of most ranks; all ranks where no more than half of them agree.

    All processes call it together, and get the same answer.
    """
    hashes = processes.all_gather(parameter_hash(named_tensors))
    (common, count), *_ = Counter(hashes).most_common()
    has_majority = 2 * count > len(hashes)
    return [rank for rank, value in enumerate(hashes) if value != common or not has_majority]
