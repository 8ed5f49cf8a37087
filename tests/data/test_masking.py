import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.data.masking import mask_tokens

MASK, VOCABULARY = 4, 30_000


@given(st.integers(1, 40), st.floats(0.001, 0.999), st.integers(0, 2**40), st.integers(0, 2**40), st.data())
def test_what_is_masked_and_what_is_left(size: int, probability: float, seed: int, sequence: int, data) -> None:
    ids = np.array(data.draw(st.lists(st.integers(5, 50), min_size=size, max_size=size)))
    special = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    special[data.draw(st.integers(0, size - 1))] = False
    before = ids.copy()
    masked, positions, labels = mask_tokens(ids, special, probability, MASK, 60, (seed, 0, sequence))
    assert (ids == before).all()
    assert len(positions) >= 1
    assert (np.diff(positions) > 0).all()
    assert not special[positions].any()
    assert (labels == ids[positions]).all()
    untouched = np.ones(size, dtype=bool)
    untouched[positions] = False
    assert (masked[untouched] == ids[untouched]).all()
    again = mask_tokens(ids, special, probability, MASK, 60, (seed, 0, sequence))
    assert all((a == b).all() for a, b in zip((masked, positions, labels), again, strict=True))


def test_shares_over_a_million_tokens() -> None:
    ids = np.full(1000, 77)
    special = np.zeros(1000, dtype=bool)
    special[[0, -1]] = True
    per_place = np.zeros(1000)
    fate = {"mask": 0, "same": 0, "other": 0}
    replacements = []
    for sequence in range(1000):
        masked, positions, _ = mask_tokens(ids, special, 0.15, MASK, VOCABULARY, (0, 0, sequence))
        per_place[positions] += 1
        found = masked[positions]
        other = found[(found != MASK) & (found != 77)]
        replacements.append(other)
        fate["mask"] += int((found == MASK).sum())
        fate["same"] += int((found == 77).sum())
        fate["other"] += len(other)
    chosen = sum(fate.values())
    assert abs(chosen / 998_000 - 0.15) < 0.002  # 5.6 standard errors
    assert abs(fate["mask"] / chosen - 0.8) < 0.006
    assert abs(fate["same"] / chosen - 0.1) < 0.005
    assert abs(fate["other"] / chosen - 0.1) < 0.005
    assert per_place[[0, -1]].sum() == 0
    assert per_place[1:-1].min() > 90
    assert per_place[1:-1].max() < 215
    random = np.concatenate(replacements)
    assert abs(random.mean() / VOCABULARY - 0.5) < 0.02
    assert random.max() < VOCABULARY


def test_masks_differ_by_seed_epoch_and_sequence() -> None:
    ids, special = np.arange(10, 138), np.zeros(128, dtype=bool)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    chosen = {tuple(mask_tokens(ids, special, 0.15, MASK, VOCABULARY, key)[1].tolist()) for key in keys}
    assert len(chosen) == 4


def test_the_single_token_masked_by_force_meets_the_same_fates() -> None:
    """One in a thousand is chosen by chance, so nearly all here are the one that every sequence must have."""
    ids, special = np.array([2, 9, 8, 7, 3]), np.array([True, False, False, False, True])
    results = [mask_tokens(ids, special, 0.001, MASK, VOCABULARY, (0, 0, sequence)) for sequence in range(3000)]
    hidden = np.mean([masked[positions[0]] == MASK for masked, positions, _ in results])
    places = np.bincount([positions[0] for _, positions, _ in results], minlength=5)
    assert abs(hidden - 0.8) < 0.04
    assert places[[0, 4]].sum() == 0
    assert places[1:4].min() > 850
