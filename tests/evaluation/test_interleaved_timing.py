"""Timing of forms that take turns."""

import itertools

import pytest
import torch

from lad_dist.evaluation import interleaved_timing

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the forms move."""
    now = [0.0]
    monkeypatch.setattr(interleaved_timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("max_positions", "lengths"), [(512, [128, 512]), (8192, [128, 512]), (511, [128]), (128, [128]), (64, [64])]
)
def test_lengths_are_those_that_the_model_has_positions_for(max_positions: int, lengths: list[int]) -> None:
    assert interleaved_timing.batch_shapes(max_positions) == list(itertools.product((1, 32), lengths))


def test_forms_take_turns_and_the_warm_up_does_not_count(clock: list[float]) -> None:
    calls: list[str] = []
    seconds = {"a": iter([9.0, 1.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 4.0, 4.0])}

    def form(name: str) -> None:
        calls.append(name)
        clock[0] += next(seconds[name])

    timings = interleaved_timing.time_interleaved(
        {"a": lambda: form("a"), "b": lambda: form("b")}, CPU, (32, 128), rounds=4
    )
    assert "".join(calls) == "ab" * (interleaved_timing.WARM_UP + 4)
    assert timings == [
        interleaved_timing.Timing("a", "cpu", 32, 128, seconds=1.5, spread=1.75, rounds=4),
        interleaved_timing.Timing("b", "cpu", 32, 128, seconds=4.0, spread=0.0, rounds=4),
    ]


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(100.0, interleaved_timing.MIN_ROUNDS), (0.5, 10), (0.001, interleaved_timing.MAX_ROUNDS)]
)
def test_rounds_continue_until_the_time_is_up(seconds: float, rounds: int, clock: list[float]) -> None:
    def form() -> None:
        clock[0] += seconds

    timings = interleaved_timing.time_interleaved({"a": form, "b": form}, CPU, (1, 1))
    assert [timing.rounds for timing in timings] == [rounds, rounds]
