import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lad_dist.utils.rng import Permutation, derive_key, derive_keys, random_uint64


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one(size: int, number: int) -> None:
    image = Permutation(size, number)(np.arange(size))
    assert sorted(image.tolist()) == list(range(size))


@given(st.integers(1, 10**12), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 10**12), min_size=2, max_size=20))
def test_a_large_permutation_repeats_nothing_and_does_not_depend_on_what_else_is_asked(
    size: int, number: int, places: list[int]
) -> None:
    positions = np.unique(np.array(places) % size)
    together = Permutation(size, number)(positions)
    assert len(set(together.tolist())) == len(positions)
    assert ((together >= 0) & (together < size)).all()
    alone = [int(Permutation(size, number)(positions[i : i + 1])[0]) for i in range(len(positions))]
    assert together.tolist() == alone


def test_every_place_is_as_likely() -> None:
    size, shuffles = 20, 4000
    where = np.array([Permutation(size, derive_key(7, n))(np.arange(size)) for n in range(shuffles)])
    for place in range(size):
        counts = np.bincount(where[:, place], minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-5
    follows = (np.diff(where, axis=1) == 1).mean()  # neighbours stay together no more often than by chance
    assert abs(follows - 1 / size) < 0.005


def test_neighbours_are_torn_apart_in_a_large_shuffle() -> None:
    size = 10**6
    image = Permutation(size, 3)(np.arange(100_000))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert stats.kstest(image / size, "uniform").pvalue > 1e-4


def test_keys_depend_on_each_number_and_on_their_order() -> None:
    keys = {derive_key(*numbers) for numbers in [(), (0,), (0, 0), (1, 0), (0, 1), (1, 2, 3), (3, 2, 1), (2**63,)]}
    assert len(keys) == 8
    array = derive_keys(5, np.arange(1000))
    assert len(set(array.tolist())) == 1000
    assert not set(array.tolist()) & set(derive_keys(6, np.arange(1000)).tolist())


@pytest.mark.parametrize("bit", range(64))
def test_draws_are_even_in_every_bit(bit: int) -> None:
    bits = random_uint64(derive_keys(0, np.arange(100)), 0, 400)
    share = ((bits >> np.uint64(bit)) & np.uint64(1)).mean()
    assert abs(share - 0.5) < 0.0125  # 5 standard errors


def test_draws_are_a_stream() -> None:
    keys = derive_keys(1, np.arange(3))
    assert (random_uint64(keys, 2, 9) == random_uint64(keys, 0, 10)[:, 2:9]).all()
    assert len(np.unique(random_uint64(keys, 0, 1000))) == 3000
