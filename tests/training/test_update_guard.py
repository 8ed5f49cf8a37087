"""Bad updates are skipped on all processes, and a run gets past what spoilt the weights."""

import json
from typing import Any

import pytest
import skipped_updates
from hypothesis import given
from hypothesis import strategies as st
from launching import run_ranks

from lad_dist.distributed import processes
from lad_dist.training.update_guard import MAX_FUTILE_ROLL_BACKS, MIN_LOSSES, WINDOW, SkipPolicy, UpdateAction

ACTIONS = ["skipped" if step == skipped_updates.SPOILT else "proceed" for step in range(skipped_updates.STEPS)]
CHANGED = [step != skipped_updates.SPOILT for step in range(1, skipped_updates.STEPS)]
EXPECTED = {"actions": ACTIONS, "changed": CHANGED, "ends_as_without": True}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_spoilt_update_changes_nothing(stage: int) -> None:
    processes.start()
    results = skipped_updates.action_table([(stage, "fp32", "gradient")])
    assert list(results.values()) == [EXPECTED]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(skipped_updates.write_tables, folder / "out.json", folder=folder, processes=2)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.processes
@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in skipped_updates.CASES])
def test_a_spoilt_update_changes_nothing_on_other_processes(case: str, two: dict[str, Any]) -> None:
    assert [rank[case] for rank in two["cases"]] == [EXPECTED] * 2


@pytest.mark.processes
def test_all_processes_notice_a_flipped_bit_in_the_weights_of_one(two: dict[str, Any]) -> None:
    assert two["divergence"] == [[[], [0, 1]]] * 2


def test_only_skips_in_a_row_send_a_run_back() -> None:
    policy, good = SkipPolicy(max_skips=3), [True] * 10 + [False, False, True, False, False, False]
    actions = [policy.on_update() if fine else policy.on_skip(step) for step, fine in enumerate(good)]
    assert [action.value for action in actions[10:]] == [*["skipped"] * 2, "proceed", *["skipped"] * 2, "roll back"]
    assert policy.skipped_steps == [10, 11, 12, 13, 14, 15]  # the skipped ones, and as many before them
    assert policy.rollback_step == 10


@given(st.integers(1, 4), st.sets(st.integers(0, 40)), st.integers(0, 40))
def test_what_is_left_out_is_one_stretch_that_reaches_back(most: int, before: set[int], first: int) -> None:
    policy = SkipPolicy(most, skipped_steps=before)
    row = [step for step in range(first, first + 60) if step not in before][:most]
    actions = [policy.on_skip(step) for step in row]
    assert actions[:-1] == [UpdateAction.SKIPPED] * (most - 1)
    assert actions[-1] in (UpdateAction.ROLL_BACK, UpdateAction.GIVE_UP)
    assert policy.skipped_steps == sorted(set(policy.skipped_steps) | before | set(row))
    assert set(range(policy.rollback_step, row[0])) <= set(policy.skipped_steps)
    assert policy.rollback_step == 0 or policy.rollback_step - 1 not in policy.skipped_steps
    newly = [step for step in policy.skipped_steps if step < row[0] and step not in before]
    assert len(newly) == most or policy.rollback_step == 0


def run(spoils: int, delay: int, steps: int = 200, most: int = 4) -> tuple[SkipPolicy, int]:
    """Simulate a run whose weights step `spoils` spoils for good, which shows `delay` steps later.

    Each step has a checkpoint. Return the policy, and how often the run went back.
    """
    policy, step, spoilt, rollbacks = SkipPolicy(most), 0, False, 0
    while step < steps:
        if step in policy.skipped_steps:
            step += 1
            continue
        spoilt = spoilt or step == spoils
        action = policy.on_skip(step) if spoilt and step >= spoils + delay else policy.on_update()
        step += 1
        if action is UpdateAction.GIVE_UP:
            return policy, -1
        if action is UpdateAction.ROLL_BACK:
            step, rollbacks = policy.rollback_step, rollbacks + 1
            spoilt = spoilt and step > spoils
    return policy, rollbacks


@given(st.integers(0, 100), st.integers(1, 12))
def test_a_run_gets_past_a_step_that_spoilt_the_weights(spoils: int, delay: int) -> None:
    policy, rollbacks = run(spoils, delay)
    assert spoils in policy.skipped_steps
    assert rollbacks == -(-delay // 4)  # each time 4 steps more are left out before
    assert len(policy.skipped_steps) <= 2 * 4 * rollbacks + delay


def test_a_run_that_nothing_helps_ends() -> None:
    policy = SkipPolicy(max_skips=2)
    actions = [policy.on_skip(step) for step in range(100, 200)]
    assert UpdateAction.GIVE_UP in actions[: MAX_FUTILE_ROLL_BACKS * 2]


def test_a_spike_stands_out_above_the_last_losses() -> None:
    policy = SkipPolicy(max_skips=3, spike_sigma=6.0)
    for number in range(MIN_LOSSES):
        assert not policy.is_spike(1e9)  # of what?
        policy.on_update(2.0 + number % 2)
    assert not policy.is_spike(2.5 + 6 * 0.5)
    assert policy.is_spike(2.5 + 6 * 0.5 + 1e-9)
    assert not policy.is_spike(-1e9)
    assert not SkipPolicy(max_skips=3).is_spike(1e9)


@given(st.lists(st.one_of(st.just(None), st.floats(0, 1e6)), max_size=2 * WINDOW), st.data())
def test_a_resumed_policy_decides_as_one_that_did_not_stop(losses: list[float | None], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(losses)))
    whole, first = SkipPolicy(5, 2.0), SkipPolicy(5, 2.0)
    record(whole, losses, 0)
    record(first, losses[:cut], 0)
    second = SkipPolicy(5, 2.0, first.skipped_steps)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    record(second, losses[cut:], cut)
    assert (second.state_dict(), second.skipped_steps) == (whole.state_dict(), whole.skipped_steps)


def record(policy: SkipPolicy, losses: list[float | None], first: int) -> None:
    for step, loss in enumerate(losses, first):
        if loss is None or policy.is_spike(loss):
            policy.on_skip(step)
        else:
            policy.on_update(loss)
