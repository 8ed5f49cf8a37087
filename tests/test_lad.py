"""LAD against its equations, in Python floats."""

import math

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import LENGTHS, STUDENT, TEACHER, traces

from lad_dist.flat import Batch, Trace
from lad_dist.objectives.lad import LAD


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
