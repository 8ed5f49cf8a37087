"""The layout that DESIGN asks for, as far as no linter holds it."""

import re
from pathlib import Path

import pytest
from launching import ROOT

PACKAGE = ROOT / "lad_dist"
MAX_LINES, MAX_TOP_MODULES = 450, 3


def test_few_modules_stand_on_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_MODULES


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_short(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_LINES


def test_the_environment_of_slurm_is_read_in_distributed_alone() -> None:
    """A name in a docstring is no reading of it."""
    readers = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if re.search(r"environ[^\n]*SLURM_|SLURM_[^\n]*environ", file.read_text())
    }
    assert readers <= {"distributed"}
