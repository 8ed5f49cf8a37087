"""The space of a search: what it refuses, what Optuna draws from it, points and the samples of a resumed search."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.search.sampler import SpaceSampler
from lad_dist.search.space import Space, parse_space

STAGES = ("pretrain", "task")
NESTED = {
    "task.optim.lr": {"loguniform": [1e-5, 1e-2]},
    "method": {
        "kd": {"task.objective.name": "kd"},
        "lad": {
            "task.objective": {"name": "lad", "hidden": {"uniform": [0.0, 9.0]}},
            "gates": {"frozen": {"task.objective.gates": "frozen"}, "learnt": {}},
        },
    },
}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"task.optim.lr": {"loguniforn": [0.1, 0.2]}}, 'unknown: did you mean "loguniform"'),
        ({"task.optim.lr": {"loguniform": [0.0, 0.2]}}, "the low end must be above 0"),
        ({"task.optim.lr": {"uniform": [0.2, 0.1]}}, r"give \[low, high\] with low < high"),
        ({"task.optim.lr": {"quniform": [0.1, 0.2]}}, r"give \[low, high, step\] with low < high"),
        ({"task.optim.lr": {"quniform": [0.1, 0.2, 0.0]}}, "the step must be above 0"),
        ({"task.data.micro_batches_per_step": {"randint": [1, 2.5]}}, r"give \[low, high\] with low < high"),
        ({"task.optim.lr": {"choice": []}}, "give a list"),
        ({"task.optim.lr": 0.1}, "a fixed value is an override"),
        ({"optim.lr": {"uniform": [0.1, 0.2]}}, "no stage has this name"),
        ({"method": "kd"}, "an axis is a table of choices"),
        ({"method": {"kd": {"optim.lr": 0.1}}}, "space.method.kd.optim.*no stage has this name"),
    ],
)
def test_mistakes_are_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_space(tables, STAGES)
    assert "\n" not in str(caught.value)


def draw(space: Space, count: int, *, algorithm: str = "random", seed: int = 0) -> list[dict[str, Any]]:
    """Return the choices of so many samples, each of which scores the logarithm of its rate."""
    sampler = SpaceSampler(space, algorithm, {"accuracy": "max"}, seed)
    samples = []
    for number in range(count):
        _, sample = sampler.draw(f"trial-{number}")
        samples.append(sample.choices)
        sampler.learn(f"trial-{number}", {"accuracy": sample.changes["task.optim.lr"]})
    return samples


def test_each_choice_has_separate_values_and_distributions() -> None:
    space = parse_space(NESTED, STAGES)
    seen = set()
    for choices in draw(space, 60):
        method, gates = choices["method"], choices.get("gates")
        seen.add((method, gates))
        assert (method == "lad") == ("task.objective.hidden" in choices) == (gates is not None)
        assert 1e-5 <= choices["task.optim.lr"] <= 1e-2
    assert seen == {("kd", None), ("lad", "frozen"), ("lad", "learnt")}


def test_a_sample_changes_what_the_choices_say() -> None:
    space = parse_space(NESTED, STAGES)
    drawn = {"method": '"lad"', "method=lad.gates": '"frozen"', "method=lad.task.objective.hidden": 2.0}
    sample = space.sample_of({**drawn, "task.optim.lr": 1e-3})
    assert sample.changes == {
        "task.objective.name": "lad",
        "task.objective.gates": "frozen",
        "task.objective.hidden": 2.0,
        "task.optim.lr": 1e-3,
    }
    assert sample.choices == {
        "method": "lad", "gates": "frozen", "task.objective.hidden": 2.0, "task.optim.lr": 1e-3
    }  # fmt: skip


def test_corners_have_every_choice_and_both_ends_of_every_range() -> None:
    corners = [corner.choices for corner in parse_space(NESTED, STAGES).corners()]
    assert {corner["task.optim.lr"] for corner in corners} == {1e-5, 1e-2}
    assert {corner.get("task.objective.hidden") for corner in corners} >= {0.0, 9.0}
    assert {corner.get("gates") for corner in corners} >= {"frozen", "learnt"}


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2"])
def test_a_sampler_that_knows_earlier_samples_goes_on_as_if_it_had_drawn_them(algorithm: str) -> None:
    space = parse_space(NESTED, STAGES)
    sampler = SpaceSampler(space, algorithm, {"accuracy": "max"}, 7)
    whole, drawn = [], []
    for number in range(24):
        parameters, sample = sampler.draw(f"trial-{number}")
        whole.append(sample.choices)
        drawn.append(parameters)
        sampler.learn(f"trial-{number}", {"accuracy": sample.changes["task.optim.lr"]})
    resumed = SpaceSampler(space, algorithm, {"accuracy": "max"}, 7, drawn[:15])
    for number in range(24):
        _, sample = resumed.draw(f"trial-{number}")
        assert sample.choices == whole[number], number
        resumed.learn(f"trial-{number}", {"accuracy": sample.changes["task.optim.lr"]})


@settings(max_examples=20)
@given(
    low=st.floats(1e-6, 1.0),
    ratio=st.floats(1.5, 1e4),
    seed=st.integers(0, 2**31),
    whole=st.integers(1, 50),
    width=st.integers(1, 30),
)
def test_samples_are_in_the_space(low: float, ratio: float, seed: int, whole: int, width: int) -> None:
    tables = {
        "task.optim.lr": {"loguniform": [low, low * ratio]},
        "task.optim.warmup": {"quniform": [0.0, 0.5, 0.125]},
        "task.data.micro_batches_per_step": {"randint": [whole, whole + width]},
        "task.data.max_length": {"lograndint": [whole, whole + width]},
        "task.student.layers": {"choice": [[1, 3], "first", {"a": 1}]},
    }
    space = parse_space(tables, STAGES)
    distributions = {distribution.key: distribution for distribution in space.distributions}
    for choices in draw(space, 5, seed=seed):
        assert all(distributions[key].contains(value) for key, value in choices.items())
        assert choices["task.optim.warmup"] % 0.125 == 0
        assert isinstance(choices["task.data.max_length"], int)
        assert choices["task.student.layers"] in tables["task.student.layers"]["choice"]


def test_points_are_drawn_first_and_what_they_leave_out_is_drawn() -> None:
    space = parse_space(NESTED, STAGES)
    point = space.parameters_of({"method": "lad", "gates": "learnt", "task.objective.hidden": 1.5}, "point.0")
    sampler = SpaceSampler(space, "tpe", {"accuracy": "max"}, 0, [point])
    choices = sampler.draw("trial-0")[1].choices
    assert (choices["method"], choices["gates"], choices["task.objective.hidden"]) == ("lad", "learnt", 1.5)
    assert 1e-5 <= choices["task.optim.lr"] <= 1e-2


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"task.optim.lr": 1e-3}, "point.0: give method, one of kd, lad"),
        ({"method": "kd", "task.optim.lr": 1.0}, r"point.0.task.optim.lr: 1.0 is not in the space \(loguniform"),
        ({"method": "pkd"}, "point.0.method: 'pkd' is not in the space"),
        (
            {"method": "kd", "task.optim.rl": 1.0},
            'point.0.task.optim.rl: not in the space; did you mean "task.optim.lr"',
        ),
    ],
)
def test_a_point_outside_of_the_space_is_refused(point: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_space(NESTED, STAGES).parameters_of(point, "point.0")


def test_several_metrics_are_learnt_from_by_nsga2() -> None:
    keys = ("task.optim.lr", "task.optim.warmup", "task.objective.hidden")
    space = parse_space({key: {"uniform": [0.0, 1.0]} for key in keys}, STAGES)
    sampler = SpaceSampler(space, "nsga2", {"accuracy": "max", "parameters": "min"}, 0)
    distances = []
    for number in range(200):
        drawn = sampler.draw(str(number))[1].changes
        distances.append(sum(abs(drawn[key] - 0.5) for key in keys))
        values = {"accuracy": -distances[-1], "parameters": distances[-1]}
        sampler.learn(str(number), values if number % 7 else None)
    assert sum(distances[150:]) < 0.85 * sum(distances[:50])
