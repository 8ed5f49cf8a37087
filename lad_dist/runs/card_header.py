"""The header of a model card, which the hub reads: base model, data, metrics and scores of a student."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from lad_dist.data.tasks.glue import GLUE, HUB_NAME
from lad_dist.utils.strict_json import parse_json

PIPELINES = {  # by head, as the hub sorts models
    "mlm": "fill-mask",
    "classification": "text-classification",
    "multilabel": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
    "question_answering": "question-answering",
}
METRIC_IDS = {  # the hub's names of metrics
    "accuracy": "accuracy",
    "f1": "f1",
    "f1_macro": "f1",
    "f1_micro": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "precision": "precision",
    "recall": "recall",
    "exact_match": "exact_match",
}

Numbers = Mapping[str, Any]


class ScoredData(NamedTuple):
    """A data set on which a student was scored, by the hub's names."""

    type: str
    name: str
    config: str | None
    split: str


def is_hub_name(path: str) -> bool:
    """Return whether a model path can be a name on the hub, and is no folder here."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()


def base_models(paths: Iterable[str | None]) -> list[str]:
    """Return the hub names of the models at these paths, each once; of a folder those that it names as its origin."""
    return list(dict.fromkeys(name for path in paths if path is not None for name in _origins(path)))


def _origins(path: str) -> list[str]:
    """Return the hub name of a model; of a folder the base models of its card, or the name in its config.json."""
    if not Path(path).is_dir():
        return [path] if is_hub_name(path) else []
    names: Any = None
    with contextlib.suppress(Exception):  # no card, or one of any hand: the parser raises what it likes
        names = (metadata_load(Path(path) / "README.md") or {}).get("base_model")
    if not names:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            names = parse_json((Path(path) / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    return [name for name in ([names] if isinstance(names, str) else names or []) if is_hub_name(str(name))]


def header(results: Numbers) -> str:
    """Return the header of a run's card, as YAML; without a licence, which the owner chooses."""
    config = results["config"]
    scores = list(_eval_results(results))
    datasets = sorted({score.dataset_type for score in scores}) if _is_on_hub(config["data"]) else []
    objective, compressions = config["objective"]["name"], [each["name"] for each in config.get("compression", [])]
    data = ModelCardData(
        base_model=results.get("export", {}).get("base_model") or None,
        datasets=datasets or None,
        library_name="transformers",
        metrics=list(dict.fromkeys(score.metric_type for score in scores)) or None,
        model_name=config["run"]["name"] if scores else None,
        pipeline_tag=_pipeline(results),
        tags=["lad_dist", objective, *compressions],
        eval_results=scores or None,
    )
    return data.to_yaml()


def head_of(results: Numbers) -> str:
    """Return the head of a run's student; results of earlier versions name it for a user's own task alone."""
    return str(results.get("export", {}).get("head") or results["config"]["data"].get("kind") or "none")


def _pipeline(results: Numbers) -> str:
    return PIPELINES.get(head_of(results), "feature-extraction")


def _is_on_hub(data: Numbers) -> bool:
    return data.get("task") is not None or data.get("hub") is not None


def _eval_results(results: Numbers) -> Iterator[EvalResult]:
    """Yield the scores that the hub knows a name for, on dev and test sets."""
    data = results["config"]["data"]
    if "shards" in data:
        return
    test = results.get("test", {}).get("student", {})
    for scores, role in ((results["metrics"], "dev"), (test, "test")):
        for suffix, scored in _scored_data(data, role):
            for name, metric_id in METRIC_IDS.items():
                value = scores.get(name + suffix, math.nan)
                if math.isfinite(value):
                    yield EvalResult(
                        task_type=_pipeline(results),
                        dataset_type=scored.type,
                        dataset_name=scored.name,
                        dataset_config=scored.config,
                        dataset_split=scored.split,
                        metric_type=metric_id,
                        metric_name=name,
                        metric_value=value,
                    )


def _scored_data(data: Numbers, role: str) -> Iterator[tuple[str, ScoredData]]:
    """Yield the sets of a role, dev or test, each with the end of the names of its metrics."""
    if (task := data.get("task")) is not None:
        for name, _, split in GLUE[task].dev:
            yield name.removeprefix("dev"), ScoredData(HUB_NAME, f"GLUE {task}", task, split)
    elif (hub := data.get("hub")) is not None:
        yield "", ScoredData(hub, hub, data.get("hub_config"), str(data.get(role)))
    else:
        file = Path(str(data.get(role)))
        yield "", ScoredData(file.suffix.removeprefix("."), file.name, None, {"dev": "validation"}.get(role, role))
