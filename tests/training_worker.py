"""A process of a multi-process test: trains the configs it is given, one after the other. Rank 0 leaves their rows.

usage: (torchrun|deepspeed|python) tests/training_worker.py ROWS.json CONFIG.toml …
"""

import json
import sys
from pathlib import Path
from typing import Any

from lad_dist.config.load import parse_config, read_toml
from lad_dist.config.schema import train_schema
from lad_dist.distributed import processes
from lad_dist.training.train import train


def main() -> None:
    out, *paths = (word for word in sys.argv[1:] if not word.startswith("--local"))
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        tables = read_toml(path)
        train(parse_config(train_schema(tables), tables, path), rows.setdefault(Path(path).stem, []).append)
    if processes.is_main():
        Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
