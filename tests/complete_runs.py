"""Hand-made folders of complete runs."""

import json
from pathlib import Path
from typing import Any

from lad_dist.config.load import apply_overrides

METRICS = {"rte": "accuracy", "cola": "matthews"}


def run(folder: Path, objective: str, task: str, seed: int, score: float, **changes: Any) -> Path:
    """The folder of a complete run; changes by dotted key, `__` for the dot: of its config, or of `results`."""
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
    changed = apply_overrides(results, ((_place(key), value) for key, value in changes.items()))
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    (folder / "results.json").write_text(json.dumps(changed))
    return folder


def _place(key: str) -> str:
    dotted = key.replace("__", ".")
    return dotted.removeprefix("results.") if dotted.startswith("results.") else f"config.{dotted}"
