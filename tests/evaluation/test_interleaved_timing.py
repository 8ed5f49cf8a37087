"""Timing of forms in turn."""

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
    ("room", "lengths"), [(512, [128, 512]), (8192, [128, 512]), (511, [128]), (128, [128]), (64, [64])]
)
def test_lengths_are_those_that_the_model_has_positions_for(room: int, lengths: list[int]) -> None:
    assert interleaved_timing.shapes(room) == list(itertools.product((1, 32), lengths))


def test_forms_take_turns_and_the_warm_up_does_not_count(clock: list[float]) -> None:
    seen: list[str] = []
    seconds = {"a": iter([9.0, 1.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 4.0, 4.0])}

    def form(name: str) -> None:
        seen.append(name)
        clock[0] += next(seconds[name])

    found = interleaved_timing.interleaved({"a": lambda: form("a"), "b": lambda: form("b")}, CPU, (32, 128), rounds=4)
    assert "".join(seen) == "ab" * (interleaved_timing.WARM_UP + 4)
    assert found == [
        interleaved_timing.Timing("a", "cpu", 32, 128, seconds=1.5, spread=1.75, rounds=4),
        interleaved_timing.Timing("b", "cpu", 32, 128, seconds=4.0, spread=0.0, rounds=4),
    ]
    assert found[1].throughput == 8


@pytest.mark.parametrize(
    ("each", "rounds"), [(100.0, interleaved_timing.LEAST), (0.5, 10), (0.001, interleaved_timing.MOST)]
)
def test_rounds_go_on_while_there_is_time(each: float, rounds: int, clock: list[float]) -> None:
    def form() -> None:
        clock[0] += each

    found = interleaved_timing.interleaved({"a": form, "b": form}, CPU, (1, 1))
    assert [timing.rounds for timing in found] == [rounds, rounds]
