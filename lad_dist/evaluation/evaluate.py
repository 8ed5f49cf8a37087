"""Evaluation: a model over a task's dev set, or an objective over held-out text, shared out over the processes.

Every process makes the same number of forwards, because under ZeRO-3 a forward is a collective.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig, EvaluateDataConfig
from lad_dist.config.load import check_writable
from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.batch import TEXT_HEADS, Batch
from lad_dist.data.step_counts import mean_counts
from lad_dist.data.tasks.examples import TaskExamples, Thresholds, tokenize_dev
from lad_dist.data.tasks.task import Task, check_task, load_task
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer, tokenizer_of_teacher
from lad_dist.data.tokenization.special_tokens import vocabulary_size
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.logs import get_logger
from lad_dist.evaluation.baseline import weakness
from lad_dist.evaluation.classification import classification_report
from lad_dist.evaluation.predictor import LOGITS, ModelLocation, Predictor, locate_model
from lad_dist.models.dims import check_length, check_padding, check_vocabulary
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.heads import label_names, label_order, label_thresholds
from lad_dist.models.hf_config import load_hf_config
from lad_dist.utils import progress

Batches = Sequence[Callable[[], Batch]]
Dev = Mapping[str, TaskExamples]
Forward = Callable[[Batch], Tensor]
NO_THRESHOLDS: Mapping[str, Thresholds] = MappingProxyType({})

logger = get_logger(__name__)


class Predictions(NamedTuple):
    """What a model answers on a dev set."""

    logits: NDArray[np.floating]  # [R, V]
    seconds: float  # of this process's forwards

    @property
    def broken_rows(self) -> int:
        """The number of rows with logits that are not finite."""
        return int((~np.isfinite(self.logits).all(axis=1)).sum())


DevPredictions = Mapping[str, Predictions]


def rank_batches(batches: Batches) -> Iterator[tuple[Batch, bool]]:
    """Yield this process's batches, and whether each counts.

    The last round is filled up with the last batch, so that all processes have equally many batches.
    """
    world_size, rank = ranks.world_size(), ranks.rank()
    for first in range(0, len(batches), world_size):
        index = first + rank
        yield batches[min(index, len(batches) - 1)](), index < len(batches)


@torch.no_grad()
def predict(forward: Forward, batches: Batches, task: str = "evaluation") -> Predictions:
    """Return the logits of all batches, in order, on every process; `task` names the work where progress is shown."""
    device, seconds = processes.device(), 0.0
    local_logits: list[NDArray[np.floating]] = []
    for number, (batch, counts) in enumerate(rank_batches(batches), start=1):
        start = time.perf_counter()
        logits = forward(batch.to(device)).float().cpu().numpy()
        seconds += time.perf_counter() - start
        if counts:
            local_logits.append(logits)
        _report_progress(number, batches, task)
    by_rank = processes.all_gather(local_logits)
    # Process r predicts batches r, r + world_size, …: reading round the processes restores their order.
    logits_in_order = [by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(len(batches))]
    return Predictions(np.concatenate(logits_in_order), seconds)


def predict_all(forward: Forward, dev: Dev) -> DevPredictions:
    """Return the predictions on each dev set of a task, by name."""
    return {name: predict(forward, examples.in_order()) for name, examples in dev.items()}


def check_finite(model: str, predictions: DevPredictions) -> None:
    """Raise UserError where some logits of a model, which `model` names, are not finite: no metric could tell."""
    for name, dev_predictions in predictions.items():
        if broken := dev_predictions.broken_rows:
            raise UserError(
                f"{model}: broken, as logits in {broken:,} of {len(dev_predictions.logits):,} rows of the {name} set "
                "are not finite; look for weights that are not, or for a precision with too small a range"
            )


@torch.no_grad()
def mean_terms(terms: Callable[[Batch], Mapping[str, Tensor]], batches: Batches) -> dict[str, float]:
    """Return the loss terms as means over all that the held-out batches hold."""
    if not batches:
        return {}
    device, totals = processes.device(), dict[str, Tensor]()
    local_batches = list(rank_batches(batches))
    step_counts = mean_counts([batch for batch, counts in local_batches if counts])
    for number, (batch, counts) in enumerate(local_batches, start=1):
        for name, value in terms(batch._replace(step_counts=step_counts).to(device)).items():
            totals[name] = totals.get(name, torch.zeros((), device=device)) + value * counts
        _report_progress(number, batches)
    means = processes.means(totals)
    return {name: value * ranks.world_size() / len(batches) for name, value in means.items()}


def _report_progress(rounds: int, batches: Batches, task: str = "evaluation") -> None:
    """Report how many batches all processes have done after so many rounds."""
    progress.report(task, min(rounds * ranks.world_size(), len(batches)), len(batches))


def task_scores(dev: Dev, predictions: DevPredictions, thresholds: Thresholds = ()) -> dict[str, float]:
    """Return the task's metrics of finite logits; those of a second dev set (MNLI's mismatched) carry its name.

    With thresholds of labels there are also the metrics with these.
    """
    scores: dict[str, float] = {}
    for name, dev_predictions in predictions.items():
        examples, logits, suffix = dev[name], dev_predictions.logits, name.removeprefix("dev")
        values = examples.score(logits) | examples.tuned_score(logits, thresholds)
        scores |= {metric + suffix: value for metric, value in values.items()}
    return scores


def compare(
    dev: Dev,
    student: DevPredictions,
    teacher_dev: Dev,
    teacher: DevPredictions | None,
    thresholds: Mapping[str, Thresholds] = NO_THRESHOLDS,
) -> dict[str, dict[str, float]]:
    """Return {"student": metrics, loss and loyalty, "teacher": metrics}.

    `teacher_dev` holds the same examples in the teacher's tokens, `thresholds` those of "student" and "teacher".
    """
    metrics = task_scores(dev, student, thresholds.get("student", ()))
    scores = {"student": metrics | {"loss": dev["dev"].loss(student["dev"].logits)}}
    if teacher is not None:
        scores["teacher"] = task_scores(teacher_dev, teacher, thresholds.get("teacher", ()))
        scores["student"] |= dev["dev"].loyalty(student["dev"].logits, teacher["dev"].logits)
    return scores


def _speedup(student: Forward, teacher: Forward, batches: Batches, teacher_batches: Batches) -> float:
    """Return teacher seconds / student seconds over the first batches, the two measured in turn."""
    count = 8 * ranks.world_size()
    ratios = [
        predict(teacher, teacher_batches[:count]).seconds / predict(student, batches[:count]).seconds for _ in range(3)
    ]
    return float(np.median(ratios))


def evaluate(config: EvaluateConfig, *, speedup: bool = True) -> dict[str, Any]:
    """Return the metrics of a model on a task, and with a teacher also loyalty and, unless not asked, speed-up.

    Of a classification, also what `classification_report` says of the dev set.

    Raises:
        UserError: A model or the task cannot be evaluated; where possible before weights are read. A model's logits
            are not finite.
    """
    if config.out is not None:
        check_writable("out", Path(config.out).parent)
    check_task(config.data)
    locations = [locate_model(model.path) for model in (config.model, config.teacher) if model is not None]
    data = _with_labels_of_model(config.data, locations[0])
    task = load_task(data)
    if config.fit_temperature and task.kind != "classification":
        kind = task.kind.replace("_", " ")
        raise UserError(f"fit_temperature: calibrates the probabilities of a classification; {task.name} is {kind}")
    tokenizers = _checked_tokenizers(locations, task, data)
    processes.start()
    dev = tokenize_dev(task, tokenizers[0], data)
    teacher_dev = dev if tokenizers[-1] is tokenizers[0] else tokenize_dev(task, tokenizers[-1], data)
    models = [Predictor(location, task.kind, task.outputs, fixed_order=task.fixed_order) for location in locations]
    predictions: list[DevPredictions] = []
    for model, model_dev in zip(models, (dev, teacher_dev), strict=False):
        predictions.append(predict_all(model, model_dev))
        check_finite(model.path, predictions[-1])
        if reason := weakness(model, model_dev["dev"], predictions[-1]["dev"].logits):
            logger.warning("%s: %s", model.path, reason)
    teacher_predictions = predictions[1] if len(models) > 1 else None
    thresholds = {role: model.thresholds for role, model in zip(("student", "teacher"), models, strict=False)}
    compared = compare(dev, predictions[0], teacher_dev, teacher_predictions, thresholds)
    scores: dict[str, dict[str, Any]] = {**compared}
    if len(models) > 1 and speedup:
        batches = dev["dev"].in_order(), teacher_dev["dev"].in_order()
        scores["student"]["speedup"] = _speedup(models[0], models[1], *batches)
    if task.kind == "classification":
        for each, of_model in zip(scores.values(), predictions, strict=True):
            report = partial(classification_report, with_temperature=config.fit_temperature)
            each |= report(of_model["dev"].logits, dev["dev"].labels, task.label_names)
    result = {
        name: {"path": model.path, **model.sizes, **each}
        for name, model, each in zip(("model", "teacher"), models, scores.values(), strict=False)
    }
    if config.out is not None and ranks.is_main():
        _save(Path(config.out), result)
    return result


def _with_labels_of_model(data: EvaluateDataConfig, location: ModelLocation) -> EvaluateDataConfig:
    """Return the config of the data, with the model's labels where neither a training set nor the user names them."""
    knows_labels = data.task is not None or data.train is not None or data.labels is not None
    if knows_labels or data.kind not in ("classification", "multilabel", "tagging"):
        return data
    names = list(label_names(load_hf_config(location.folder)))
    if isinstance(data.label, list) and len(data.label) == len(names):
        return data  # the columns are the labels, which are compared with the model's
    return data.model_copy(update={"labels": names})


def _checked_tokenizers(
    locations: Sequence[ModelLocation], task: Task, data: TaskDataConfig
) -> list[PreTrainedTokenizerFast]:
    """Return the tokenizers of the model and of its teacher; one where both read alike.

    Raise UserError where a model does not fit the task or its tokenizer.
    """
    hf_configs = [load_hf_config(location.folder) for location in locations]
    for location, hf_config in zip(locations, hf_configs, strict=True):
        label_order(hf_config, location.path, task.kind, task.outputs, fixed_order=task.fixed_order)
        label_thresholds(hf_config)  # refuses those that do not fit
        check_length(hf_config, location.path, data.max_length)
    comparison = None if task.kind in TEXT_HEADS else f'data.kind = "{task.kind}"'
    tokenizers = [load_tokenizer(locations[0].folder)]
    tokenizers += [tokenizer_of_teacher(location.folder, tokenizers[0], comparison) for location in locations[1:]]
    for location, hf_config, tokenizer in zip(locations, hf_configs, tokenizers, strict=True):
        check_vocabulary(hf_config, location.path, vocabulary_size(tokenizer))
        check_padding(hf_config, location.path, tokenizer.pad_token_id)
    return tokenizers


def _save(out: Path, result: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the result as JSON, and of a classification pictures beside it, of the model and of its teacher."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    classified = {name: scores for name, scores in result.items() if "confusion" in scores}
    if not classified:
        return
    from lad_dist.evaluation.classification_plots import confusion_figure, reliability_figure  # noqa: PLC0415 (slow)
    from lad_dist.runs.plots import save_files  # noqa: PLC0415 (slow)

    figures = {}
    for name, scores in classified.items():
        prefix = f"{out.stem}." if name == "model" else f"{out.stem}.{name}."
        figures[f"{prefix}confusion.png"] = confusion_figure(scores["path"], scores["classes"], scores["confusion"])
        calibrations = {"as it is": scores["calibration"]}
        if "temperature" in scores:
            calibrations[f"temperature {scores['temperature']['value']:.2f}"] = scores["temperature"]
        figures[f"{prefix}reliability.png"] = reliability_figure(scores["path"], calibrations)
    save_files(out.parent, {}, figures)


def logits_of(model: FrozenModel, batch: Batch) -> Tensor:
    """Return a frozen model's logits [R, V]."""
    logits = model(batch, LOGITS).logits
    assert logits is not None
    return logits
