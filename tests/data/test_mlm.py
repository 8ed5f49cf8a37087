"""Masking: how many tokens, which, and by what they are replaced."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.data.mlm import Vocabulary, mask_windows
from lad_dist.utils.rng import derive_keys

MASK, SIZE = 4, 30_000
PLAIN = Vocabulary(MASK, np.arange(5, SIZE))


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Ids and what of them is content."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.integers(5, 50, shape), random.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))


@given(rows(), st.integers(1, 12), st.integers(0, 2**40), st.booleans())
def test_what_is_masked_and_what_is_left(
    row: tuple[np.ndarray, np.ndarray], count: int, seed: int, whole_words: bool
) -> None:
    ids, content = row
    before = ids.copy()
    vocabulary = PLAIN._replace(word_starts=np.arange(SIZE) % 3 > 0) if whole_words else PLAIN
    keys = derive_keys(seed, np.arange(len(ids)))
    input_ids, masked = mask_windows(ids, content, count, vocabulary, keys)
    assert (ids == before).all()
    assert (input_ids[~masked] == ids[~masked]).all()
    assert not (masked & ~content).any()
    assert (masked.sum(axis=1) == np.minimum(count, content.sum(axis=1))).all()
    for i in range(len(ids)):
        window = slice(i, i + 1)
        alone = mask_windows(ids[window], content[window], count, vocabulary, keys[window])
        assert (alone[0] == input_ids[window]).all()
        assert (alone[1] == masked[window]).all()


def test_shares_over_a_million_tokens() -> None:
    ids = np.full((8000, 128), 77)
    content = np.ones(ids.shape, dtype=bool)
    content[:, [0, 50, -1]] = False
    input_ids, masked = mask_windows(ids, content, 19, PLAIN, derive_keys(0, np.arange(len(ids))))
    masked_ids = input_ids[masked]
    assert len(masked_ids) == 8000 * 19
    other = masked_ids[(masked_ids != MASK) & (masked_ids != 77)]
    assert abs((masked_ids == MASK).mean() - 0.8) < 0.005  # five standard errors
    assert abs((masked_ids == 77).mean() - 0.1) < 0.004
    assert abs(len(other) / len(masked_ids) - 0.1) < 0.004
    per_place = masked.sum(axis=0)
    assert per_place[[0, 50, -1]].sum() == 0
    expected = 8000 * 19 / 125
    assert abs(per_place[content[0]] - expected).max() < 5.5 * np.sqrt(expected * (1 - 19 / 125))
    assert abs((other.mean() - 5) / (SIZE - 5) - 0.5) < 0.015
    assert other.min() >= 5
    assert other.max() < SIZE
    together = (masked[:, 1:50][:, :-1] & masked[:, 1:50][:, 1:]).mean()  # neighbours are masked independently
    assert abs(together - 19 / 125 * 18 / 124) < 0.001


def test_only_ordinary_tokens_replace() -> None:
    ids, content = np.full((2000, 20), 9), np.ones((2000, 20), dtype=bool)
    few = Vocabulary(MASK, np.array([7, 9, 13]))
    input_ids, masked = mask_windows(ids, content, 10, few, derive_keys(0, np.arange(2000)))
    assert set(input_ids[masked].tolist()) == {MASK, 7, 9, 13}


def test_masks_differ_from_key_to_key() -> None:
    ids, content = np.tile(np.arange(10, 138), (1000, 1)), np.ones((1000, 128), dtype=bool)
    _, masked = mask_windows(ids, content, 19, PLAIN, derive_keys(3, np.arange(1000)))
    assert len(np.unique(masked, axis=0)) == 1000


# Words of one, two and three tokens: 10; 20 21; 30 31 32.
WORDS = [[10], [20, 21], [30, 31, 32]]
STARTS = np.isin(np.arange(SIZE), [10, 20, 30])


def text_of_words(count: int, length: int) -> np.ndarray:
    random = np.random.default_rng(1)
    text = [token for word in random.integers(3, size=count) for token in WORDS[word]]
    return np.array(text[: len(text) // length * length]).reshape(-1, length)


def words_in(row: np.ndarray) -> list[np.ndarray]:
    """Places of each word; the first may lack its beginning."""
    begins = np.unique([0, *np.flatnonzero(np.isin(row, [10, 20, 30]))])
    return np.split(np.arange(len(row)), begins[1:])


def test_whole_words_are_masked_over_a_million_tokens() -> None:
    ids = text_of_words(520_000, 128)
    assert ids.size > 1_000_000
    content = np.ones(ids.shape, dtype=bool)
    vocabulary = PLAIN._replace(word_starts=STARTS)
    input_ids, masked = mask_windows(ids, content, 19, vocabulary, derive_keys(0, np.arange(len(ids))))
    assert (masked.sum(axis=1) == 19).all()
    chosen, whole = {1: 0, 2: 0, 3: 0}, {1: 0, 2: 0, 3: 0}
    for row, mask in zip(ids[:2000], masked[:2000], strict=True):
        words = words_in(row)
        cut = [word for word in words if 0 < mask[word].sum() < len(word)]
        assert not cut or (len(cut) == 1 and min((len(w) for w in words if not mask[w].any()), default=9) > 1)
        for word in words[1:-1]:
            chosen[len(word)] += 1
            whole[len(word)] += bool(mask[word].all())
    shares = [whole[size] / chosen[size] for size in (1, 2, 3)]
    assert all(abs(share - 19 / 128) < 0.035 for share in shares), shares
    assert shares == sorted(shares, reverse=True)  # short words fit into the end of the count
    masked_ids = input_ids[masked]
    assert abs((masked_ids == MASK).mean() - 0.8) < 0.002


def test_a_word_ends_where_content_does() -> None:
    ids = np.array([[20, 21, 2, 21, 32]])
    content = ids != 2
    for seed in range(50):
        _, masked = mask_windows(ids, content, 2, PLAIN._replace(word_starts=STARTS), derive_keys(seed, np.arange(1)))
        assert masked[0, :2].all() or masked[0, 3:5].all()
        assert masked.sum() == 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_word_that_does_not_fit_is_masked_in_part_when_nothing_else_is_left(count: int) -> None:
    ids = np.array([[30, 31, 32, 30, 31, 32]])
    _, masked = mask_windows(ids, ids > 0, count, PLAIN._replace(word_starts=STARTS), derive_keys(0, np.arange(1)))
    assert masked.sum() == count
    parts = sorted([masked[0, :3].tolist(), masked[0, 3:].tolist()], reverse=True)
    assert parts[0] == [True] * min(count, 3) + [False] * (3 - min(count, 3))
