"""Hashes differ where weights differ, and the rank whose weights differ is named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.distributed import processes
from lad_dist.distributed.replica_check import CHUNK, divergent_ranks, parameter_hash

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def weights(dtype: torch.dtype, *sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size).to(dtype) for size in sizes]


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_any_flipped_bit_changes_the_hash(dtype: torch.dtype, sizes: list[int], data: st.DataObject) -> None:
    before = weights(dtype, *sizes)
    after = [x.clone() for x in before]
    assert parameter_hash(after) == parameter_hash(before)
    tensor = data.draw(st.sampled_from(after))
    byte = data.draw(st.integers(0, tensor.numel() * tensor.element_size() - 1))
    tensor.view(torch.uint8)[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert parameter_hash(after) != parameter_hash(before)


@pytest.mark.parametrize("place", [0, CHUNK, 5 * CHUNK - 1])
def test_any_flipped_bit_changes_the_hash_of_many_chunks(place: int) -> None:
    (x,) = weights(torch.float32, 5 * CHUNK)
    before = parameter_hash([x])
    x.view(torch.int32)[place] ^= 1 << 31
    assert parameter_hash([x]) != before


def test_the_order_counts() -> None:
    a, b = weights(torch.float32, 6, 6)
    assert parameter_hash([a, b]) != parameter_hash([b, a])
    assert parameter_hash([a]) != parameter_hash([a.flip(0)])
    assert parameter_hash([torch.cat([a, b])]) != parameter_hash([torch.cat([b, a])])


def test_the_alignment_does_not_count() -> None:
    (a,) = weights(torch.float32, 8)
    shifted = torch.empty(9)[1:].copy_(a)
    assert shifted.data_ptr() % 8 != a.data_ptr() % 8
    assert parameter_hash([shifted]) == parameter_hash([a])
    square = a.view(2, 4)
    assert parameter_hash([square.t().contiguous().t()]) == parameter_hash([square])


@pytest.mark.parametrize(
    ("hashes", "ranks"),
    [([7], []), ([7, 7, 7], []), ([7, 8, 7, 7], [1]), ([7, 8], [0, 1]), ([7, 7, 8, 8], [0, 1, 2, 3])],
)
def test_divergent_ranks(hashes: list[int], ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "all_gather", lambda own: hashes)
    assert divergent_ranks([]) == ranks
