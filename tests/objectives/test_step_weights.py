"""A step is a function of its examples: its loss and gradient do not depend on how they are cut into micro-batches."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import toy
from torch import Tensor

from lad_dist.core.batch import Batch, Head
from lad_dist.core.collate import collate, span_starts
from lad_dist.core.labels import UNLABELLED, is_unlabelled
from lad_dist.data.step_counts import with_step_counts
from lad_dist.models import loading
from lad_dist.models.dims import model_dims
from lad_dist.models.forward import compute_outputs
from lad_dist.objectives.base import Objective
from lad_dist.objectives.registry import OBJECTIVES

LENGTHS = [3, 9, 5, 12, 2, 7, 4, 10]
LABELS: dict[Head, tuple[str, ...]] = {
    "classification": toy.LABELS, "regression": ("score",), "tagging": ("B", "I", "O"),
    "question_answering": ("start", "end"), "multilabel": ("a", "b", "c"), "mlm": (),
}  # fmt: skip
# Terms that compare the sequences of a micro-batch, or take a mean of its own, as their docstrings say.
WITHIN_MICRO_BATCHES = {"rkd": {"distance", "angle"}, "mgskd": {"token", "span", "sample"}}
CASES: list[tuple[str, Head, dict[str, Any], int | None]] = [
    *((name, "classification" if "task" in kind.supported_data else "mlm", {}, None)
      for name, kind in sorted(OBJECTIVES.items())),
    *(("lad", head, {"gate_supervision": 1.0}, None)
      for head in ("regression", "tagging", "question_answering", "multilabel")),
    ("lad", "tagging", {"variant": "paper"}, 12),
    *((name, "mlm", {}, None) for name in ("distilbert", "lad", "tinybert")),
    ("distilbert", "mlm", {"soft_tokens": "all"}, None),
    ("pkd", "tagging", {"tokens": "all"}, None),
]  # fmt: skip


def micro_batches(head: Head, size: int, pad_to: int | None) -> list[Batch]:
    """Return the same eight sequences in micro-batches of `size`: ragged, and with a ragged number of rows."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 50, n) for n in LENGTHS]
    ragged = head in ("tagging", "question_answering", "mlm")
    rows = [np.arange(1 + n // 3 if ragged else 1) for n in LENGTHS]
    labels = [draw.integers(0, max(2, len(LABELS[head])), len(places)) for places in rows]
    if head == "regression":
        labels = [x.astype(np.float32) for x in labels]
    if head == "multilabel":
        labels = [draw.integers(0, 2, (1, 3)).astype(np.float32) for _ in labels]
    if head == "question_answering":
        labels = [np.array([[n == 0, n == len(x) - 1] for n in range(len(x))], dtype=np.float32) for x in labels]
    batches = []
    for first in range(0, len(ids), size):
        chosen = slice(first, first + size)
        starts = span_starts(ids[chosen], pad_to)
        places = np.concatenate([start + x for start, x in zip(starts, rows[chosen], strict=False)])
        segments = [np.zeros(n, dtype=np.uint8) for n in LENGTHS[chosen]]
        batch = collate(ids[chosen], segments, places, np.concatenate(labels[chosen]), pad_to)
        batches.append(toy.packed(batch, 16) if head == "mlm" else batch)
    return batches


def without_labels(batches: list[Batch], head: Head) -> list[Batch]:
    """Return the batches without the labels of all sequences but the second, fifth and sixth of eight."""
    size, missing = len(batches[0].labels), math.nan if head == "regression" else UNLABELLED
    labels = torch.cat([batch.labels for batch in batches]).index_fill(0, torch.tensor([0, 2, 3, 6, 7]), missing)
    return [
        batch._replace(labels=each, num_unlabelled=int(is_unlabelled(each.numpy()).sum()))
        for batch, each in zip(batches, labels.split(size), strict=True)
    ]


def step(objective: Objective, student: Any, teacher: Any, batches: list[Batch]) -> tuple[dict[str, float], Tensor]:
    """Return the terms of a step, as its log shows them, and the gradient of the loss."""
    sums: dict[str, Tensor] = {}
    for batch in with_step_counts(batches):
        outputs, target = (
            compute_outputs(model, batch, spec)
            for model, spec in ((student, objective.student_spec), (teacher, objective.teacher_spec))
        )
        for name, term in objective(outputs, target, batch).items():
            sums[name] = sums.get(name, torch.zeros(())) + term / len(batches)
    weights = [*student.parameters(), *objective.parameters()]
    gradients = torch.autograd.grad(sum(sums.values()), weights, allow_unused=True)  # type: ignore[arg-type]
    return {name: x.item() for name, x in sums.items()}, torch.cat([x.flatten() for x in gradients if x is not None])


UNLABELLED_CASES: list[tuple[str, Head]] = [
    *((name, "classification") for name, kind in sorted(OBJECTIVES.items())
      if "task" in kind.supported_data and kind.requires_teacher),
    ("lad", "regression"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "head", "options", "pad_to"), CASES)
def test_a_step_is_a_function_of_the_examples(
    name: str, head: Head, options: dict[str, Any], pad_to: int | None
) -> None:
    check_micro_batches(name, head, options, pad_to, [micro_batches(head, size, pad_to) for size in (8, 2, 1)])


@pytest.mark.parametrize(("name", "head"), UNLABELLED_CASES)
def test_a_step_with_unlabelled_examples_is_a_function_of_the_examples(name: str, head: Head) -> None:
    steps = [without_labels(micro_batches(head, size, None), head) for size in (8, 2, 1)]
    assert [batch.num_unlabelled for batch in steps[1]] == [1, 2, 0, 2]
    check_micro_batches(name, head, {}, None, steps)


def check_micro_batches(
    name: str, head: Head, options: dict[str, Any], pad_to: int | None, steps: list[list[Batch]]
) -> None:
    """Compare the loss and the gradient of a step that is cut into micro-batches in several ways."""
    torch.manual_seed(0)
    student, teacher = (
        loading.create_model(
            {**toy.SIZES, "num_hidden_layers": layers, "initializer_range": 0.2},
            head,
            vocab_size=50,
            labels=LABELS[head],
        ).eval()
        for layers in (2, 4)
    )
    dims = [model_dims(model.config, head, labels=len(LABELS[head]), span=pad_to) for model in (student, teacher)]
    objective = OBJECTIVES[name](*dims, **options)
    (expected, gradient), *others = (step(objective, student, teacher, batches) for batches in steps)
    for terms, other_gradient in others:
        changed = {key for key, x in terms.items() if x != pytest.approx(expected[key], rel=1e-4, abs=1e-7)}
        assert changed == WITHIN_MICRO_BATCHES.get(name, set())
        assert changed or (other_gradient - gradient).norm() < 1e-5 * gradient.norm()
