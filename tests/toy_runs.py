"""Toy runs of LAD on a task, and what of two runs is compared."""

import hashlib
from pathlib import Path
from typing import Any

import toy
from conftest import World

from lad_dist.config.schema import TrainConfig


def lad(world: World, work: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    return toy.parsed(toy.task_config(work, world.files, world.teacher, world.pretrained), changes)


def digest(export: Path) -> str:
    return hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()


def curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what a clock measured."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]
