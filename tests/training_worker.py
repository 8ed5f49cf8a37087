"""A process of a multi-process test: it trains the configs one after the other, and rank 0 writes their rows.

usage: (torchrun|deepspeed|python) tests/training_worker.py ROWS.json CONFIG.toml …
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from lad_dist.config.load import parse_config, read_toml
from lad_dist.config.schema import train_schema
from lad_dist.distributed import ranks
from lad_dist.training.train import train


def main() -> None:
    out, *paths = (argument for argument in sys.argv[1:] if not argument.startswith("--local"))
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        tables = read_toml(path)
        train(parse_config(train_schema(tables), tables, path), rows.setdefault(Path(path).stem, []).append)
        if len(rows) == 1:  # what is imported stays, and `train` collects garbage at its start: a second each time
            gc.collect()
            gc.freeze()
    if ranks.is_main():
        Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
