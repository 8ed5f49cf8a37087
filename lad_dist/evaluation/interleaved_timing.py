"""Latency: how long a forward takes, one form of a model against another in the same process.

A machine's pace drifts by more than the differences to measure. Forms that take turns drift together: read their
ratios.

B sequences, S tokens of each: no padding.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lad_dist.utils import progress

BATCHES, LENGTHS = (1, 32), (128, 512)
WARM_UP = 1  # rounds that do not count
MIN_ROUNDS, MAX_ROUNDS = 5, 30
MAX_SECONDS = 10.0  # of one shape; from then on only the least number of rounds is completed


@dataclass(frozen=True)
class Timing:
    """The time of one forward; `spread` is the distance between the quartiles over the rounds."""

    form: str
    device: str
    batch: int
    length: int
    seconds: float
    spread: float
    rounds: int


def batch_shapes(max_positions: int) -> list[tuple[int, int]]:
    """Return the shapes (B, S) with sequences of at most `max_positions` tokens."""
    lengths = [length for length in LENGTHS if length <= max_positions] or [max_positions]
    return [(batch, length) for batch in BATCHES for length in lengths]


def time_interleaved(
    forms: Mapping[str, Callable[[], object]], device: torch.device, shape: tuple[int, int], rounds: int | None = None
) -> list[Timing]:
    """Time each form's call in turn, for this many rounds, or for as many as fit into MAX_SECONDS."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(WARM_UP):
        for call in forms.values():
            _time_call(call, device)
    fewest, most = (MIN_ROUNDS, MAX_ROUNDS) if rounds is None else (rounds, rounds)
    start = time.perf_counter()
    task = f"timing {shape[0]} x {shape[1]} on {device.type}"
    for completed in range(most):
        if completed >= fewest and time.perf_counter() - start >= MAX_SECONDS:
            break
        progress.report(task, completed, most, f"rounds of {', '.join(forms)}")
        for name, call in forms.items():
            seconds[name].append(_time_call(call, device))
    progress.report(task, most, most)
    timings = []
    for name, form_seconds in seconds.items():
        low, median, high = np.quantile(form_seconds, [0.25, 0.5, 0.75]).tolist()
        timings.append(Timing(name, device.type, *shape, median, high - low, len(form_seconds)))
    return timings


def _time_call(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
