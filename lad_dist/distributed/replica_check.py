"""Agreement: weights that processes hold alike are alike, or it is known whose are not.

    fingerprint(tensors)   64 bits that depend on each bit of each tensor, computed where the tensors are
    dissenters(tensors)    the ranks whose tensors differ

A flipped bit in a device's memory, or a missed collective, leaves one process with other weights; its gradients then
spoil everybody's. A single flipped bit always changes the fingerprint, anything else with all but certainty.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from lad_dist.distributed import processes

CHUNK = 1 << 18  # words: few kernels, little memory
NEXT = 6364136223846793005  # odd, as every factor of a word: then no power of 2 times it is 0 modulo 2^64
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def parameter_hash(tensors: Iterable[Tensor]) -> int:
    """A sum over all words of odd factors times words, modulo 2^64. Waits for the device once."""
    total: Tensor | None = None
    factors: Tensor | None = None
    for tensor in tensors:
        if factors is None:
            factors = _factors(tensor.device)
            total = factors.new_zeros(())
        for words in _words(tensor).split(CHUNK):
            assert total is not None
            total = total * NEXT + (words * factors[: len(words)]).sum()
    return 0 if total is None else int(total)


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(1 << 62), 1 << 62, (CHUNK,), generator=generator) * 2 + 1).to(device)


def _words(tensor: Tensor) -> Tensor:
    """The bits as integers, of 64 bits where they are that many."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() * flat.element_size() % 8:
        return flat.view(WORDS[flat.element_size()])
    aligned = flat if flat.data_ptr() % 8 == 0 else flat.clone()
    return aligned.view(torch.int64)


def divergent_ranks(tensors: Iterable[Tensor]) -> list[int]:
    """The ranks whose tensors are not those of most ranks; all ranks where no more than half of them agree. All
    processes call it together, and get one answer."""
    prints = processes.all_gather(parameter_hash(tensors))
    (common, votes), *_ = Counter(prints).most_common()
    agreed = 2 * votes > len(prints)
    return [rank for rank, own in enumerate(prints) if own != common or not agreed]
