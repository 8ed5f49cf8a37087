"""Same seed, same loss: four runs of cases.py in the working tree are held to what losses.json recorded of them."""

import json
from collections.abc import Iterator
from typing import Any

import case_runs
import inputs
import pytest
from cases import CORPUS, RECORDED, Case
from compare_commits import LOSSES

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.load import apply_overrides, parse_config, read_toml
from lad_dist.config.schema import train_schema
from lad_dist.data.shards.prepare import prepare
from lad_dist.training.train import train

TOLERANCE = 1e-4  # relative: other processors round otherwise


def tables(case: Case) -> dict[str, Any]:
    return apply_overrides(read_toml(inputs.REPOSITORY / case.config), case.overrides.items())


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make a new current folder, with a prepared corpus."""
    try:
        data = inputs.data_folder()
    except inputs.DataMissing as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("losses")
    inputs.make(folder / "inputs", data)
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "work")
        prepare(parse_config(PrepareConfig, tables(CORPUS), CORPUS.config))
        yield


@pytest.mark.data
@pytest.mark.parametrize("case", RECORDED, ids=[case.name for case in RECORDED])
def test_the_losses_are_those_recorded(case: Case) -> None:
    recorded = json.loads(LOSSES.read_text(encoding="utf-8"))["losses"][case.name]
    run = train(parse_config(train_schema(tables(case)), tables(case), case.config))
    assert case_runs.losses(run.folder) == pytest.approx(recorded, rel=TOLERANCE)
