"""What MLM hides: BERT's rule, drawn from a source of randomness that belongs to (seed, epoch, sequence)."""

import numpy as np

from lad_dist.data.order import Purpose, random_source

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stays as it is


def mask_tokens(
    ids: np.ndarray, special: np.ndarray, probability: float, mask_id: int, vocabulary: int, key: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(masked ids [n], positions [r], labels [r]), all int64, positions ascending, r >= 1.

    ids [n]: the sequence; special: bool [n], tokens that are never chosen, not all of them. Every other one is chosen
    with `probability`, one of them when chance chose none; of the chosen 80 % become mask_id, 10 % a random id below
    `vocabulary`. key: (seed, epoch, sequence)."""
    random = random_source(Purpose.MASK, *key)
    draws = random.random(len(ids))
    draws[special] = 1
    positions = np.flatnonzero(draws < probability)
    if not len(positions):
        positions = np.array([draws.argmin()])
    labels = ids[positions]
    fate = random.random(len(positions))
    replaced = np.where(fate < MASKED + REPLACED, random.integers(vocabulary, size=len(positions)), labels)
    masked = ids.copy()
    masked[positions] = np.where(fate < MASKED, mask_id, replaced)
    return masked, positions, labels
