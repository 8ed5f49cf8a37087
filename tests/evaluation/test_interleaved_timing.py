"""Timing of forms that take turns."""

from typing import Any

import pytest
import torch

from lad_dist.evaluation import interleaved_timing
from lad_dist.evaluation.interleaved_timing import ModelForm
from lad_dist.utils import progress

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the forms move."""
    now = [0.0]
    monkeypatch.setattr(interleaved_timing.time, "perf_counter", lambda: now[0])
    return now


def test_forms_take_turns_and_the_warm_up_does_not_count(clock: list[float]) -> None:
    calls: list[str] = []
    seconds = {"a": iter([9.0, 1.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 4.0, 4.0])}

    def form(name: str) -> None:
        calls.append(name)
        clock[0] += next(seconds[name])

    timings = interleaved_timing.time_interleaved(
        {ModelForm("teacher", "a"): lambda: form("a"), ModelForm("student", "b"): lambda: form("b")},
        CPU,
        (32, 128),
        rounds=4,
    )
    assert "".join(calls) == "ab" * (interleaved_timing.WARM_UP + 4)
    assert timings == [
        interleaved_timing.Timing("teacher", "a", "cpu", 32, 128, seconds=1.5, spread=1.75, rounds=4),
        interleaved_timing.Timing("student", "b", "cpu", 32, 128, seconds=4.0, spread=0.0, rounds=4),
    ]


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(100.0, interleaved_timing.MIN_ROUNDS), (0.5, 10), (0.001, interleaved_timing.MAX_ROUNDS)]
)
def test_rounds_continue_until_the_time_is_up(seconds: float, rounds: int, clock: list[float]) -> None:
    def form() -> None:
        clock[0] += seconds

    timings = interleaved_timing.time_interleaved({ModelForm("student", name): form for name in "ab"}, CPU, (1, 1))
    assert [timing.rounds for timing in timings] == [rounds, rounds]


def test_progress_is_shown_of_each_call_from_the_warm_up_on(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[tuple[Any, ...]] = []
    monkeypatch.setattr(progress, "report", lambda *report: reports.append(report))
    calls = {ModelForm("teacher", form): lambda: None for form in ("torch", "onnx")}
    interleaved_timing.time_interleaved(calls, CPU, (2, 16), rounds=1)
    task = "timing 2 x 16 on cpu"
    names = ["teacher torch", "teacher onnx"] * 2
    assert reports == [*((task, done, 4, name) for done, name in enumerate(names)), (task, 4, 4)]
    assert clock == [0.0]
