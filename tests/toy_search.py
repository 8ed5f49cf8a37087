"""Searches on the toy world, and one whose trials train nothing."""

import math
from pathlib import Path
from typing import Any

import tomli_w
import torch
import toy
from conftest import World

from lad_dist.cluster.workers import Report
from lad_dist.models import loading
from lad_dist.models.loading import save_model
from lad_dist.search.trial import Trial, TrialRunner

GOOD, HOPELESS = 6e-3, 1e-9
GRID: dict[str, dict[str, dict[str, Any]]] = {
    "method": {"pkd": {"task.objective.name": "pkd"}, "lad": {}},
    "seed": {"0": {"task.run.seed": 0}, "1": {"task.run.seed": 1}},
}


def tables(work: Path, **changes: Any) -> dict[str, Any]:
    """Return four samples, two at once; the changes by table, None leaves a table out."""
    default: dict[str, Any] = {
        "search": {
            "name": "s", "dir": str(work), "metric": "accuracy", "num_samples": 4, "max_concurrent": 2, "cpus": 0.5,
            "algorithm": "random", "reduction_factor": 2,
        },
        "override": {"task.run.eval_every": 2},
        "space": {"task.optim.lr": {"choice": [HOPELESS, GOOD]}},
    }  # fmt: skip
    merged = {name: {**default.get(name, {}), **(changes.get(name) or {})} for name in default | changes}
    stage = [{"name": "task", "base": str(work / "base.toml")}]
    return {name: table for name, table in merged.items() if changes.get(name, {}) is not None} | {"stage": stage}


def with_base(world: World, folder: Path) -> Path:
    """Write a task in which nearly all say yes, and a student that says no until it learns anything at all."""
    files = {"train": str(folder / "train.csv"), "dev": str(folder / "dev.csv")}
    for file, count in zip(files.values(), (64, 24), strict=True):
        rows = (f"{toy.sentence(count + n, most=6)},{toy.LABELS[n % 12 > 0]}\n" for n in range(count))
        Path(file).write_text("text,label\n" + "".join(rows))
    base = toy.task_config(folder, files, world.teacher, denying(world, folder / "student"))
    base["objective"] = {"name": "lad", "hidden": 0.0, "soft": 0.0, "hard": 1.0}
    (folder / "base.toml").write_text(tomli_w.dumps(base))
    return folder


def denying(world: World, folder: Path) -> Path:
    path = toy.model(folder, world.tokenizer, "classification", toy.LABELS)
    student = loading.load_model(str(path), "classification", labels=toy.LABELS)
    with torch.no_grad():
        student.classifier.weight.zero_()
        student.classifier.bias.copy_(torch.tensor([1e-3, 0.0]))
    save_model(student, folder)
    return folder


class FunctionRunner(TrialRunner):
    """Trains nothing: a trial scores by a function whose optimum, 0, is known."""

    def run(self, trial: Trial, report: Report) -> None:
        """Report the score of the sample, at each of four steps."""
        optim = trial.config.optim
        score = -((math.log10(optim.lr) + 3.3) ** 2) - (4 * optim.warmup - 1.3) ** 2
        for step in range(1, 5):
            report({"step": step, "values": {"accuracy": score - 1 / step}})
        report({"status": "completed", "values": {"accuracy": score}, "step": 4})
