"""Toy runs of LAD on a task, and what of two runs is compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

import toy
from conftest import World

from lad_dist.config.schema import TrainConfig
from lad_dist.distributed import processes
from lad_dist.training.results import RunResult
from lad_dist.training.train import train


def lad(world: World, work: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    return toy.parsed(toy.task_config(work, world.files, world.teacher, world.pretrained), changes)


def digest(export: Path) -> str:
    return hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()


def curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what a clock measured."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def stopped_at(config: TrainConfig, step: int, rows: list[dict[str, Any]] | None = None) -> RunResult:
    """Run until a signal requests a stop while the run reports `step`."""

    def report(row: dict[str, Any]) -> None:
        if rows is not None:
            rows.append(row)
        if row["step"] == step:
            processes._request_stop()

    return train(config, report)


def metrics_file(folder: Path) -> list[dict[str, Any]]:
    """The rows of the steps, without the one of step 0."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]
