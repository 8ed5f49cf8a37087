"""Suggestions for misspelt names."""

import difflib
import textwrap
from collections.abc import Iterable

CUTOFF = 0.5  # a misspelt name of two letters shares one of them
MAX_LISTED = 160  # characters of a list of choices


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `did you mean "x"?`, or the list of names when none is near."""
    names = sorted(set(map(str, names)))
    if near := nearest(name, names):
        return f'did you mean "{near[0]}"?'
    listed = textwrap.shorten(", ".join(names), MAX_LISTED, placeholder=" and more")
    return f"choose from {listed}" if names else "the list of choices is empty"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the name whose letters are most alike, or an empty list where none is near.

    One of the same letters in another order comes first: tset is test, though text is as near.
    """
    near = difflib.get_close_matches(name, list(names), cutoff=CUTOFF)
    return sorted(near, key=lambda choice: sorted(choice) != sorted(name))[:1]
