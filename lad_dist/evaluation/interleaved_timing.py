"""Latency: how long a forward takes, one form of a model against another in the same process.

    shapes(room)             batch sizes and lengths that are measured, as far as a model has positions
    interleaved(forms, …)    seconds of each form: A B A B …, after a warm-up, on a device that is waited for
    Timing                   what is kept of them: the median, and how far the middle half of the rounds lies apart

A machine's pace drifts by more than what is to be seen; forms that take turns drift together. Read their ratios.

B sequences, S tokens of each: no padding.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

BATCHES, LENGTHS = (1, 32), (128, 512)
WARM_UP = 1  # rounds that do not count
LEAST, MOST = 5, 30  # rounds
ENOUGH = 10.0  # seconds of one shape, after which only the least number of rounds goes on


@dataclass(frozen=True)
class Timing:
    """Of one forward. `spread`: between the quartiles of the rounds."""

    form: str
    device: str
    batch: int
    length: int
    seconds: float
    spread: float
    rounds: int

    @property
    def throughput(self) -> float:
        """Sequences per second."""
        return self.batch / self.seconds


def shapes(room: int) -> list[tuple[int, int]]:
    """(B, S) for sequences of at most `room` tokens."""
    lengths = [length for length in LENGTHS if length <= room] or [room]
    return [(batch, length) for batch in BATCHES for length in lengths]


def interleaved(
    forms: Mapping[str, Callable[[], object]], device: torch.device, shape: tuple[int, int], rounds: int | None = None
) -> list[Timing]:
    """Times each form's call in turn, so many rounds, or as many as fit in a while."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(WARM_UP):
        for call in forms.values():
            _timed(call, device)
    begin = time.perf_counter()
    while _goes_on(min(map(len, seconds.values())), time.perf_counter() - begin, rounds):
        for name, call in forms.items():
            seconds[name].append(_timed(call, device))
    return [_timing(name, device, shape, found) for name, found in seconds.items()]


def _goes_on(done: int, spent: float, rounds: int | None) -> bool:
    if rounds is not None:
        return done < rounds
    return done < LEAST or (done < MOST and spent < ENOUGH)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timing(name: str, device: torch.device, shape: tuple[int, int], seconds: list[float]) -> Timing:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(name, device.type, *shape, float(median), float(high - low), len(seconds))
