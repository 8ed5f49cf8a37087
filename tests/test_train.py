"""The loop, through its only entry."""

from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World

from lad_dist.config import TaskConfig, override, parse
from lad_dist.train import train


def lad(world: World, work: Path, **changes: Any) -> TaskConfig:
    tables = toy.task_config(work, world.files, world.teacher, world.pretrained)
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse(TaskConfig, override(tables, dotted.items()), where="toy")


def test_lad_learns(world: World, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    outcome = train(lad(world, tmp_path, run__steps=30), rows.append)
    assert outcome.results is not None
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
