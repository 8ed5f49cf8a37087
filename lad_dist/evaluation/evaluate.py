"""Evaluation: a model over a task's dev set, or an objective over held-out text, shared out over the processes.

    predict(forward, batches)       logits [R, V] of all rows of all examples, in order, on every process
    task_scores(dev, predictions)   the task's metrics by name
    compare(...)                    a model and perhaps its teacher: metrics, loyalty
    evaluate(config)                the same for model folders, and the speed-up: what launch/evaluate.py calls

Every process makes the same number of forwards, because under ZeRO-3 a forward is a collective.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lad_dist.config.load import check_writable
from lad_dist.config.schema import EvaluateConfig
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.datasets import TaskDataset
from lad_dist.data.tasks.examples import TaskExamples
from lad_dist.data.tasks.task import check_task, load_task
from lad_dist.data.tokenization.loading import load_tokenizer, tokenizer_of_teacher
from lad_dist.distributed import processes
from lad_dist.models.dims import check_length, check_vocabulary, count_parameters
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.heads import label_order
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import check_weight_files

Batches = Sequence[Callable[[], Batch]]
Dev = Mapping[str, TaskExamples]
Forward = Callable[[Batch], Tensor]
LOGITS = OutputSpec(logits=True)


class Predictions(NamedTuple):
    logits: NDArray[np.floating]  # [R, V]
    seconds: float  # of this process's forwards


def rank_batches(batches: Batches) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether each counts: the last ones are filled up so that all processes have as
    many."""
    world, rank = processes.world_size(), processes.rank()
    for first in range(0, len(batches), world):
        index = first + rank
        yield batches[min(index, len(batches) - 1)](), index < len(batches)


@torch.no_grad()
def predict(forward: Forward, batches: Batches) -> Predictions:
    device, seconds = processes.device(), 0.0
    mine: list[NDArray[np.floating]] = []
    for batch, counts in rank_batches(batches):
        begin = time.perf_counter()
        logits = forward(batch.to(device)).float().cpu().numpy()
        seconds += time.perf_counter() - begin
        if counts:
            mine.append(logits)
    everyone = processes.all_gather(mine)
    # Process r made batches r, r + world, …: reading round the processes restores their order.
    rows = [everyone[i % len(everyone)][i // len(everyone)] for i in range(len(batches))]
    return Predictions(np.concatenate(rows), seconds)


@torch.no_grad()
def mean_terms(terms: Callable[[Batch], Mapping[str, Tensor]], batches: Batches) -> dict[str, float]:
    """Loss terms averaged over held-out batches."""
    device, totals, count = processes.device(), dict[str, Tensor](), 0
    for batch, counts in rank_batches(batches):
        values = terms(batch.to(device))
        count += counts
        for name, value in values.items():
            totals[name] = totals.get(name, torch.zeros((), device=device)) + value * counts
    totals["count"] = torch.tensor(float(count), device=device)
    means = processes.means(totals)
    everything = means.pop("count")
    return {name: value / everything for name, value in means.items()}


def task_scores(dev: Dev, predictions: Mapping[str, Predictions]) -> dict[str, float]:
    """The task's metrics; those of a second dev set (MNLI's mismatched) carry its name."""
    scores: dict[str, float] = {}
    for name, seen in predictions.items():
        suffix = name.removeprefix("dev")
        scores |= {metric + suffix: value for metric, value in dev[name].score(seen.logits).items()}
    return scores


def compare(
    dev: Dev,
    student: Forward,
    teacher: Forward | None,
    teacher_dev: Dev,
) -> dict[str, dict[str, float]]:
    """{"student": metrics and loyalty, "teacher": metrics}. `teacher_dev` are the same examples as the teacher reads
    them."""
    predictions = {name: predict(student, examples.in_order()) for name, examples in dev.items()}
    result = {"student": task_scores(dev, predictions)}
    if teacher is None:
        return result
    theirs = {name: predict(teacher, examples.in_order()) for name, examples in teacher_dev.items()}
    result["teacher"] = task_scores(teacher_dev, theirs)
    result["student"] |= dev["dev"].loyalty(predictions["dev"].logits, theirs["dev"].logits)
    return result


def _speedup(student: Forward, teacher: Forward, batches: Batches, teacher_batches: Batches) -> float:
    """Teacher seconds / student seconds over these batches, one process after a warm-up, the two measured in turn."""
    mine, its = (some[: 8 * processes.world_size()] for some in (batches, teacher_batches))
    ratios = [predict(teacher, its).seconds / predict(student, mine).seconds for _ in range(3)]
    return float(np.median(ratios))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The metrics of a model folder on a task, and with a teacher its loyalty and how much faster it is. Raises
    UserError before weights are read where that is possible."""
    if config.out is not None:
        check_writable("out", Path(config.out).parent)
    check_task(config.data)
    task = load_task(config.data)
    paths = [words.path for words in (config.model, config.teacher) if words is not None]
    for path in paths:
        label_order(path, task.kind, task.outputs)
        check_weight_files(path)
        check_length(load_hf_config(path), path, config.data.max_length)
    tokenizer = load_tokenizer(config.model.path)
    compared = None if task.kind in ("classification", "regression") else f'data.kind = "{task.kind}"'
    its = tokenizer if config.teacher is None else tokenizer_of_teacher(config.teacher.path, tokenizer, compared)
    for path, words in zip(paths, (tokenizer, its), strict=False):
        check_vocabulary(load_hf_config(path), path, len(words))
    device = processes.start()
    dev = TaskDataset(config.data, task, tokenizer, seed=0).dev
    teacher_dev = dev if its is tokenizer else TaskDataset(config.data, task, its, seed=0).dev
    frozen = [FrozenModel(path, task.kind, device=device, labels=task.outputs) for path in paths]
    forwards = [partial(logits_of, model) for model in frozen]
    ours, theirs = forwards[0], forwards[1] if len(forwards) > 1 else None
    found = compare(dev, ours, theirs, teacher_dev)
    if theirs is not None:
        found["student"]["speedup"] = _speedup(ours, theirs, dev["dev"].in_order(), teacher_dev["dev"].in_order())
    result = {
        name: {"path": path, "parameters": count_parameters(model.model), **found[role]}
        for name, role, path, model in zip(("model", "teacher"), found, paths, frozen, strict=False)
    }
    if config.out is not None and processes.is_main():
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


def logits_of(model: FrozenModel, batch: Batch) -> Tensor:
    """What a frozen model answers [R, V]."""
    logits = model(batch, LOGITS).logits
    assert logits is not None
    return logits
