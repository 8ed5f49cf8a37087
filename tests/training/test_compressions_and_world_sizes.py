"""The same curve of each compression for ZeRO stages 0 to 2 and any number of processes."""

from pathlib import Path
from typing import Any

import pytest
import sweep
import toy
from conftest import World
from world_sizes import STAGES, Curves, Layout, Runs, all_curves, assert_one_curve, layouts, short_run

from lad_dist.compression.registry import COMPRESSIONS

# One fixture trains a hundred runs: the limit catches hangs.
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]

# All compressions; the student is cut out of the teacher.
COMPRESSED: dict[str, list[dict[str, Any]]] = {
    "theseus": [{"name": "theseus", "end": 1.0}],
    "theseus-unfrozen": [{"name": "theseus", "end": 1.0, "frozen": False}],
    "ladabert": [{"name": "ladabert", "reduction": 3.0, "embedding": 1.5, "svd": 2.0, "update_every": 1}],
    "movement": [
        {"name": "low_rank", "keep": 0.8},
        {"name": "prune", "criterion": "movement", "sparsity": 0.5, "update_every": 1},
        {"name": "scale_position_embeddings", "scale": 0.5},
    ],
    "heads": [{"name": "heads", "heads": 0.5, "units": 0.5, "update_every": 1}],
    "adapting": [{"name": "prune", "criterion": "adapting", "sparsity": 0.5, "update_every": 1}],
    "quantize": [{"name": "quantize", "begin": 0.5}],
}
UNDER = ("supervised", "kd", "lad")
# Without --sweep each compression runs on two processes under stages 1 and 2, under two of the three objectives.
LAYOUTS: dict[tuple[str, str], list[Layout]] = {}
for number, name in enumerate(COMPRESSED):
    for place, objective in enumerate(UNDER):
        stage = (number + place) % 3
        if stage or sweep.enabled:
            LAYOUTS[name, objective] = layouts(STAGES[:3], [stage])


def every_compression(world: World, work: Path) -> Runs:
    """Return runs of three steps of each compression, under each objective."""
    result: Runs = {1: {}, 2: {}}
    for (name, objective), compression_layouts in LAYOUTS.items():
        for processes, stage in compression_layouts:
            key, folder = f"{name}-{objective}-zero{stage}", work / f"{processes}"
            tables = toy.task_config(folder, world.files, world.teacher, world.teacher, objective={"name": objective})
            tables = short_run(tables, key, stage) | {"compression": COMPRESSED[name]}
            if objective == "supervised":
                del tables["teacher"]
            result[processes][key] = tables
    return result


@pytest.fixture(scope="module")
def compression_curves(world: World, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    work = tmp_path_factory.mktemp("compressions")
    return all_curves(work, every_compression(world, work))


def test_every_compression_is_among_the_curves() -> None:
    assert {row["name"] for rows in COMPRESSED.values() for row in rows} == set(COMPRESSIONS)


@pytest.mark.parametrize(("name", "objective"), LAYOUTS)
def test_every_compression_has_one_curve(name: str, objective: str, compression_curves: Curves) -> None:
    assert_one_curve(compression_curves, f"{name}-{objective}", LAYOUTS[name, objective])
