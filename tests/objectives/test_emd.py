"""BERT-EMD: plans against an exact solver, terms against a naive version, state from step to step."""

import naive_twins
import numpy as np
import ot
import pytest
import torch
import toy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_twins import LENGTHS, NARROW, STUDENT, TEACHER, random_outputs

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims
from lad_dist.core.step_state import StepState
from lad_dist.objectives import optimal_transport
from lad_dist.objectives.emd import EMD

SEEDS = st.integers(0, 1000)


def problem(seed: int, sizes: tuple[int, int], scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return scale * rng.random(sizes), rng.dirichlet(np.ones(sizes[0])), rng.dirichlet(np.ones(sizes[1]))


@settings(max_examples=40)
@given(seed=SEEDS, sizes=st.tuples(st.integers(1, 12), st.integers(1, 24)), scale=st.sampled_from([1e-9, 1.0, 1e6]))
def test_plans_are_those_of_an_exact_solver(seed: int, sizes: tuple[int, int], scale: float) -> None:
    costs, student, teacher = problem(seed, sizes, scale)
    plan, exact = optimal_transport.transport_plan(costs, student, teacher), ot.emd(student, teacher, costs)
    assert (plan * costs).sum() == pytest.approx((exact * costs).sum(), rel=1e-6)
    np.testing.assert_allclose(plan.sum(axis=1), student, atol=1e-9)
    np.testing.assert_allclose(plan.sum(axis=0), teacher, atol=1e-9)
    np.testing.assert_allclose(plan, exact, atol=1e-6)  # random costs have one best plan
    assert np.count_nonzero(plan) < sum(sizes)


@settings(max_examples=20)
@given(seed=SEEDS, temperature=st.sampled_from([1.0, 5.0, 1e9]))
def test_cost_attention_equals_the_equation(seed: int, temperature: float) -> None:
    costs, student, teacher = problem(seed, (3, 4), 2.0)
    plan = 0.5 * optimal_transport.transport_plan(costs, student, teacher) + 0.5 * np.outer(student, teacher)
    masses = optimal_transport.cost_attention(plan, costs, temperature)
    for side, mass, axis in ((masses[0], student, 0), (masses[1], teacher, 1)):
        units = []
        for layer in range(len(mass)):
            shares, prices = (plan[layer], costs[layer]) if axis == 0 else (plan[:, layer], costs[:, layer])
            units.append(sum(f * d for f, d in zip(shares, prices, strict=True)) / mass[layer])
        powers = [np.exp(sum(units) / unit / temperature) for unit in units]
        expected = [power / sum(powers) for power in powers]
        np.testing.assert_allclose(side, 0.999 * np.array(expected) + 0.001 / len(mass), rtol=1e-9)


def test_masses_of_layers_of_which_one_costs_half() -> None:
    """Ratios of 2.5, 2.5 and 5: the released code divides them by their sum, the paper takes their softmax."""
    plan, costs = np.eye(3) / 3, np.diag([2.0, 2.0, 1.0])
    released, paper = (
        optimal_transport.cost_attention(plan, costs)[0],
        optimal_transport.cost_attention(plan, costs, 1.0)[0],
    )
    np.testing.assert_allclose(released, [0.25, 0.25, 0.5])
    np.testing.assert_allclose(paper, [0.071, 0.071, 0.859], atol=1e-3)


def released_masses(plan: np.ndarray, costs: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Return new masses of the rows, as the authors' released code computes them, layer by layer."""
    paid = [(plan[i] * costs[i]).sum() / masses[i] for i in range(len(masses))]
    ratios = [sum(paid) / x for x in paid]
    return np.array([x / sum(ratios) for x in ratios])


@pytest.mark.parametrize("costs", [np.zeros((2, 3)), np.array([[0.0, 0.0, 1e9], [1e-30, 1.0, 0.0]])])
def test_masses_stay_finite_and_positive(costs: np.ndarray) -> None:
    sides: list[np.ndarray] = [np.full(2, 1 / 2), np.full(3, 1 / 3)]
    for temperature in (1.0, None) * 5:
        plan = optimal_transport.transport_plan(costs, *sides)
        sides = list(optimal_transport.cost_attention(plan, costs, temperature))
        for side in sides:
            assert side.sum() == pytest.approx(1.0)
            assert side.min() > 1e-4


def naive_costs(
    objective: EMD, student: naive_twins.ModelOutputs, teacher: naive_twins.ModelOutputs, batch: Batch
) -> np.ndarray:
    """Return costs [2, M, L], pair by pair, in fp64."""
    costs = np.zeros(objective.costs.shape)
    projection = objective.hidden_projection.double()
    for m, layer in np.ndindex(*costs.shape[1:]):
        student_states = projection(naive_twins.real_tokens(student.hidden[m + 1], batch)).detach()
        teacher_states = naive_twins.real_tokens(teacher.hidden[layer + 1], batch)
        costs[0, m, layer] = (student_states - teacher_states).square().mean()
        pairs = student.qkv[m + 1][:2], teacher.qkv[layer + 1][:2]
        costs[1, m, layer] = naive_twins.naive_score_error(*pairs, batch, objective.heads)
    projection.float()
    return costs


@settings(max_examples=15)
@given(batch=naive_twins.batches(), seed=SEEDS, dims=st.sampled_from([STUDENT, NARROW]))
def test_emd_equals_the_equations(batch: Batch, seed: int, dims: ModelDims) -> None:
    """The first step weighs by masses, later ones by an exact plan for the costs of the step before."""
    student, teacher = random_outputs(batch, seed, dims)
    later = random_outputs(batch, seed + 1, dims)
    objective = EMD(dims, TEACHER, hidden=2.0, attention=3.0, embedding=5.0)
    objective.on_step_start(StepState(0, 2, seed=0))
    first = objective(student, teacher, batch)
    costs = naive_costs(objective, student, teacher, batch)
    assert first["hidden"].item() == pytest.approx(2 * costs[0].mean(), rel=1e-4)
    assert first["attention"].item() == pytest.approx(3 * costs[1].mean(), rel=1e-4)
    objective.on_step_start(StepState(1, 2, seed=0))
    second = objective(*later, batch)
    then = naive_costs(objective, *later, batch)
    # Masses are in inverse ratio to costs, and the cost of attention is ‖A‖² - 2 ⟨A, B⟩ + ‖B‖² in fp32: of equal ones
    # there is nothing but rounding.
    assume(min(costs.min(), then.min()) > 1e-2)
    masses = np.full(2, 1 / 2), np.full(4, 1 / 4)
    for kind, weight, old, new in zip(("hidden", "attention"), (2, 3), costs, then, strict=True):
        assert second[kind].item() == pytest.approx(weight * (ot.emd(*masses, old) * new).sum(), rel=1e-4)
    objective.on_step_start(StepState(2, 3, seed=0))
    third = objective(student, teacher, batch)
    plans = [ot.emd(*masses, cost) for cost in costs]
    student_masses = np.mean([released_masses(*x, masses[0]) for x in zip(plans, costs, strict=True)], axis=0)
    teacher_masses = np.mean([released_masses(p.T, c.T, masses[1]) for p, c in zip(plans, costs, strict=True)], axis=0)
    for kind, weight, old, new in zip(("hidden", "attention"), (2, 3), then, costs, strict=True):
        plan = ot.emd(student_masses, teacher_masses, old)
        assert third[kind].item() == pytest.approx(weight * (plan * new).sum(), rel=1e-4)
    mapped = objective.embedding_projection.double()(naive_twins.real_tokens(later[0].hidden[0], batch))
    error = (mapped - naive_twins.real_tokens(later[1].hidden[0], batch)).square().mean().item()
    assert second["embedding"].item() == pytest.approx(5 * error, rel=1e-4)


def test_a_student_equal_to_the_teacher_learns_nothing() -> None:
    """From the second step on each layer is mapped to itself, at no cost."""
    batch = toy.batch(LENGTHS)
    _, teacher = random_outputs(batch)
    objective = EMD(TEACHER, TEACHER)
    for step in range(3):
        objective.on_step_start(StepState(step, 3, seed=0))
        terms = objective(teacher, teacher, batch)
    for name in ("hidden", "attention", "embedding"):
        assert terms[name].item() == pytest.approx(0.0, abs=1e-9)
    assert {name: x.item() for name, x in objective.metrics.items()} == pytest.approx(
        {f"teacher_layer_weight/{m}/{layer}": float(m == layer) for m in (1, 2, 3, 4) for layer in (1, 2, 3, 4)}
    )


def test_only_layers_that_the_plan_uses_are_differentiated() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    objective = EMD(STUDENT, TEACHER, soft=0.0)
    objective.on_step_start(StepState(0, 2, seed=0))
    objective(student, teacher, batch)
    objective.on_step_start(StepState(1, 2, seed=0))
    plan = objective.plans["hidden"]
    assert 0 < np.count_nonzero(plan) < plan.size
    loss = objective(student, teacher, batch)["hidden"]
    gradients = torch.autograd.grad(loss, [teacher.hidden[layer] for layer in range(1, 5)])
    assert all(g.abs().sum() > 0 for g in gradients)  # every teacher layer has mass
    (gradient,) = torch.autograd.grad(objective(student, teacher, batch)["hidden"], [student.hidden[1]])
    used = sum(plan[0, layer - 1] * (student.hidden[1] - teacher.hidden[layer]) for layer in range(1, 5))
    torch.testing.assert_close(gradient, (0.01 * 2 * used / used.numel()).float())


def test_plans_change_with_steps_and_only_while_training() -> None:
    batch = toy.batch(LENGTHS)
    objective = EMD(STUDENT, TEACHER)
    objective.on_step_start(StepState(0, 2, seed=0))
    objective(*random_outputs(batch, 0), batch)
    objective(*random_outputs(batch, 1), batch)
    before = objective.plans["hidden"]
    objective.eval()
    objective(*random_outputs(batch, 2), batch)
    assert objective.plans["hidden"] is before
    assert objective.count == 2
    objective.train()
    objective.on_step_start(StepState(1, 10, seed=0))
    assert objective.plans["hidden"] is not before
    assert objective.count == 0


def test_state_dict_holds_plans_unrounded() -> None:
    batch = toy.batch(LENGTHS)
    one, other = EMD(NARROW, TEACHER), EMD(NARROW, TEACHER).bfloat16()
    for step in range(2):
        one.on_step_start(StepState(step, 4, seed=0))
        one(*random_outputs(batch, step, NARROW), batch)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.costs, other.costs)
    for objective in (one, other):
        objective.on_step_start(StepState(3, 4, seed=0))
    for kind in one.plans:
        np.testing.assert_array_equal(one.plans[kind], other.plans[kind])
    for a, b in zip(one.masses, other.masses, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_overflowed_leaves_the_plan_as_it_was() -> None:
    batch = toy.batch(LENGTHS)
    objective = EMD(STUDENT, TEACHER)
    student, teacher = random_outputs(batch)
    broken = teacher._replace(hidden={layer: x / 0 for layer, x in teacher.hidden.items()})
    for step, outputs in enumerate((teacher, broken, teacher)):
        before = objective.plans
        objective.on_step_start(StepState(step, 4, seed=0))
        objective(student, outputs, batch)
    assert objective.plans is before
    objective.on_step_start(StepState(3, 4, seed=0))
    assert objective.plans is not before
