"""Hand-made folders of complete runs, and the comparison of them."""

import json
from pathlib import Path
from typing import Any

from lad_dist.config.load import apply_overrides
from lad_dist.report.comparison import Comparison, compare
from lad_dist.report.results import collect

METRICS = {"rte": "accuracy", "cola": "matthews"}


def run(folder: Path, objective: str, task: str, seed: int, score: float, **changes: Any) -> Path:
    """Write the folder of a complete run.

    A key of `changes` is a dotted key of the config, or of results.json if it begins with `results`; `__` is a dot.
    """
    config: dict[str, Any] = {
        "run": {"name": folder.name, "dir": str(folder.parent), "seed": seed, "steps": 8, "log_every": 10},
        "teacher": {"path": f"runs/teacher-{task}/export"},
        "student": {"path": "mini", "layers": "even", "num_hidden_layers": 3},
        "data": {"task": task, "max_length": 128, "micro_batches_per_step": 1},
        "objective": {"name": objective},
        "compression": [],
        "optim": {"lr": 1e-4, "betas": [0.9, 0.999]},
        "deepspeed": {},
    }
    results: dict[str, Any] = {
        "command": "python",
        "config": config,
        "metrics": {METRICS.get(task, "accuracy"): score, "label_loyalty": 0.9},
        "student": {"parameters": 14_200_000, "forward_flops_per_token": 12.34e6},
        "teacher": {"parameters": 28_000_000, "forward_flops_per_token": 23e6, METRICS.get(task, "accuracy"): 0.75},
        "steps": 8,
        "seconds": 100.0 + seed,
        "tokens_per_second": 1e4,
        "processes": 1,
        "device": "cpu",
        "versions": {},
    }
    changed = apply_overrides(results, ((_dotted_key(key), value) for key, value in changes.items()))
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    (folder / "results.json").write_text(json.dumps(changed))
    return folder


def _dotted_key(key: str) -> str:
    dotted = key.replace("__", ".")
    return dotted.removeprefix("results.") if dotted.startswith("results.") else f"config.{dotted}"


def load_comparison(folder: Path, baseline: str | None = None) -> Comparison:
    """Return the comparison of the runs below a folder."""
    return compare(*collect([folder]), baseline)


def method_names(folder: Path) -> set[str]:
    """Return the names of the methods below a folder."""
    return set(load_comparison(folder).methods)
