"""The same curve of each compression for ZeRO stages 0 to 2 and any number of processes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import curves
from world_sizes import STAGES, Curves, assert_one_curve, short_run

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
}
UNDER = ("supervised", "kd", "lad")
PAIRS = [*itertools.product(COMPRESSED, UNDER)]


def every_compression(world: World, work: Path) -> dict[str, dict[str, Any]]:
    """Return runs of three steps of each compression, under each objective."""
    result: dict[str, dict[str, Any]] = {}
    for (name, objective), stage in itertools.product(PAIRS, STAGES[:3]):
        key = f"{name}-{objective}-zero{stage}"
        tables = toy.task_config(work, world.files, world.teacher, world.teacher, objective={"name": objective})
        result[key] = short_run(tables, key, stage) | {"compression": COMPRESSED[name]}
        if objective == "supervised":
            del result[key]["teacher"]
    return result


@pytest.fixture(scope="module")
def compression_curves(world: World, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    work = tmp_path_factory.mktemp("compressions")
    return {n: curves(work / f"{n}", every_compression(world, work / f"{n}"), processes=n) for n in (1, 2)}


def test_every_compression_is_among_the_curves() -> None:
    assert {row["name"] for rows in COMPRESSED.values() for row in rows} == set(COMPRESSIONS)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_every_compression_has_one_curve(name: str, objective: str, compression_curves: Curves) -> None:
    assert_one_curve(compression_curves, f"{name}-{objective}", STAGES[:3])
