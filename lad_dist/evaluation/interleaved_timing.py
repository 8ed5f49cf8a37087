"""Latency: how long a forward takes, one form of a model against another in the same process.

A machine's pace drifts by more than the differences to measure. Forms that take turns drift together: read their
ratios.

B sequences, S tokens of each: no padding.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lad_dist.utils import progress

WARM_UP = 1  # rounds that do not count
MIN_ROUNDS, MAX_ROUNDS = 5, 30
MAX_SECONDS = 10.0  # of one shape; from then on only the least number of rounds is completed


class ModelForm(NamedTuple):
    """A model and the form in which it runs."""

    model: str
    form: str


@dataclass(frozen=True)
class Timing:
    """The time of one forward; `spread` is the distance between the quartiles over the rounds."""

    model: str
    form: str
    device: str
    batch: int
    length: int
    seconds: float
    spread: float
    rounds: int


def time_interleaved(
    calls: Mapping[ModelForm, Callable[[], object]],
    device: torch.device,
    shape: tuple[int, int],
    rounds: int | None = None,
) -> list[Timing]:
    """Time each form's call in turn, for this many rounds, or for as many as fit into MAX_SECONDS."""
    seconds: dict[ModelForm, list[float]] = {name: [] for name in calls}
    fewest, most = (MIN_ROUNDS, MAX_ROUNDS) if rounds is None else (rounds, rounds)
    task, total = f"timing {shape[0]} x {shape[1]} on {device.type}", (WARM_UP + most) * len(calls)
    start = time.perf_counter()
    for completed in range(WARM_UP + most):
        if completed == WARM_UP:
            start = time.perf_counter()
        elif completed >= WARM_UP + fewest and time.perf_counter() - start >= MAX_SECONDS:
            break
        for number, (name, call) in enumerate(calls.items()):
            progress.report(task, completed * len(calls) + number, total, " ".join(name))
            seconds[name].append(_time_call(call, device))
    progress.report(task, total, total)
    timings = []
    for name, form_seconds in seconds.items():
        counted = form_seconds[WARM_UP:]
        low, median, high = np.quantile(counted, [0.25, 0.5, 0.75]).tolist()
        timings.append(Timing(*name, device.type, *shape, median, high - low, len(counted)))
    return timings


def _time_call(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
