"""The result of a search: its trials, best first, and the config of the best."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from lad_dist.config.errors import UserError
from lad_dist.config.load import dump_config
from lad_dist.config.schema import TrainConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.report.search_trials import ScoredSample, front, scored_samples
from lad_dist.search.plan import SearchPlan
from lad_dist.search.record import SearchRecord
from lad_dist.utils.atomic_io import write_text
from lad_dist.utils.strict_json import parse_json


@dataclass
class SearchResult:
    """The outcome of a search.

    Attributes:
        metrics: by which samples are compared; of a grid each trial has its own.
        trials: Rows, best first: trial, sample, metric, score (the mean over seeds), n, error (standard error of the
            mean, None of one seed), step, status, seconds, values.
        failed: Rows of trial, status (failed or refused) and error.
        front: Of several metrics, the trials of which no other is better by all.
        best: The name of the best trial; None for a grid and a front.
        processes: of each trial.
        gpus: of each process.
    """

    metrics: list[str]
    trials: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    front: list[str] = field(default_factory=list)
    best: str | None = None
    processes: int = 1
    gpus: float = 0.0


def read_result(folder: Path) -> SearchResult:
    """Return the result of a search that has ended."""
    file = folder / "results.json"
    try:
        return SearchResult(**parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it and run the search again") from None


def conclude(config: SearchConfig, plan: SearchPlan, record: SearchRecord) -> SearchResult:
    """Write results.json, and for a space best.toml; raise UserError where no trial has a result."""
    folder = config.search.folder
    scored = scored_samples(record.trials.values(), plan.metric)
    rows = [_row(sample, plan.metric(sample.name)) for sample in scored]
    failed = [
        {"trial": trial.name, "status": trial.status, "error": trial.error}
        for trial in record.trials.values()
        if trial.status in ("failed", "refused")
    ]
    if not rows:
        raise UserError(f"{folder}: all {len(failed)} trials failed; {failed[0]['trial']}: {failed[0]['error']}")
    front = _front(rows, plan.metrics) if len(plan.metrics) > 1 and plan.space is not None else []
    best = rows[0]["trial"] if plan.space is not None and not front else None
    options = config.search
    result = SearchResult(plan.metrics, rows, failed, front, best, options.processes, options.gpus)
    if best is not None:
        _write_best(rows[0], plan.build(record.trials[best]).config, len(rows) + len(failed), folder)
    for row in rows:
        _write_hyper_parameters(folder / row["trial"], row)
    shutil.rmtree(folder / "teacher_cache", ignore_errors=True)
    write_text(folder / "results.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def _row(sample: ScoredSample, metric: str) -> dict[str, Any]:
    """Return what is known of a sample, or of a trial of a grid."""
    error = sample.error(metric)
    names = sorted(set.intersection(*(set(trial.values) for trial in sample.trials)))
    return {
        "trial": sample.name,
        "sample": sample.sample,
        "metric": metric,
        "score": sample.mean(metric),
        "n": len(sample.trials),
        "error": error if math.isfinite(error) else None,
        "step": sample.step,
        "status": sample.status,
        "seconds": sample.seconds,
        "values": {name: sample.mean(name) for name in names},
    }


def _front(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    values = [[row["values"].get(name, math.nan) for name in names] for row in rows]
    return front(pd.DataFrame(values, index=[row["trial"] for row in rows], columns=list(names)))


def _write_best(row: Mapping[str, Any], config: TrainConfig, count: int, folder: Path) -> None:
    teacher = config.teacher and config.teacher.model_copy(update={"cache": None})
    run = config.run.model_copy(update={"name": "best", "label": config.label.rpartition("-")[0]})  # no sample's number
    best = config.model_copy(update={"run": run, "teacher": teacher})
    command = f"# lad-dist distill {folder / 'best.toml'}"
    origin = f"# {row['trial']}, the best of {count} trials by {row['metric']} on the dev set"
    write_text(folder / "best.toml", f"{command}\n{origin}\n{dump_config(best)}")


def _write_hyper_parameters(run_folder: Path, row: Mapping[str, Any]) -> None:
    """Add a trial's sample and score to TensorBoard's tab HPARAMS."""
    if not row["sample"] or not run_folder.is_dir():
        return
    plain = bool | int | float | str
    sample = {key: value if isinstance(value, plain) else json.dumps(value) for key, value in row["sample"].items()}
    with SummaryWriter(str(run_folder / "tensorboard")) as writer:
        writer.add_hparams(sample, {f"hparam/{row['metric']}": row["score"]}, run_name=".")
