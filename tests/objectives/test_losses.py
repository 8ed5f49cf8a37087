"""Loss functions against hand-computed values and naive versions, in every layout of a batch."""

import math
from collections.abc import Callable

import naive_twins
import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from torch import Tensor

from lad_dist.core.batch import Batch, Head
from lad_dist.core.labels import UNLABELLED
from lad_dist.data.step_counts import with_step_counts
from lad_dist.objectives import losses

LENGTHS = naive_twins.LENGTHS


def test_soft_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0) * 2, 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    batch = toy.batch([3])
    soft = losses.soft_label_loss(student, teacher, batch, "classification", 2.0)
    assert soft.item() == pytest.approx(4 * divergence, rel=1e-6)
    assert losses.soft_label_loss(teacher, teacher, batch, "classification", 2.0).item() == pytest.approx(0.0, abs=1e-7)
    squared = losses.soft_label_loss(student[:, :1], teacher[:, :1], batch, "regression", 2.0)
    assert squared.item() == pytest.approx((2 * math.log(3)) ** 2)


def test_hard_loss_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = (-math.log(0.75) - math.log(0.5)) / 2
    batch = toy.batch([3, 2], labels=[0, 1])
    assert losses.hard_label_loss(logits, batch, "mlm").item() == pytest.approx(expected, rel=1e-6)
    numbers = toy.batch([3, 2], labels=[1.0, 3.0])
    assert losses.hard_label_loss(torch.tensor([[2.0], [0.0]]), numbers, "regression").item() == pytest.approx(5.0)


def test_rows_count_what_their_class_weighs() -> None:
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(5, 3), torch.tensor([0, 2, 2, 1, 0]), torch.tensor([0.5, 2.0, 3.0])
    batch = toy.batch([3, 2, 4, 2, 2], labels=labels.tolist())._replace(row_weights=weights[labels])
    expected = torch.nn.CrossEntropyLoss(weight=weights, reduction="sum")(logits, labels) / 5
    assert losses.hard_label_loss(logits, batch, "classification").item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("head", ["classification", "regression"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("step_rows", [None, 1.5])
def test_rows_without_a_label_are_left_out(head: Head, weighted: bool, step_rows: float | None) -> None:
    """The loss is that of the labelled rows, one at a time, and the gradient of the others is exactly 0."""
    torch.manual_seed(0)
    regression = head == "regression"
    missing = math.nan if regression else UNLABELLED
    labels, outputs = [1, missing, 0, missing, missing], 1 if regression else 3
    logits, weights = torch.randn(5, outputs, requires_grad=True), torch.tensor([0.5, 9.0, 2.0, 9.0, 9.0])
    batch = toy.batch([3, 2, 4, 2, 2], labels=np.array(labels, dtype=np.float32 if regression else np.int64))
    batch = batch._replace(row_weights=weights) if weighted and not regression else batch
    assert (batch.num_unlabelled, batch.counts.labelled_rows) == (3, 2)
    if step_rows is not None:
        batch = batch._replace(step_counts=batch.counts._replace(labelled_rows=step_rows))
    loss, expected = losses.hard_label_loss(logits, batch, head), 0.0
    for row in (0, 2):
        z, label = logits[row].double(), int(labels[row])
        error = (z[0] - label).square() if regression else z.exp().sum().log() - z[label]
        expected = expected + error * (weights[row] if batch.row_weights is not None else 1)
    expected = expected / (step_rows or 2)
    (gradient,), (naive,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, expected))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, naive)
    assert (gradient[[1, 3, 4]] == 0).all()
    assert losses.soft_label_loss(logits, torch.zeros(5, outputs), batch, head, 2.0).item() > 0


@pytest.mark.parametrize(("head", "label"), [("classification", UNLABELLED), ("regression", math.nan)])
def test_a_step_without_labels_has_no_loss_against_them(head: Head, label: float) -> None:
    batch = toy.batch([3, 2], labels=[label] * 2)
    logits = torch.randn(2, 1 if head == "regression" else 2, requires_grad=True)
    loss = losses.hard_label_loss(logits, with_step_counts([batch, batch])[0], head)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_losses_of_several_labels_equal_torchs_and_their_equations() -> None:
    """Means over rows and labels; a weight counts where a row has the label, as torch's pos_weight."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 3, dtype=torch.float64) * 3 for _ in range(2))
    labels, weights = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]), torch.tensor([0.5, 2.0, 7.0])
    batch = toy.batch([3, 2, 4, 2], labels=labels.numpy())
    hard = soft = 0.0
    for s, t, y in zip(*(x.flatten().tolist() for x in (student, teacher, labels)), strict=True):
        p, q = (1 / (1 + math.exp(-x / 2)) for x in (t, s))
        soft += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        hard -= math.log(1 / (1 + math.exp(-s)) if y else 1 / (1 + math.exp(s)))
    assert losses.hard_label_loss(student, batch, "multilabel").item() == pytest.approx(hard / 12, rel=1e-6)
    assert losses.soft_label_loss(student, teacher, batch, "multilabel", 2.0).item() == pytest.approx(
        soft / 12, rel=1e-5
    )
    weighted = batch._replace(row_weights=torch.where(labels > 0, weights, 1.0))
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(student.float(), labels)
    assert losses.hard_label_loss(student, weighted, "multilabel").item() == pytest.approx(expected.item(), rel=1e-6)
    extreme = torch.tensor([[1e4, -1e4, 0.0]] * 4, requires_grad=True)
    loss = losses.soft_label_loss(extreme, -extreme.detach(), batch, "multilabel", 1.0)
    assert loss.item() == pytest.approx(2e4 / 3)
    assert torch.autograd.grad(loss, extreme)[0].isfinite().all()


def test_rows_without_labels_are_left_out_of_several_labels_too() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 2, requires_grad=True), np.array([[1, 0], [math.nan] * 2, [0, 0]], dtype=np.float32)
    batch = toy.batch([3, 2, 4], labels=labels)
    assert (batch.num_unlabelled, batch.counts.labelled_rows) == (1, 2)
    loss = losses.hard_label_loss(logits, batch, "multilabel")
    labelled = toy.batch([3, 4], labels=labels[[0, 2]])
    expected = losses.hard_label_loss(logits[[0, 2]], labelled, "multilabel")
    (gradient,), (naive,) = (torch.autograd.grad(x, logits) for x in (loss, expected))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, naive)
    assert (gradient[1] == 0).all()


def test_losses_of_several_labels_do_not_depend_on_the_order_of_labels_and_are_fp32() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 5).bfloat16() for _ in range(2))
    labels, order = torch.randint(0, 2, (4, 5)).float(), torch.randperm(5)

    def values(columns: Tensor) -> list[Tensor]:
        batch = toy.batch([3, 2, 4, 2], labels=labels[:, columns].numpy())
        return [
            losses.hard_label_loss(student[:, columns], batch, "multilabel"),
            losses.soft_label_loss(student[:, columns], teacher[:, columns], batch, "multilabel", 2.0),
        ]

    for one, other in zip(values(torch.arange(5)), values(order), strict=True):
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(other.item(), rel=1e-6)


HEAD_POSITIONS = [[0, 2], [0, 1, 2, 4], [0, 1, 3]]  # in sequences of 3, 5 and 4 tokens


def answers_batch(pad_to: int | None = None) -> Batch:
    """Return a batch where each answer begins in the second row of a sequence and ends in the last."""
    batch = toy.batch([3, 5, 4], pad_to=pad_to)
    starts = batch.cu_seqlens.tolist()
    rows = [start + row for start, positions in zip(starts, HEAD_POSITIONS, strict=False) for row in positions]
    labels = [[n == 1, n == len(positions) - 1] for positions in HEAD_POSITIONS for n in range(len(positions))]
    return batch._replace(head_positions=torch.tensor(rows), labels=torch.tensor(labels).float())


def test_losses_of_answers_equal_their_equations() -> None:
    """A distribution over the rows of each sequence, for both ends; sequence by sequence, in fp64."""
    batch = answers_batch()
    torch.manual_seed(0)
    student, teacher = (torch.randn(9, 2, requires_grad=True) for _ in range(2))
    hard = soft = 0.0
    for s, t in zip(student.double().split([2, 4, 3]), teacher.double().split([2, 4, 3]), strict=True):
        for column, right in ((0, 1), (1, len(s) - 1)):
            hard -= math.log(torch.softmax(s[:, column], 0)[right].item())
            p, q = (torch.softmax(x[:, column] / 2, 0) for x in (t, s))
            soft += 4 * (p * (p / q).log()).sum().item()
    terms = (
        losses.hard_label_loss(student, batch, "question_answering"),
        losses.soft_label_loss(student, teacher, batch, "question_answering", 2.0),
    )
    assert [x.item() for x in terms] == pytest.approx([hard / 6, soft / 6], rel=1e-5)
    gradient = torch.autograd.grad(sum(terms), student)[0]
    assert gradient.isfinite().all()
    assert gradient.split([2, 4, 3])[1].sum(dim=0).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert losses.soft_label_loss(teacher, teacher, batch, "question_answering", 2.0).item() == pytest.approx(
        0, abs=1e-7
    )


def test_losses_of_answers_do_not_depend_on_the_layout() -> None:
    batch, logits = answers_batch(), torch.randn(9, 2)
    packed = toy.packed(toy.batch([3, 5, 4]), 8)._replace(head_positions=batch.head_positions, labels=batch.labels)
    values = [
        losses.hard_label_loss(logits, layout, "question_answering").item()
        for layout in (batch, answers_batch(7), packed)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_losses_in_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(10, 7, requires_grad=True), torch.randn(10, 7)
    batch = toy.batch([1] * 10, labels=[n % 7 for n in range(10)])

    def both() -> tuple[Tensor, ...]:
        loss = losses.soft_label_loss(student, teacher, batch, "mlm", 2.0) + losses.hard_label_loss(
            student, batch, "mlm"
        )
        return loss, *torch.autograd.grad(loss, student)

    whole = both()
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 21)
    for a, b in zip(whole, both(), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=30)
@given(batch=naive_twins.batches())
def test_means_are_over_real_tokens_and_sequences(batch: Batch) -> None:
    torch.manual_seed(0)
    values, rows = torch.randn(len(batch.input_ids)), torch.randn(len(batch.input_ids), 3)
    assert losses.mean_over_tokens(values, batch).item() == pytest.approx(
        naive_twins.real_tokens(values, batch).mean().item(), rel=1e-4, abs=1e-6
    )
    first = losses.first_tokens(rows, batch)
    torch.testing.assert_close(
        first[: len(batch.lengths[batch.lengths > 0])].double(), naive_twins.first_tokens(rows, batch)
    )
    assert losses.mean_over_sequences(losses.first_tokens(values, batch), batch).item() == pytest.approx(
        naive_twins.first_tokens(values, batch).mean().item(), rel=1e-4, abs=1e-6
    )


def score_loss(student: losses.Pair, teacher: losses.Pair, batch: Batch, heads: int) -> Tensor:
    student_scores, teacher_scores = (losses.attention_scores(pair, batch, heads) for pair in (student, teacher))
    return losses.attention_score_loss(student_scores, teacher_scores, batch)


@pytest.mark.parametrize("function", [losses.relation_loss, score_loss])
@pytest.mark.parametrize("span", [None, 9, 16])
def test_attention_gradients_equal_finite_differences(function: Callable[..., Tensor], span: int | None) -> None:
    """The backward computes the relations again."""
    flat = toy.batch(LENGTHS)
    batch = flat if span is None else toy.packed(flat, span)
    torch.manual_seed(0)
    q, k = (torch.randn(15, 4, dtype=torch.float32, requires_grad=True) for _ in range(2))
    teacher = (torch.randn(15, 4), torch.randn(15, 4))
    gradients = torch.autograd.grad(function((q, k), teacher, batch, 2), (q, k))
    for x, gradient in zip((q, k), gradients, strict=True):
        with torch.no_grad():
            direction = torch.randn_like(x)
            values = []
            for sign in (1, -1):
                x.add_(sign * 1e-2 * direction)
                values.append(function((q, k), teacher, batch, 2).item())
                x.sub_(sign * 1e-2 * direction)
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=1e-4)
