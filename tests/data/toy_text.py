"""Reproducible text."""

WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old oak near water".split()


def sentence(seed: int, words: int) -> str:
    """Reproducible text in the toy tokenizer's vocabulary."""
    return " ".join(WORDS[(seed * 7 + i * i + i) % len(WORDS)] for i in range(words))
