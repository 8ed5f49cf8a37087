"""Reproducible text, and the ids of texts one by one."""

from typing import Any

import numpy as np

from lad_dist.data.tokenization.encoding import encode_flat

WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old oak near water".split()


def sentence(seed: int, words: int) -> str:
    """Reproducible text in the toy tokenizer's vocabulary."""
    return " ".join(WORDS[(seed * 7 + i * i + i) % len(WORDS)] for i in range(words))


def apart(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, as encode_flat gives them end to end."""
    ids, lengths = encode_flat(tokenizer, texts)
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
