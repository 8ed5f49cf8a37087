"""Whether pytest runs with --sweep: whole products of cases and many examples instead of a part that covers them."""

enabled = False  # conftest.py sets it before tests are collected


def examples(few: int, many: int) -> int:
    """Return how many examples a property is tried on."""
    return many if enabled else few
