"""Fixtures of the chaos tests, short and long."""

from collections.abc import Iterator

import chaos
import pytest
from chaos import LONG, Victim
from conftest import World


@pytest.fixture(scope="session")
def figures() -> Iterator[list[tuple[str, str]]]:
    """Rows of the table that the long version prints."""
    rows: list[tuple[str, str]] = []
    yield rows
    if LONG:
        print("", *(f"| {name} | {figure} |" for name, figure in rows), sep="\n")


@pytest.fixture(scope="session")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """A run that nothing happened to."""
    return chaos.run_to_end(chaos.victim(tmp_path_factory.mktemp("straight"), world))
