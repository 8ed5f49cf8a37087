"""What a search optimises: scores of the last stage, and the size and speed of its student."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lad_dist.compression import footprint
from lad_dist.config.schema import TaskConfig, TrainConfig
from lad_dist.runs.search_record import MINIMISED
from lad_dist.training import run_spec
from lad_dist.training.best_model import check_metric, score_names
from lad_dist.training.run_spec import RunSpec

LATENCY = "latency"
# Of results.json's table "student".
SIZES = {"parameters": "parameters", "flops": footprint.FLOPS, "bytes": "bytes/safetensors"}
BYTES_PER_WEIGHT = 4  # of an export


def direction(metric: str) -> str:
    """Return "max" or "min", as a metric is the better the larger or the smaller."""
    return "min" if metric in MINIMISED else "max"


def checked_metrics(metrics: Sequence[str], config: TrainConfig, spec: RunSpec | None) -> list[str]:
    """Return the metrics of trials that end with a stage of this config: those that are set, or the task's first one.

    Args:
        metrics: as they are set.
        config: of the last stage.
        spec: of the last stage; None where it begins with what another stage exports.

    Raises:
        UserError: A run of this config has no such metric.
    """
    if isinstance(config, TaskConfig):
        task = spec.task if spec is not None else run_spec.load_task(config.data)
        assert task is not None
        name, scores = task.name, score_names(config, task)
    else:
        name, scores = config.run.name, score_names(config, None)
    for metric in metrics:
        check_metric("search.metric", metric, name, [*scores, *SIZES, LATENCY])
    return list(metrics) or scores[:1]


def scores_of(row: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, float]:
    """Return the metrics that a row of a run reports."""
    return {metric: row[f"dev/{metric}"] for metric in metrics if f"dev/{metric}" in row}


def final_values(results: Mapping[str, Any], latency: float | None) -> dict[str, float]:
    """Return all metrics of a complete run, from its results.json; `latency` in seconds where it was measured."""
    student = results["student"]
    values = dict(results["metrics"]) | {name: student[key] for name, key in SIZES.items() if key in student}
    if latency is not None:
        values[LATENCY] = latency
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def student_sizes(spec: RunSpec) -> dict[str, float]:
    """Return the sizes of a run's student before it is trained, without reading a weight.

    FLOPs are those of each token of the first micro-batch, as in results.json.
    """
    student, batch = spec.meta_student(), spec.dataset().batch(0, 0)
    parameters = footprint.exported_weights(student)
    flops = sum(footprint.flops(student, batch).values()) / batch.num_tokens
    return {"parameters": parameters, "flops": flops, "bytes": BYTES_PER_WEIGHT * parameters}


def largest_excess(sizes: Mapping[str, float], limit: Mapping[str, float]) -> str | None:
    """Return in words which limit the sizes exceed; None where they keep to all."""
    for name, most in limit.items():
        if sizes[name] > most:
            return f"{name} {sizes[name]:,.0f} are above limit.{name} = {most:,.0f}"
    return None
