"""Suggestions for misspelt names.

did_you_mean(name, names)   a hint for a name that is none of the names
nearest(name, names)        the names that it may be a misspelling of
distance(a, b)              typing errors between two words
"""

import difflib
from collections.abc import Iterable

MAX_LISTED = 160  # characters of a list of choices


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `did you mean "x"?`, or the list of names when none is near."""
    names = sorted(set(map(str, names)))
    near = nearest(name, names)
    if near:
        return "did you mean " + " or ".join(f'"{each}"' for each in near) + "?"
    return f"choose from {_listed(names)}" if names else "the list of choices is empty"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that are the fewest typing errors away: at most one for a short name, two for a longer one.

    Where no name is so near, return the one whose letters are most alike, if any.
    """
    names = list(names)
    word = _plain(name)
    errors = {each: distance(word, _plain(each)) for each in names if abs(len(each) - len(name)) <= 2}
    fewest = min(errors.values(), default=len(word))
    if fewest < len(word) and fewest <= (1 if len(word) < 5 else 2):
        return [each for each in names if errors.get(each) == fewest]
    return difflib.get_close_matches(name, names, n=1, cutoff=0.5)


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")


def distance(a: str, b: str) -> int:
    """Return how many letters are dropped, added, replaced or swapped with a neighbour (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def _listed(names: list[str]) -> str:
    """Return the names in one line; of many names, the first ones and the number of the others."""
    text, shown = names[0], 1
    while shown < len(names) and len(text) + len(names[shown]) < MAX_LISTED:
        text, shown = f"{text}, {names[shown]}", shown + 1
    return text if shown == len(names) else f"{text} and {len(names) - shown} more"
