"""Updates that must not happen do not, on any process; and a run gets past what spoilt it."""

import json
from typing import Any

import pytest
import skipped_updates
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT, launch

from lad_dist.config.errors import UserError
from lad_dist.distributed import processes
from lad_dist.training import deepspeed_schema
from lad_dist.training.update_guard import MAX_FUTILE_ROLL_BACKS, MIN_LOSSES, WINDOW, SkipPolicy, UpdateAction

FATES = ["skipped" if step == skipped_updates.SPOILT else "proceed" for step in range(skipped_updates.STEPS)]
CHANGED = [step != skipped_updates.SPOILT for step in range(1, skipped_updates.STEPS)]
AS_IT_SHOULD_BE = {"fates": FATES, "changed": CHANGED, "ends_as_without": True}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_spoilt_update_leaves_no_trace(stage: int) -> None:
    processes.start()
    found = skipped_updates.outcomes([(stage, "fp32", "gradient")])
    assert list(found.values()) == [AS_IT_SHOULD_BE]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("two") / "out.json"
    done = launch([ROOT / "tests" / "skipped_updates.py", out], by="torchrun", processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.processes
@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in skipped_updates.CASES])
def test_nor_on_processes_that_did_not_see_it(case: str, two: dict[str, Any]) -> None:
    assert [rank[case] for rank in two["outcomes"]] == [AS_IT_SHOULD_BE] * 2


@pytest.mark.processes
def test_a_bit_that_flips_in_one_processs_weights_is_seen_by_all(two: dict[str, Any]) -> None:
    assert two["dissent"] == [[[], [0, 1]]] * 2


def follow(judge: SkipPolicy, good: list[bool]) -> list[UpdateAction]:
    return [judge.updated() if fine else judge.skipped(step) for step, fine in enumerate(good)]


def test_only_skips_in_a_row_send_a_run_back() -> None:
    judge = SkipPolicy(max_skips=3)
    fates = follow(judge, [True] * 10 + [False, False, True, False, False, False])
    assert fates[10:15] == [
        UpdateAction.SKIPPED,
        UpdateAction.SKIPPED,
        UpdateAction.PROCEED,
        UpdateAction.SKIPPED,
        UpdateAction.SKIPPED,
    ]
    assert fates[15] is UpdateAction.ROLL_BACK
    assert judge.skipped_steps == [10, 11, 12, 13, 14, 15]  # the skipped ones, and as many before them
    assert judge.back_to == 10


@given(st.integers(1, 4), st.sets(st.integers(0, 40)), st.integers(0, 40))
def test_what_is_left_out_is_one_stretch_that_reaches_back(most: int, before: set[int], first: int) -> None:
    judge = SkipPolicy(most, left_out=before)
    row = [step for step in range(first, first + 60) if step not in before][:most]
    fates = [judge.skipped(step) for step in row]
    assert fates[:-1] == [UpdateAction.SKIPPED] * (most - 1)
    assert fates[-1] in (UpdateAction.ROLL_BACK, UpdateAction.GIVE_UP)
    assert judge.skipped_steps == sorted(set(judge.skipped_steps) | before | set(row))
    assert set(range(judge.back_to, row[0])) <= set(judge.skipped_steps)
    assert judge.back_to == 0 or judge.back_to - 1 not in judge.skipped_steps
    newly = [step for step in judge.skipped_steps if step < row[0] and step not in before]
    assert len(newly) == most or judge.back_to == 0


def run(spoils: int, delay: int, steps: int = 200, most: int = 4) -> tuple[SkipPolicy, int]:
    """A run whose weights are spoilt for good by step `spoils`, which shows `delay` steps later; checkpoints are
    everywhere. The judge, and how often it sent the run back."""
    judge, step, spoilt, backs = SkipPolicy(most), 0, False, 0
    while step < steps:
        if step in judge.skipped_steps:
            step += 1
            continue
        spoilt = spoilt or step == spoils
        fate = judge.skipped(step) if spoilt and step >= spoils + delay else judge.updated()
        step += 1
        if fate is UpdateAction.GIVE_UP:
            return judge, -1
        if fate is UpdateAction.ROLL_BACK:
            step, backs = judge.back_to, backs + 1
            spoilt = spoilt and step > spoils
    return judge, backs


@given(st.integers(0, 100), st.integers(1, 12))
def test_a_run_gets_past_a_step_that_spoilt_its_weights(spoils: int, delay: int) -> None:
    judge, backs = run(spoils, delay)
    assert spoils in judge.skipped_steps
    assert backs == -(-delay // 4)  # each time 4 steps more are left out before
    assert len(judge.skipped_steps) <= 2 * 4 * backs + delay


def test_a_run_that_nothing_helps_ends() -> None:
    judge = SkipPolicy(max_skips=2)
    fates = [judge.skipped(step) for step in range(100, 200)]
    assert UpdateAction.GIVE_UP in fates[: MAX_FUTILE_ROLL_BACKS * 2]


def test_a_spike_stands_out_above_the_last_losses() -> None:
    judge = SkipPolicy(max_skips=3, spike_sigma=6.0)
    for number in range(MIN_LOSSES):
        assert not judge.spikes(1e9)  # of what?
        judge.updated(2.0 + number % 2)
    assert not judge.spikes(2.5 + 6 * 0.5)
    assert judge.spikes(2.5 + 6 * 0.5 + 1e-9)
    assert not judge.spikes(-1e9)
    assert not SkipPolicy(max_skips=3).spikes(1e9)


@given(st.lists(st.one_of(st.just(None), st.floats(0, 1e6)), max_size=2 * WINDOW), st.data())
def test_a_run_that_stopped_judges_as_one_that_did_not(losses: list[float | None], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(losses)))
    whole, first = SkipPolicy(5, 2.0), SkipPolicy(5, 2.0)
    tell(whole, losses, 0)
    tell(first, losses[:cut], 0)
    second = SkipPolicy(5, 2.0, first.skipped_steps)
    second.restore(json.loads(json.dumps(first.state())))
    tell(second, losses[cut:], cut)
    assert (second.state(), second.skipped_steps) == (whole.state(), whole.skipped_steps)


def tell(judge: SkipPolicy, losses: list[float | None], first: int) -> None:
    for step, loss in enumerate(losses, first):
        if loss is None or judge.spikes(loss):
            judge.skipped(step)
        else:
            judge.updated(loss)


@pytest.mark.parametrize("key", ["bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"])
def test_what_finds_them_cannot_be_turned_off(key: str) -> None:
    table, name = key.split(".")
    deepspeed_schema.check_keys({table: {name: True}})
    with pytest.raises(UserError, match=f"deepspeed.{key}: take it away"):
        deepspeed_schema.check_keys({table: {name: False}})
