"""A process of a multi-process test: it trains the configs one after the other, and rank 0 writes their rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lad_dist.config.load import parse_config, read_toml
from lad_dist.config.schema import train_schema
from lad_dist.distributed import ranks
from lad_dist.training.train import train


def train_all(out: Path, paths: Sequence[Path]) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        tables = read_toml(path)
        train(parse_config(train_schema(tables), tables, path), rows.setdefault(path.stem, []).append)
    if ranks.is_main():
        out.write_text(json.dumps(rows))
