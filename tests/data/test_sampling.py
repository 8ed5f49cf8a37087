"""The order of windows and examples: complete epochs, even weights, and no state."""

import time
from itertools import pairwise

import numpy as np
import pytest
import sweep
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.data.sampling import EPOCHS, CorpusOrder, TaskOrder, WindowRead, num_windows, rank_share, window_span

Window = tuple[int, int]


def read_by(order: CorpusOrder, numbers: range) -> list[tuple[int, int, int]]:
    """Return (source, window, epoch) of these micro-batches, counted through all steps."""
    readings = [order.micro_batch(*divmod(number, order.micro_batches_per_step)) for number in numbers]
    return [place for reading in readings for place in zip(*(column.tolist() for column in reading), strict=True)]


@given(st.integers(1, 10**6), st.integers(1, 600))
def test_windows_cover_a_stream(length: int, room: int) -> None:
    count = num_windows(length, room)
    begin, end = window_span(np.arange(count), length, room)
    assert begin[0] == 0
    assert end[-1] == length
    assert (begin[1:] == end[:-1]).all()
    sizes = end - begin
    assert sizes.max() <= room
    assert sizes.max() - sizes.min() <= 1
    assert sizes.min() >= 1


@settings(max_examples=sweep.examples(60, 400))
@given(st.data())
def test_no_window_is_repeated_or_left_out_whatever_the_processes_and_the_point_of_resume(data: st.DataObject) -> None:
    """Processes share the micro-batches of a step; the run stops and goes on with another number of processes."""
    counts = data.draw(st.lists(st.integers(1, 15), min_size=1, max_size=3))
    size = data.draw(st.integers(1, 7))
    per_step, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 2**40))
    world_sizes = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=3))
    total = sum(counts)
    steps = -(-2 * total // (size * per_step)) + 1
    cuts = sorted(
        data.draw(st.lists(st.integers(0, steps), min_size=len(world_sizes) - 1, max_size=len(world_sizes) - 1))
    )
    read: dict[tuple[int, int], WindowRead] = {}
    for (first, last), world_size in zip(pairwise([0, *cuts, steps]), world_sizes, strict=True):
        for rank in range(world_size):
            order = CorpusOrder(counts, [1.0] * len(counts), size, per_step, seed)
            for step in range(first, last):
                for micro_batch in rank_share(per_step, rank, world_size):
                    assert (step, micro_batch) not in read
                    read[step, micro_batch] = order.micro_batch(step, micro_batch)
    assert len(read) == steps * per_step
    row = [(s, w) for place in sorted(read) for s, w in zip(*map(np.ndarray.tolist, read[place][:2]), strict=True)]
    everything = sorted((s, w) for s, count in enumerate(counts) for w in range(count))
    for epoch in range(2):
        assert sorted(row[epoch * total : (epoch + 1) * total]) == everything


def test_the_division_into_steps_does_not_change_the_row() -> None:
    one, four = (CorpusOrder([59], [1.0], 3, per_step, seed=5) for per_step in (1, 4))
    assert read_by(one, range(80)) == read_by(four, range(80))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 0.5, 1.0), (0.31, 7.7, 0.01)])
def test_weights_are_respected_in_every_stretch(weights: tuple[float, ...]) -> None:
    counts = (100_000, 17_001, 3999)
    order = CorpusOrder(counts, weights, 50, 1, 0)
    shares = np.array([c * w for c, w in zip(counts, weights, strict=True)])
    shares /= shares.sum()
    for first in (0, 777):
        sources = np.concatenate([order.micro_batch(step, 0).source for step in range(first, first + 400)])
        actual = np.bincount(sources, minlength=3) / len(sources)
        assert abs(actual - shares).max() < 0.001


def test_a_weight_that_is_no_integer_comes_out_even() -> None:
    counts, weights = (3, 301), (0.1, 1.2345)
    epoch = 3 * 0.1 + 301 * 1.2345
    order = CorpusOrder(counts, weights, 5000, 1, 0)
    assert order.steps_per_epoch == pytest.approx(epoch / 5000, rel=1e-5)
    read = np.concatenate([order.micro_batch(step, 0).source for step in range(round(EPOCHS * epoch / 5000))])
    for source, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        assert (read == source).sum() == pytest.approx(len(read) * count * weight / epoch, abs=1)


@settings(max_examples=sweep.examples(25, 100))
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 4)), min_size=1, max_size=3), st.integers(0, 9))
def test_a_weighted_source_is_read_evenly(sources: list[tuple[int, float]], seed: int) -> None:
    """Each time through it every window comes once, and only then any of them again."""
    counts, weights = zip(*sources, strict=True)
    order = CorpusOrder(counts, weights, 1, 1, seed)
    read = read_by(order, range(300))
    for source, count in enumerate(counts):
        windows = [(window, epoch) for s, window, epoch in read if s == source]
        for epoch in range(len(windows) // count):
            assert sorted(windows[epoch * count : (epoch + 1) * count]) == [(window, epoch) for window in range(count)]


def test_epochs_and_seeds_differ() -> None:
    def windows_of(seed: int, epoch: int) -> list[int]:
        return [w for _, w, _ in read_by(CorpusOrder([640], [1.0], 1, 1, seed), range(640 * epoch, 640 * epoch + 30))]

    assert len({tuple(windows_of(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_steps_per_epoch_and_an_epoch_that_ends_inside_a_micro_batch() -> None:
    order = CorpusOrder([10], [1.0], 4, micro_batches_per_step=2, seed=0)
    assert order.steps_per_epoch == 10 / 8
    assert [epoch for _, _, epoch in read_by(order, range(3))] == [0] * 10 + [1] * 2


def test_a_billion_windows_start_at_any_step_at_once() -> None:
    begin_time = time.perf_counter()
    order = CorpusOrder([700_000_000, 300_000_000], [1.0, 1.5], 32, 64, seed=1)
    reading = order.micro_batch(400_000, 63)
    assert time.perf_counter() - begin_time < 1
    assert len(set(zip(reading.source.tolist(), reading.window.tolist(), strict=True))) == 32


def micro_batches_from(order: TaskOrder, first: int, count: int) -> list[np.ndarray]:
    return [order.micro_batch(*divmod(number, order.micro_batches_per_step)) for number in range(first, first + count)]


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_task_micro_batches_are_full_and_epochs_end_to_end(count: int, size: int, per_step: int, seed: int) -> None:
    order = TaskOrder(count, size, per_step, seed)
    read = micro_batches_from(order, 0, -(-3 * count // size))
    assert all(len(ids) == size for ids in read)
    row = np.concatenate(read)
    for epoch in range(3):
        assert sorted(row[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert order.steps_per_epoch == count / (size * per_step)


def test_task_seeds_differ() -> None:
    assert TaskOrder(100, 10, 1, 0).micro_batch(0, 0).tolist() != TaskOrder(100, 10, 1, 1).micro_batch(0, 0).tolist()
