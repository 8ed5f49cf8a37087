"""What MLM hides: BERT's rule, a function of the key of each window alone.

U windows of L places, K places hidden in each.
"""

from typing import NamedTuple

import numpy as np

from lad_dist.utils.rng import random_uint64

MASKED, REPLACED = 0.8, 0.1  # of the hidden tokens; the rest stays as it is


class Vocabulary(NamedTuple):
    """What masking needs to know of a tokenizer."""

    mask: int  # the id of its mask token
    ordinary: np.ndarray  # int64: the ids that are no special tokens
    starts: np.ndarray | None = None  # bool [V]: whether a token begins a word; None: each token is hidden by itself


def mask_windows(
    ids: np.ndarray, content: np.ndarray, count: int, vocabulary: Vocabulary, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(masked ids [U, L], hidden: bool [U, L]): exactly `count` tokens of each window are hidden, or all where it has
    fewer. Of the hidden 80 % become the mask token, 10 % an ordinary one.

    ids: int64 [U, L]; content: bool [U, L], the tokens that may be hidden; keys: uint64 [U]. With `vocabulary.starts`
    whole words are hidden, in a random order, as far as they fit into the count (so short ones a little more often, as
    in BERT's own data); what is left when none fits any more is taken from the beginning of one."""
    length = ids.shape[1]
    chances = random_uint64(keys, 0, length)
    if vocabulary.starts is not None:
        chances = _by_words(chances, vocabulary.starts[ids], content, count)
    hidden = _lowest(chances, content, count)
    fate = (random_uint64(keys, length, 2 * length) >> np.uint64(11)) * 2.0**-53
    other = vocabulary.ordinary[
        (random_uint64(keys, 2 * length, 3 * length) % np.uint64(len(vocabulary.ordinary))).astype(int)
    ]
    masked = np.where(hidden & (fate < MASKED), vocabulary.mask, ids)
    return np.where(hidden & (fate >= MASKED) & (fate < MASKED + REPLACED), other, masked), hidden


def _lowest(chances: np.ndarray, content: np.ndarray, count: int) -> np.ndarray:
    """bool [U, L]: the `count` places of content with the lowest chances."""
    chances = np.where(content, chances, np.uint64(2**64 - 1))
    count = min(count, chances.shape[1])
    chosen = np.zeros(content.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(chances, count - 1, axis=1)[:, :count], True, axis=1)
    return chosen & content


def _by_words(chances: np.ndarray, starts: np.ndarray, content: np.ndarray, count: int) -> np.ndarray:
    """Chances in which the tokens of a word stand together: the words that are to be hidden first, in order."""
    ranks = np.full(chances.shape, 2**63, dtype=np.uint64)
    before = np.zeros(content.shape, dtype=bool)
    before[:, 1:] = content[:, :-1]
    starts = content & (starts | ~before)  # a word that a window or a document cuts begins there
    for row in range(len(chances)):
        places = np.flatnonzero(content[row])
        if len(places):
            ranks[row, places] = _ranks(chances[row, places], starts[row, places], count)
    return ranks


def _ranks(chances: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """int [n]: ranks of the tokens of one window, content only, such that the lowest `count` are whole words."""
    word = np.cumsum(starts) - 1
    begins = np.flatnonzero(starts)
    sizes = np.diff([*begins, len(starts)])
    order = np.argsort(chances[begins], kind="stable")
    fitting = _fitting(sizes[order], count)
    place = np.empty(len(order), dtype=np.int64)
    place[order[np.argsort(~fitting, kind="stable")]] = np.arange(len(order))
    return place[word] * len(starts) + np.arange(len(starts))


def _fitting(sizes: np.ndarray, count: int) -> np.ndarray:
    """bool: which of the words, taken in order, still fit into the count."""
    fits = np.cumsum(sizes) <= count
    left = count - int(sizes[fits].sum())
    for word in np.flatnonzero(~fits):
        if left == 0:
            break
        if sizes[word] <= left:
            fits[word] = True
            left -= int(sizes[word])
    return fits
