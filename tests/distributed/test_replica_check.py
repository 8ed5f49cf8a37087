"""Hashes differ where weights differ, and the rank whose weights differ is named."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lad_dist.distributed import processes
from lad_dist.distributed.replica_check import CHUNK, divergent_ranks, parameter_hash

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)
SHAPES = st.lists(st.sampled_from([(), (1,), (5,), (8,), (2, 3)]), min_size=1, max_size=4)


def weights(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(3 * torch.randn(shape)).to(dtype) for shape in shapes]


def hash_of(*tensors: torch.Tensor) -> str:
    return parameter_hash((str(number), tensor) for number, tensor in enumerate(tensors))


def flip(tensor: torch.Tensor, byte: int, bit: int) -> None:
    tensor.view(-1).view(torch.uint8)[byte] ^= 1 << bit


@given(st.sampled_from(DTYPES), SHAPES, st.data())
def test_any_flipped_bit_changes_the_hash(
    dtype: torch.dtype, shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    before = weights(dtype, *shapes)
    after = [x.clone() for x in before]
    assert hash_of(*after) == hash_of(*before)
    tensor = data.draw(st.sampled_from(after))
    flip(tensor, data.draw(st.integers(0, tensor.nbytes - 1)), data.draw(st.integers(0, 7)))
    assert hash_of(*after) != hash_of(*before)


@given(st.sampled_from(DTYPES), st.sets(st.integers(0, 11), min_size=2, max_size=2), st.data())
def test_the_same_bit_flipped_in_two_places_changes_the_hash(
    dtype: torch.dtype, places: set[int], data: st.DataObject
) -> None:
    (x,) = weights(dtype, (12,))
    before = hash_of(x)
    byte, bit = data.draw(st.integers(0, x.element_size() - 1)), data.draw(st.integers(0, 7))
    for place in places:
        flip(x, place * x.element_size() + byte, bit)
    assert hash_of(x) != before


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, -0.5])
def test_the_same_bit_flipped_in_two_equal_numbers_changes_the_hash(value: float) -> None:
    before = hash_of(torch.full((8,), value))
    for first, second in itertools.combinations(range(8), 2):
        for byte, bit in itertools.product(range(4), range(8)):
            x = torch.full((8,), value)
            for place in (first, second):
                flip(x, 4 * place + byte, bit)
            assert hash_of(x) != before


@given(st.sampled_from(DTYPES), st.permutations(range(6)))
def test_the_order_of_elements_counts(dtype: torch.dtype, order: list[int]) -> None:
    (x,) = weights(dtype, (6,))
    assume(not x[order].equal(x))
    assert hash_of(x[order]) != hash_of(x)


@pytest.mark.parametrize("place", [0, CHUNK, 5 * CHUNK - 1])
def test_any_flipped_bit_changes_the_hash_of_many_chunks(place: int) -> None:
    (x,) = weights(torch.float32, (5 * CHUNK,))
    before = hash_of(x)
    assert hash_of(torch.roll(x, CHUNK)) != before
    flip(x, 4 * place + 3, 7)
    assert hash_of(x) != before


def test_names_shapes_and_order_of_tensors_count() -> None:
    a, b = weights(torch.float32, (6,), (6,))
    assert hash_of(a, b) != hash_of(b, a)
    assert hash_of(a, b) != hash_of(torch.cat([a, b]))
    assert hash_of(a) != hash_of(a.view(2, 3))
    assert parameter_hash([("a", a)]) != parameter_hash([("b", a)])
    empty, zeros = torch.zeros(0), torch.zeros(6)
    assert len({hash_of(), hash_of(empty), hash_of(zeros), hash_of(zeros, empty), hash_of(torch.zeros(7))}) == 5


def test_the_layout_in_memory_does_not_count() -> None:
    (a,) = weights(torch.float32, (8,))
    shifted = torch.empty(9)[1:].copy_(a)
    assert shifted.data_ptr() % 8 != a.data_ptr() % 8
    assert hash_of(shifted) == hash_of(a)
    square = a.view(2, 4)
    assert hash_of(square.t().contiguous().t()) == hash_of(square)


@pytest.mark.parametrize(
    ("hashes", "ranks"),
    [([7], []), ([7, 7, 7], []), ([7, 8, 7, 7], [1]), ([7, 8], [0, 1]), ([7, 7, 8, 8], [0, 1, 2, 3])],
)
def test_divergent_ranks(hashes: list[int], ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "all_gather", lambda own: hashes)
    assert divergent_ranks([]) == ranks
