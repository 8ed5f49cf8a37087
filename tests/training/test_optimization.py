"""Every parameter is in one group; the learning rate is a function of the step."""

from itertools import pairwise

import pytest
import torch
from conftest import World
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lad_dist.config.schema import OptimConfig
from lad_dist.core.outputs import ModelDims
from lad_dist.models import loading
from lad_dist.objectives.lad import LAD
from lad_dist.training import optimization

schedules = st.sampled_from(["linear", "cosine", "constant"])


@given(st.integers(1, 500), st.floats(0, 0.99), schedules)
def test_factor_rises_and_then_never_does(steps: int, warmup: float, schedule: str) -> None:
    config = OptimConfig(lr=1.0, warmup=warmup, schedule=schedule)  # type: ignore[arg-type]
    factors = [optimization.learning_rate_factor(step, steps, config) for step in range(steps)]
    warmup_steps = round(warmup * steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert all(a < b for a, b in pairwise(factors[:warmup_steps]))
    assert all(a >= b for a, b in pairwise(factors[warmup_steps:]))
    assert max(factors) == pytest.approx(1)


def test_factor_by_hand() -> None:
    def factors(schedule: str) -> list[float]:
        config = OptimConfig(lr=1.0, warmup=0.2, schedule=schedule)  # type: ignore[arg-type]
        return [round(optimization.learning_rate_factor(step, 10, config), 4) for step in range(10)]

    assert factors("linear") == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors("constant") == [0.5, *[1.0] * 9]
    assert factors("cosine") == [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]


def test_every_parameter_is_in_one_group(world: World) -> None:
    student = loading.load_model(str(world.pretrained), "mlm")  # its decoder and its embeddings are one parameter
    dims = ModelDims(4, 32, 4, "mlm", 200, padded_length=8)
    objective = LAD(dims, dims, variant="paper")
    config = OptimConfig(lr=1e-3, objective_lr=1e-2, weight_decay=0.1)
    groups = optimization.parameter_groups(student, objective, config)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in [*student.parameters(), *objective.parameters()]}
    names = {id(p): n for m in (student, objective) for n, p in m.named_parameters()}
    for group in groups:
        assert group["peak"] == (1e-2 if group["name"] == "objective" else 1e-3)
        plain = [n for p in group["params"] if (n := names[id(p)]).endswith("bias") or "norm" in n.lower()]
        assert len(plain) == (0 if group["weight_decay"] else len(group["params"]))
    assert sorted(group["weight_decay"] for group in groups) == [0, 0, 0.1, 0.1]


def test_frozen_parameters_and_empty_groups_are_left_away() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    groups = optimization.parameter_groups(student, nn.Identity(), OptimConfig(lr=1.0))
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_set_learning_rate_multiplies_each_peak() -> None:
    student, objective = nn.Linear(2, 2), nn.Linear(2, 2)
    config = OptimConfig(lr=1.0, objective_lr=10.0)
    optimizer = optimization.adamw(optimization.parameter_groups(student, objective, config), config)
    optimization.set_learning_rate(optimizer.param_groups, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 2.5, 2.5]
    assert isinstance(optimizer, torch.optim.AdamW)
