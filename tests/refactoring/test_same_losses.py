"""Same seed, same loss: four runs of cases.py in the working tree are held to what losses.json recorded of them."""

import json
from collections.abc import Iterator

import inputs
import pytest
from case_runs import Tree, losses, prepare, running
from cases import CORPUS, RECORDED, Case
from compare_commits import LOSSES

TOLERANCE = 1e-4  # relative: other processors round otherwise


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """The working tree, with a prepared corpus."""
    try:
        data = inputs.data_folder()
    except inputs.DataMissing as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("losses")
    inputs.make(folder / "inputs", data)
    with running() as python:
        working_tree = Tree("the working tree", inputs.REPOSITORY, folder / "runs", python)
        prepare(CORPUS, working_tree)
        yield working_tree


@pytest.mark.data
@pytest.mark.parametrize("case", RECORDED, ids=[case.name for case in RECORDED])
def test_the_losses_are_those_recorded(case: Case, tree: Tree) -> None:
    recorded = json.loads(LOSSES.read_text(encoding="utf-8"))["losses"][case.name]
    assert losses(case, tree) == pytest.approx(recorded, rel=TOLERANCE)
