"""LAD against its equations, in Python floats."""

import math
from typing import Any, Literal

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_twins import LENGTHS, STUDENT, TEACHER, random_outputs

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelOutputs
from lad_dist.objectives.lad import LAD, VARIANTS, Gate

GATE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate_input": "both"},
    {"gates": "frozen", "gate_init": 0.9},
    {"gates": "constant", "gate_init": 0.5},
]


def naive_gate_value(gate: Gate, old: list[float], new: list[float]) -> list[float]:
    if gate.config.gates == "constant":
        return [gate.config.gate_init or 0.0] * len(old)
    weight, bias = gate.linear.weight.double().tolist(), gate.linear.bias.double().tolist()
    inputs = old if gate.config.gate_input == "aggregate" else old + new
    sums = [b + sum(w * x for w, x in zip(row, inputs, strict=True)) for row, b in zip(weight, bias, strict=True)]
    return [1 / (1 + math.exp(-x)) for x in sums]


def naive_lad(objective: LAD, student: ModelOutputs, teacher: ModelOutputs, batch: Batch, span: int | None) -> float:
    """LAD's hidden term from the equations: token by token, dimension by dimension, in Python floats."""
    layers, width = len(teacher.hidden) - 1, TEACHER.hidden_size
    values = {layer: teacher.hidden[layer].detach().double().tolist() for layer in range(1, layers + 1)}
    aggregate = values[1]
    chain = {1: aggregate}
    for layer in range(2, layers + 1):
        gate, norm = objective.gates[layer - 2], objective.norms[layer - 2]
        mixed = []
        for old, new in zip(aggregate, values[layer], strict=True):
            gate_values = naive_gate_value(gate, old, new)
            mixed.append([g * h + (1 - g) * a for g, h, a in zip(gate_values, new, old, strict=True)])
        aggregate = normalised(mixed, norm, span)
        chain[layer] = aggregate
    total = 0.0
    for m in (1, 2):
        target, states = chain[m * layers // 2], student.hidden[m].double().tolist()
        total += sum((a - b) ** 2 for x, y in zip(states, target, strict=True) for a, b in zip(x, y, strict=True)) / (
            len(states) * width
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


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), affine=st.booleans(), whole=st.booleans(), options=st.sampled_from(GATE_OPTIONS))
def test_lad_equals_the_equations(seed: int, affine: bool, whole: bool, options: dict[str, Any]) -> None:
    span = 8 if whole else None
    batch = toy.batch(LENGTHS, pad_to=span)
    student, teacher = random_outputs(batch, seed)
    torch.manual_seed(seed)
    norm: Literal["sequence", "token"] = "sequence" if whole else "token"
    objective = LAD(STUDENT, TEACHER._replace(padded_length=span), hidden=3.0, norm=norm, affine=affine, **options)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    hidden = objective(student, teacher, batch)["hidden"].item()
    assert hidden == pytest.approx(naive_lad(objective, student, teacher, batch, span), rel=1e-5)


def test_lad_gates_learn_from_the_hidden_term_alone() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    objective = LAD(STUDENT, TEACHER)
    terms = objective(student, teacher, batch)
    gates = list(objective.parameters())
    assert gates
    assert all(not term.requires_grad for name, term in terms.items() if name != "hidden")
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["hidden"], gates))


def test_lad_uses_every_teacher_layer_and_has_no_first_gate() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    objective = LAD(STUDENT, TEACHER)
    assert len(objective.gates) == TEACHER.num_hidden_layers - 1
    loss = objective(student, teacher, batch)["hidden"]
    grads = torch.autograd.grad(loss, [teacher.hidden[layer] for layer in range(1, 5)])
    assert all(g.abs().sum() > 0 for g in grads)
    gates, targets = {f"gate/{layer}" for layer in (2, 3, 4)}, {"target/1", "target/2"}
    weights = {f"teacher_layer_weight/{m}/{layer}" for m, top in ((1, 2), (2, 4)) for layer in range(1, top + 1)}
    assert gates | targets | weights == set(objective.metrics)


def test_teacher_layer_weights_sum_to_one_and_follow_the_gates() -> None:
    """All layers are independent and of unit size, so that norms and constant gates have known effects."""
    torch.manual_seed(0)
    batch = toy.batch((400, 400))
    layers = torch.nn.functional.layer_norm(torch.randn(5, 800, TEACHER.hidden_size), (TEACHER.hidden_size,))
    teacher = ModelOutputs(torch.randn(2, 3), dict(enumerate(layers)))
    student = ModelOutputs(torch.randn(2, 3), dict(enumerate(layers[:3])))
    objective = LAD(STUDENT, TEACHER, gates="constant", gate_init=0.5)
    objective(student, teacher, batch)
    weights = [objective.metrics[f"teacher_layer_weight/2/{layer}"].item() for layer in (1, 2, 3, 4)]
    assert sum(weights) == pytest.approx(1)
    # A_2 = (H_1 + H_2) / √2, A_3 = (H_3 + A_2) / √2, …: each norm makes up for the half that the gate took.
    sizes = [1 / 8**0.5, 1 / 8**0.5, 1 / 4**0.5, 1 / 2**0.5]
    assert weights == pytest.approx([size / sum(sizes) for size in sizes], rel=0.03)
    alone = LAD(STUDENT, TEACHER, gates="constant", gate_init=1.0)
    alone(student, teacher, batch)
    assert [alone.metrics[f"teacher_layer_weight/2/{layer}"].item() for layer in (1, 2, 3, 4)] == [0, 0, 0, 1]


def test_gates_of_one_leave_each_layer_normalised_alone() -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = random_outputs(batch)
    aggregates = LAD(STUDENT, TEACHER, gates="constant", gate_init=1.0).aggregate(teacher.hidden, batch)
    for layer in (2, 3, 4):
        expected = torch.nn.functional.layer_norm(teacher.hidden[layer], (TEACHER.hidden_size,))
        assert torch.allclose(aggregates[layer], expected, atol=1e-6)


@pytest.mark.parametrize("options", GATE_OPTIONS)
def test_lad_can_be_built_on_the_meta_device(options: dict[str, Any]) -> None:
    """The checks before a run build it so."""
    with torch.device("meta"):
        skeleton = LAD(STUDENT, TEACHER, **options)
    assert [p.shape for p in skeleton.parameters()] == [p.shape for p in LAD(STUDENT, TEACHER, **options).parameters()]


@pytest.mark.parametrize("options", [{"gates": "frozen"}, {"gates": "constant", "gate_init": 0.5}])
def test_gates_that_do_not_learn_are_not_trained(options: dict[str, Any]) -> None:
    assert not [p for p in LAD(STUDENT, TEACHER, **options).parameters() if p.requires_grad]


def test_gate_supervision_trains_the_gates_to_predict_the_teacher() -> None:
    """With detached gates the hidden term trains the student alone, and gate supervision the gates alone."""
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    torch.manual_seed(0)
    objective = LAD(STUDENT, TEACHER, gate_supervision=3.0, temperature=2.0, detach_gates=True)
    terms = objective(student, teacher, batch)
    aggregates = objective.aggregate(teacher.hidden, batch)
    expected = 0.0
    for probe, layer in zip(objective.probes, (2, 4), strict=True):
        predicted = torch.log_softmax(probe(aggregates[layer][batch.head_positions]).double() / 2, dim=-1)
        truth = torch.log_softmax(teacher.logits.double() / 2, dim=-1)
        expected += 3 / 2 * 4 * (truth.exp() * (truth - predicted)).sum(dim=-1).mean().item()
    assert terms["gate_supervision"].item() == pytest.approx(expected, rel=1e-5)
    gates = [p for gate in objective.gates for p in gate.parameters()]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["gate_supervision"], gates, retain_graph=True))
    learnt = [*gates, student.hidden[2]]
    *of_gates, of_student = torch.autograd.grad(terms["hidden"], learnt, allow_unused=True)
    assert all(g is None for g in of_gates)
    assert of_student.abs().sum() > 0
    alone = LAD(STUDENT, TEACHER, gates="frozen")
    alone.gates.load_state_dict(objective.gates.state_dict())
    assert alone(student, teacher, batch)["hidden"].item() == pytest.approx(terms["hidden"].item())


def test_gates_start_at_gate_init() -> None:
    torch.manual_seed(0)
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    for value in (0.1, 0.9):
        objective = LAD(STUDENT, TEACHER, gate_init=value)
        for gate in objective.gates:
            torch.nn.init.zeros_(gate.linear.weight)
        objective(student, teacher, batch)
        assert objective.metrics["gate/3"].item() == pytest.approx(value)


def test_the_paper_is_a_variant() -> None:
    paper = LAD(STUDENT, TEACHER._replace(padded_length=8), variant="paper")
    assert all(norm.weight.shape == (8, TEACHER.hidden_size) for norm in paper.norms)
    assert all(gate.config == VARIANTS["paper"] for gate in paper.gates)


@pytest.mark.parametrize(
    ("students", "teachers", "expected"), [(2, 4, [2, 4]), (6, 12, [2, 4, 6, 8, 10, 12]), (4, 6, [1, 3, 4, 6])]
)
def test_lad_matches_student_layers_to_teacher_layers(students: int, teachers: int, expected: list[int]) -> None:
    objective = LAD(STUDENT._replace(num_hidden_layers=students), TEACHER._replace(num_hidden_layers=teachers))
    assert [layer for _, layer in objective.layer_map] == expected
