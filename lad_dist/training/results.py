"""The result of a run: the model that it exports, and the tables of results.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lad_dist.compression import compact, footprint
from lad_dist.data.tokenization.loading import save_beside_model
from lad_dist.distributed import processes, ranks
from lad_dist.models.dims import max_positions, uses_segments
from lad_dist.models.heads import set_thresholds
from lad_dist.models.loading import save_model
from lad_dist.runs.card_header import base_models
from lad_dist.runs.run_folder import Run
from lad_dist.training.best_model import BestModel
from lad_dist.training.engine import gathered_parameters
from lad_dist.training.run_spec import RunSpec
from lad_dist.training.trainer import RunStatus, Trainer
from lad_dist.utils.text import command_line


@dataclass
class RunResult:
    """The result of a run: its folder, how it ended, and the content of results.json of a completed run."""

    folder: Path
    status: RunStatus  # COMPLETED or STOPPED
    results: dict[str, Any] | None = None

    @property
    def export_dir(self) -> Path:
        """The folder of the exported model."""
        return self.folder / "export"


def write_results(
    trainer: Trainer,
    spec: RunSpec,
    run: Run,
    *,
    scores: Mapping[str, dict[str, float]],
    test_scores: Mapping[str, dict[str, float]],
    best: BestModel,
    seconds: float,
    tokens_per_second: float,
) -> dict[str, Any]:
    """Export the student and write results.json, which makes the run complete; return its content.

    The export takes over the student of the trainer. `seconds` are those of all sessions, `tokens_per_second` is of
    this one.
    """
    last = best.last_step(trainer.steps)
    distiller, teacher, batch = trainer.engine.module, trainer.evaluation.teacher, trainer.dataset.batch(0, 0)
    thresholds = {role: values for role, values in trainer.evaluation.thresholds.items() if values}
    with gathered_parameters(distiller, trainer.config.zero_stage):
        size = footprint.footprint(distiller.student, batch)  # before compressed modules are merged
        packed = compact.pack(distiller.student) if ranks.is_main() else None
        student = distiller.export()
        if thresholds:
            set_thresholds(student.config, thresholds["student"])
        if packed is not None:
            save_model(student, run.export)
            packed.save(run.export, trainer.config.student.path, spec.layers)
            save_beside_model(spec.tokenizer, run.export, uses_segments(student.config), max_positions(student.config))
    sizes_on_disk = processes.on_main(lambda: footprint.bytes_table(run.export))
    config = trainer.config
    model_paths = [config.student.path, config.teacher.path if config.teacher is not None else None]
    results = {
        "command": command_line(),
        "config": config.model_dump(mode="json", exclude_none=True),
        "export": {
            "head": spec.head,
            "labels": [] if spec.task is None else list(spec.task.label_names),
            "text_pairs": spec.task is not None and getattr(spec.task.train, "pairs", None) is not None,
            "base_model": processes.on_main(lambda: base_models(model_paths)),
        },
        "metrics": scores["student"],
        "test": dict(test_scores),  # scores of "student" and "teacher" on a test set, empty where there is none
        # Tuned on the dev set, as {"student" or "teacher": {label: probability}}; empty of other kinds of task.
        "thresholds": {role: dict(zip(spec.labels, values, strict=True)) for role, values in thresholds.items()},
        "student": {**size, **distiller.initial_values, **sizes_on_disk},
        "teacher": (footprint.footprint(teacher.model, batch) if teacher else {}) | scores.get("teacher", {}),
        "steps": last,
        "exported_step": best.step or last,
        "selection": best.summary(trainer.steps, "held-out" if spec.task is None else "dev"),
        "skipped_updates": run.skipped_updates(),
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "processes": ranks.world_size(),
        "device": processes.device_name(),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }
    run.finish(results)
    return results
