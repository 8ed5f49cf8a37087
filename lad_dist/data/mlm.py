"""Masked language modelling: BERT's rule of masking, a function of the key of each window alone.

U windows of L places, V tokens in the vocabulary.
"""

from typing import NamedTuple

import numpy as np

from lad_dist.utils.rng import random_uint64

MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1  # of the masked tokens; the rest stays as it is


class Vocabulary(NamedTuple):
    """What masking needs to know of a tokenizer."""

    mask_id: int
    ordinary_ids: np.ndarray  # int64: the ids that are no special tokens
    word_starts: np.ndarray | None = None  # bool [V]: whether a token begins a word; None: each is masked by itself


def mask_windows(
    ids: np.ndarray, content: np.ndarray, count: int, vocabulary: Vocabulary, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (input ids [U, L], masked: bool [U, L]): exactly `count` tokens of each window are masked.

    A window with fewer tokens is masked as a whole. Of the masked tokens 80 % become the mask token, 10 % an ordinary
    one (Devlin et al., 2019, appendix A.1).

    ids: int64 [U, L]; content: bool [U, L], the tokens that may be masked; keys: uint64 [U]. With
    `vocabulary.word_starts` whole words are masked, in a random order, as far as they fit into the count (so short ones
    a little more often, as in BERT's own data). What is left of the count when no word fits any more is taken from the
    beginning of one.
    """
    length = ids.shape[1]
    priorities = random_uint64(keys, 0, length)
    if vocabulary.word_starts is not None:
        priorities = _by_words(priorities, vocabulary.word_starts[ids], content, count)
    masked = _lowest(priorities, content, count)
    draws = (random_uint64(keys, length, 2 * length) >> np.uint64(11)) * 2.0**-53
    random_ids = vocabulary.ordinary_ids[
        (random_uint64(keys, 2 * length, 3 * length) % np.uint64(len(vocabulary.ordinary_ids))).astype(int)
    ]
    input_ids = np.where(masked & (draws < MASK_TOKEN_SHARE), vocabulary.mask_id, ids)
    replaced = masked & (draws >= MASK_TOKEN_SHARE) & (draws < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)
    return np.where(replaced, random_ids, input_ids), masked


def _lowest(priorities: np.ndarray, content: np.ndarray, count: int) -> np.ndarray:
    """Return bool [U, L]: the `count` places of content with the lowest numbers."""
    priorities = np.where(content, priorities, np.uint64(2**64 - 1))
    count = min(count, priorities.shape[1])
    chosen = np.zeros(content.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(priorities, count - 1, axis=1)[:, :count], True, axis=1)
    return chosen & content


def _by_words(priorities: np.ndarray, starts: np.ndarray, content: np.ndarray, count: int) -> np.ndarray:
    """Return numbers in which the tokens of a word are neighbours, the words to be masked first."""
    ranks = np.full(priorities.shape, 2**63, dtype=np.uint64)
    before = np.zeros(content.shape, dtype=bool)
    before[:, 1:] = content[:, :-1]
    starts = content & (starts | ~before)  # a word that a window or a document cuts begins at the cut
    for row in range(len(priorities)):
        places = np.flatnonzero(content[row])
        if len(places):
            ranks[row, places] = _ranks(priorities[row, places], starts[row, places], count)
    return ranks


def _ranks(priorities: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Return int [n]: ranks of the content tokens of one window such that the lowest `count` are whole words."""
    word = np.cumsum(starts) - 1
    begins = np.flatnonzero(starts)
    sizes = np.diff([*begins, len(starts)])
    order = np.argsort(priorities[begins], kind="stable")
    fitting = _fitting(sizes[order], count)
    place = np.empty(len(order), dtype=np.int64)
    place[order[np.argsort(~fitting, kind="stable")]] = np.arange(len(order))
    return place[word] * len(starts) + np.arange(len(starts))


def _fitting(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return bool: which of the words, taken in order, still fit into the count."""
    fits = np.cumsum(sizes) <= count
    left = count - int(sizes[fits].sum())
    for word in np.flatnonzero(~fits):
        if left == 0:
            break
        if sizes[word] <= left:
            fits[word] = True
            left -= int(sizes[word])
    return fits
