"""Objectives against independent slow twins, hand-computed values and their identities."""

import math

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lad_dist import models
from lad_dist.config import UserError
from lad_dist.flat import Batch, Needs, Shape, Trace
from lad_dist.objectives import OBJECTIVES, losses
from lad_dist.objectives.lad import LAD

TEACHER = Shape(layers=4, width=8, heads=2, head="classification", outputs=2)
STUDENT = TEACHER._replace(layers=2)
LENGTHS = [5, 3, 7]


def traces(batch: Batch, seed: int = 0, student: Shape = STUDENT, teacher: Shape = TEACHER) -> tuple[Trace, Trace]:
    torch.manual_seed(seed)
    tokens, rows = len(batch.input_ids), len(batch.rows)

    def of(shape: Shape) -> Trace:
        hidden = {layer: torch.randn(tokens, shape.width, requires_grad=True) for layer in range(shape.layers + 1)}
        split = (tokens, shape.heads, shape.width // shape.heads)
        qkv = {
            layer: (torch.randn(split), torch.randn(split), torch.randn(split)) for layer in range(1, shape.layers + 1)
        }
        return Trace(torch.randn(rows, shape.outputs), hidden, qkv)

    return of(student), of(teacher)


def naive_lad(objective: LAD, student: Trace, teacher: Trace, batch: Batch, span: int | None) -> float:
    """LAD's hidden term from the equations: token by token, dimension by dimension, in Python floats."""
    layers, width = len(teacher.hidden) - 1, TEACHER.width
    values = {layer: teacher.hidden[layer].detach().double().tolist() for layer in range(1, layers + 1)}
    aggregate = values[1]
    chain = {1: aggregate}
    for layer in range(2, layers + 1):
        gate = objective.gates[layer - 2]
        weight, bias = gate.linear.weight.double().tolist(), gate.linear.bias.double().tolist()
        mixed = []
        for old, new in zip(aggregate, values[layer], strict=True):
            sums = [bias[d] + sum(weight[d][e] * old[e] for e in range(width)) for d in range(width)]
            opens = [1 / (1 + math.exp(-x)) for x in sums]
            mixed.append([g * h + (1 - g) * a for g, h, a in zip(opens, new, old, strict=True)])
        aggregate = normalised(mixed, gate.norm, span)
        chain[layer] = aggregate
    total = 0.0
    for m in (1, 2):
        target, mine = chain[m * layers // 2], student.hidden[m].double().tolist()
        total += sum((a - b) ** 2 for x, y in zip(mine, target, strict=True) for a, b in zip(x, y, strict=True)) / (
            len(mine) * width
        )
    return objective.hidden * total / 2


def normalised(rows: list[list[float]], norm: torch.nn.LayerNorm, span: int | None) -> list[list[float]]:
    result: list[list[float]] = []
    for first in range(0, len(rows), span or 1):
        block = rows[first : first + (span or 1)]
        flat = [x for row in block for x in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + norm.eps)
        for place, row in enumerate(block):
            scale, shift = [1.0] * len(row), [0.0] * len(row)
            if norm.elementwise_affine:
                wide = norm.weight.ndim == 2
                scale = (norm.weight[place] if wide else norm.weight).tolist()
                shift = (norm.bias[place] if wide else norm.bias).tolist()
            result.append([s * (x - mean) / deviation + b for x, s, b in zip(row, scale, shift, strict=True)])
    return result


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), affine=st.booleans(), whole=st.booleans())
def test_lad_equals_its_equations(seed: int, affine: bool, whole: bool) -> None:
    span = 8 if whole else None
    batch = toy.batch(LENGTHS, pad_to=span)
    student, teacher = traces(batch, seed)
    torch.manual_seed(seed)
    objective = LAD(
        STUDENT, TEACHER._replace(span=span), hidden=3.0, norm="sequence" if whole else "token", affine=affine
    )
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    hidden = objective(student, teacher, batch)["hidden"].item()
    assert hidden == pytest.approx(naive_lad(objective, student, teacher, batch, span), rel=1e-5)


def test_lad_gates_learn_from_the_hidden_term_alone() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    objective = LAD(STUDENT, TEACHER)
    terms = objective(student, teacher, batch)
    gates = list(objective.parameters())
    assert gates
    assert all(not term.requires_grad for name, term in terms.items() if name != "hidden")
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["hidden"], gates))


def test_lad_reads_every_teacher_layer_and_has_no_first_gate() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    objective = LAD(STUDENT, TEACHER)
    assert len(objective.gates) == TEACHER.layers - 1
    loss = objective(student, teacher, batch)["hidden"]
    grads = torch.autograd.grad(loss, [teacher.hidden[layer] for layer in range(1, 5)])
    assert all(g.abs().sum() > 0 for g in grads)
    assert {f"gate/{layer}" for layer in (2, 3, 4)} | {"target/1", "target/2"} == set(objective.observed)


@pytest.mark.parametrize(
    ("students", "teachers", "expected"), [(2, 4, [2, 4]), (6, 12, [2, 4, 6, 8, 10, 12]), (4, 6, [1, 3, 4, 6])]
)
def test_lad_matches_student_layers_to_teacher_layers(students: int, teachers: int, expected: list[int]) -> None:
    objective = LAD(STUDENT._replace(layers=students), TEACHER._replace(layers=teachers))
    assert [layer for _, layer in objective.matches] == expected


def test_soft_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0) * 2, 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert losses.soft(student, teacher, "classification", 2.0).item() == pytest.approx(4 * divergence, rel=1e-6)
    assert losses.soft(teacher, teacher, "classification", 2.0).item() == pytest.approx(0.0, abs=1e-7)
    assert losses.soft(student[:, :1], teacher[:, :1], "regression", 2.0).item() == pytest.approx(
        (2 * math.log(3)) ** 2
    )


def test_hard_loss_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = (-math.log(0.75) - math.log(0.5)) / 2
    assert losses.hard(logits, torch.tensor([0, 1]), "mlm").item() == pytest.approx(expected, rel=1e-6)
    assert losses.hard(torch.tensor([[2.0], [0.0]]), torch.tensor([1.0, 3.0]), "regression").item() == pytest.approx(
        5.0
    )


def test_losses_in_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(10, 7, requires_grad=True), torch.randn(10, 7)
    labels = torch.arange(10) % 7

    def both() -> tuple[Tensor, ...]:
        loss = losses.soft(student, teacher, "mlm", 2.0) + losses.hard(student, labels, "mlm")
        return loss, *torch.autograd.grad(loss, student)

    whole = both()
    monkeypatch.setattr(losses, "CHUNK", 21)
    for a, b in zip(whole, both(), strict=True):
        torch.testing.assert_close(a, b)


def naive_relation(student: Tensor, teacher: Tensor, lengths: list[int], heads: int) -> float:
    """Equation by equation: sequence, head and query one at a time."""
    total, first = 0.0, 0
    for length in lengths:
        for head in range(heads):

            def rows(x: Tensor, first: int = first, length: int = length, head: int = head) -> Tensor:
                part = x[first : first + length].double().reshape(length, heads, -1)[:, head]
                return torch.softmax(part @ part.T / math.sqrt(part.shape[1]), dim=1)

            s, t = rows(student), rows(teacher)
            total += sum((t[i] * (t[i].log() - s[i].log())).sum().item() for i in range(length))
        first += length
    return total / (heads * sum(lengths))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_equal_their_equations(heads: int) -> None:
    batch = toy.batch(LENGTHS)
    torch.manual_seed(0)
    student, teacher = torch.randn(15, 2, 4), torch.randn(15, 4, 4)
    mine = losses.relation(student, teacher, batch, heads).item()
    assert mine == pytest.approx(naive_relation(student, teacher, LENGTHS, heads), rel=1e-5)
    assert losses.relation(teacher, teacher, batch, heads).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("span", [8, 10, 20])
def test_relations_stay_within_a_sequence(span: int) -> None:
    batch = toy.packed(toy.batch(LENGTHS), span)
    assert batch.packed
    torch.manual_seed(0)
    student, teacher = torch.randn(15, 2, 4), torch.randn(15, 4, 4)
    mine = losses.relation(student, teacher, batch, 2).item()
    assert mine == pytest.approx(naive_relation(student, teacher, LENGTHS, 2), rel=1e-5)


def test_relations_ignore_padding() -> None:
    padded, flat = toy.batch(LENGTHS, pad_to=9), toy.batch(LENGTHS)
    torch.manual_seed(0)
    wide = torch.randn(2, 27, 8)
    real = torch.cat([torch.arange(n) + 9 * b for b, n in enumerate(LENGTHS)])
    assert losses.relation(wide[0], wide[1], padded, 2).item() == pytest.approx(
        losses.relation(wide[0][real], wide[1][real], flat, 2).item(), rel=1e-6
    )


@pytest.mark.parametrize("name", ["kd", "lad"])
def test_a_student_equal_to_its_teacher_has_no_soft_loss(name: str) -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = traces(batch)
    terms = OBJECTIVES[name](TEACHER, TEACHER, hard=0.0)(teacher, teacher, batch)
    assert terms["soft"].item() == pytest.approx(0.0, abs=1e-6)
    assert "hard" not in terms


def test_cosine_of_equal_hidden_states_is_zero() -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = traces(batch)
    objective = OBJECTIVES["kd"](TEACHER, TEACHER, cosine=2.0)
    assert objective(teacher, teacher, batch)["cosine"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_loss_does_not_depend_on_how_sequences_are_packed(name: str) -> None:
    """Same sequences in another order, and in shared spans: the same terms, through a real model."""
    torch.manual_seed(0)
    student, teacher = (
        models.create(toy.SIZES, "classification", vocabulary=50, labels=toy.LABELS).eval() for _ in range(2)
    )
    size = models.shape(student.config, "classification", labels=2)
    objective = OBJECTIVES[name](size, size)
    flat = toy.batch(LENGTHS, labels=[0, 1, 1])
    lengths = [7, 5, 3]
    ids = flat.input_ids.split(LENGTHS)
    other = toy.batch(lengths, labels=[1, 0, 1])._replace(input_ids=torch.cat([ids[2], ids[0], ids[1]]))
    values = []
    for batch in (flat, other, toy.packed(flat, 9)):
        with torch.no_grad():
            seen = models.trace(student, batch, objective.student_needs)
            target = models.trace(teacher, batch, objective.teacher_needs)
            values.append({key: term.item() for key, term in objective(seen, target, batch).items()})
    for others in values[1:]:
        assert others == pytest.approx(values[0], rel=1e-5, abs=1e-7)  # fp32 rounds logits near 1 by that


@pytest.mark.parametrize(
    ("name", "options", "student", "teacher", "message"),
    [
        ("lad", {}, STUDENT._replace(width=4), TEACHER, "4 wide"),
        ("lad", {}, STUDENT._replace(layers=6), TEACHER, "6 student layers"),
        ("lad", {"norm": "sequence"}, STUDENT, TEACHER, "data.pad_to"),
        ("kd", {}, STUDENT, TEACHER._replace(head="none"), "no head"),
        ("kd", {"cosine": 1.0}, STUDENT._replace(width=4), TEACHER, "4 wide"),
        ("minilm", {"heads": 3}, STUDENT, TEACHER, "does not divide"),
        ("minilm", {"teacher_layer": 9}, STUDENT, TEACHER, "there are 4 layers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str, options: dict, student: Shape, teacher: Shape, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        OBJECTIVES[name](student, teacher, **options)


def test_needs_name_only_what_is_used() -> None:
    assert OBJECTIVES["minilm"](STUDENT, TEACHER).teacher_needs == Needs(qkv=(4,))
    assert OBJECTIVES["kd"](STUDENT, TEACHER, soft=0.0).teacher_needs == Needs()
    assert OBJECTIVES["lad"](STUDENT, TEACHER, soft=0.0).teacher_needs == Needs(hidden=(1, 2, 3, 4))
