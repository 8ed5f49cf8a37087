"""The result of a search: its trials, best first, and the config of the best."""

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lad_dist.config.errors import UserError
from lad_dist.config.load import dump_config
from lad_dist.config.schema import SearchConfig, TrainConfig
from lad_dist.search import metrics
from lad_dist.search.plan import SearchPlan
from lad_dist.search.record import SearchRecord, TrialState
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
    rows = _rows(plan, record)
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


def _rows(plan: SearchPlan, record: SearchRecord) -> list[dict[str, Any]]:
    """Return a row for each sample or trial of the grid that has a score, best first.

    Samples that ran with all seeds come before those that did not.
    """
    by_sample: dict[str, list[TrialState]] = {}
    for trial in record.trials.values():
        if trial.status in ("completed", "stopped") and plan.metric(trial.name) in trial.values:
            by_sample.setdefault(trial.name.partition("-seed")[0] if trial.seed else trial.name, []).append(trial)
    rows = [_row(name, trials, plan.metric(name)) for name, trials in by_sample.items()]
    most = max((row["n"] for row in rows), default=0)

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        sign = -1 if metrics.direction(row["metric"]) == "max" else 1
        return row["n"] < most, sign * row["score"], -row["step"], row["trial"]

    return sorted(rows, key=order)


def _row(name: str, trials: Sequence[TrialState], metric: str) -> dict[str, Any]:
    first = trials[0]
    scores = [trial.values[metric] for trial in trials]
    keys = set.intersection(*(set(trial.values) for trial in trials))
    return {
        "trial": name,
        "sample": first.sample,
        "metric": metric,
        "score": statistics.fmean(scores),
        "n": len(scores),
        "error": statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        "step": first.step,
        "status": first.status,
        "seconds": sum(trial.seconds for trial in trials),
        "values": {key: statistics.fmean(trial.values[key] for trial in trials) for key in sorted(keys)},
    }


def _front(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the trials of which no other is at least as good by all metrics and better by one."""
    complete = [row for row in rows if row["values"].keys() >= set(names)]
    points = {row["trial"]: [_cost(name, row["values"][name]) for name in names] for row in complete}

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [name for name, point in points.items() if not any(dominates(other, point) for other in points.values())]


def _cost(metric: str, value: float) -> float:
    return -value if metrics.direction(metric) == "max" else value


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
