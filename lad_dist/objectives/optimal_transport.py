"""Optimal transport between layers, which decides what each student layer learns from (BERT-EMD).

M student layers, L teacher layers. All is in fp64 on the host, where a plan of 12 x 24 takes milliseconds.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog
from scipy.special import softmax

Array = NDArray[np.float64]
UNIFORM_SHARE = 1e-3  # of the mean cost at least; and of a softmax, spread evenly so that every layer can gain again


def transport_plan(costs: Array, student: Array, teacher: Array) -> Array:
    """Return the plan F [M, L] >= 0 with the given sums of rows and columns that minimises Σ F · costs.

    F is an exact vertex of the polytope, so at most M + L - 1 entries are not 0.

    Args:
        costs: [M, L], the cost of moving a unit of mass between two layers.
        student: [M], masses of the student's layers (sums of rows); they sum to 1.
        teacher: [L], masses of the teacher's layers (sums of columns); they sum to 1.
    """
    rows = sparse.kron(sparse.eye(len(student)), np.ones((1, len(teacher))))
    columns = sparse.kron(np.ones((1, len(student))), sparse.eye(len(teacher)))
    # Both sides sum to 1: the last column's equation says nothing new, and rounding could contradict it.
    equations = sparse.vstack([rows, columns]).tocsr()[:-1]
    solution = linprog(
        (costs / max(costs.max(), np.finfo(float).tiny)).ravel(),
        A_eq=equations,
        b_eq=np.concatenate([student, teacher])[:-1],
        method="highs-ds",
    )
    assert solution.success, solution.message
    return np.maximum(solution.x, 0.0).reshape(costs.shape)


def cost_attention(plan: Array, costs: Array, temperature: float | None = None) -> tuple[Array, Array]:
    """Return new masses of the student's layers [M] and of the teacher's [L] (Li et al., EMNLP 2020).

    Layer i's mass is ∝ Σ_k C_k / C_i, C_i the cost of a unit of its mass. At a temperature it is the softmax of
    Σ_k C_k / (C_i · temperature).

    Args:
        plan: [M, L], the plan between the old masses.
        costs: [M, L], the cost of moving a unit of mass between two layers.
        temperature: The higher, the more equal the masses; None: no softmax.
    """
    paid = plan * costs
    return (
        _masses(paid.sum(axis=1) / plan.sum(axis=1), temperature),
        _masses(paid.sum(axis=0) / plan.sum(axis=0), temperature),
    )


def _masses(unit_costs: Array, temperature: float | None) -> Array:
    if not unit_costs.sum():
        return np.full(len(unit_costs), 1 / len(unit_costs))
    unit_costs = np.maximum(unit_costs, UNIFORM_SHARE * unit_costs.mean())
    ratios = unit_costs.sum() / unit_costs
    if temperature is None:
        return ratios / ratios.sum()
    return (1 - UNIFORM_SHARE) * softmax(ratios / temperature) + UNIFORM_SHARE / len(ratios)
