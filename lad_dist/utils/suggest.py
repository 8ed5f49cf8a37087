"""Suggestions for misspelt names.

did_you_mean(name, names)   a hint for a name that is none of the names
nearest(name, names)        the name that it may be a misspelling of
"""

import difflib
from collections.abc import Iterable

CUTOFF = 0.5  # a misspelt name of two letters shares one of them
MAX_LISTED = 160  # characters of a list of choices


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `did you mean "x"?`, or the list of names when none is near."""
    names = sorted(set(map(str, names)))
    if near := nearest(name, names):
        return f'did you mean "{near[0]}"?'
    return f"choose from {_listed(names)}" if names else "the list of choices is empty"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the name whose letters are most alike, or an empty list where none is near."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=CUTOFF)


def _listed(names: list[str]) -> str:
    """Return the names in one line; of many names, the first ones and the number of the others."""
    text, shown = names[0], 1
    while shown < len(names) and len(text) + len(names[shown]) < MAX_LISTED:
        text, shown = f"{text}, {names[shown]}", shown + 1
    return text if shown == len(names) else f"{text} and {len(names) - shown} more"
