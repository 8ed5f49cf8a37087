import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.data.order import CorpusOrder, TaskOrder, random_source, sequences_of

lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda longest: st.tuples(
        st.lists(st.integers(1, longest), min_size=1, max_size=200).map(np.array), st.integers(longest, 4 * longest)
    )
)


def slots_from(order: CorpusOrder | TaskOrder, first: int, count: int) -> list[np.ndarray]:
    return [order.slot(*divmod(number, order.slots)) for number in range(first, first + count)]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 20))
def test_pieces_cover_every_document_once(lengths: list[int], room: int) -> None:
    document, begin, length = sequences_of(np.array(lengths, dtype=np.int64), room)
    tokens = [(d, t) for d, b, n in zip(document, begin, length, strict=True) for t in range(int(b), int(b) + int(n))]
    assert tokens == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    assert all(1 <= n <= room for n in length)
    assert len(length) == sum(-(-n // room) for n in lengths)


@given(lengths_and_capacity, st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 3))
def test_each_epoch_of_a_corpus_has_every_sequence_once_in_slots_that_fit(
    corpus: tuple[np.ndarray, int], slots: int, seed: int, epoch: int
) -> None:
    lengths, capacity = corpus
    order = CorpusOrder(lengths, capacity, slots, seed)
    read = slots_from(order, epoch * order.slots_per_epoch, order.slots_per_epoch)
    assert sorted(np.concatenate(read)) == list(range(len(lengths)))
    assert all(0 < lengths[ids].sum() <= capacity for ids in read)
    assert order.steps_per_epoch == order.slots_per_epoch / slots


@given(lengths_and_capacity, st.integers(1, 5), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_a_corpus_slot_does_not_depend_on_what_was_asked_before(
    corpus: tuple[np.ndarray, int], slots: int, seed: int, chance
) -> None:
    order = CorpusOrder(*corpus, slots, seed)
    count = 2 * order.slots_per_epoch + 3
    in_turn = slots_from(order, 0, count)
    asked = list(range(count))
    chance.shuffle(asked)
    for number in asked:
        assert order.slot(*divmod(number, slots)).tolist() == in_turn[number].tolist()
    last = count - 1
    assert CorpusOrder(*corpus, slots, seed).slot(*divmod(last, slots)).tolist() == in_turn[last].tolist()


def test_the_split_of_slots_into_steps_does_not_change_their_row() -> None:
    lengths = np.arange(1, 60)
    one, four = (CorpusOrder(lengths, 64, slots, seed=5) for slots in (1, 4))
    for number in range(80):
        assert one.slot(number, 0).tolist() == four.slot(*divmod(number, 4)).tolist()


def test_corpus_epochs_and_seeds_differ() -> None:
    lengths = np.tile(np.arange(1, 33), 20)
    order = CorpusOrder(lengths, 128, 1, seed=0)
    first, second = (np.concatenate(slots_from(order, e * order.slots_per_epoch, 5)).tolist() for e in (0, 1))
    other = np.concatenate(slots_from(CorpusOrder(lengths, 128, 1, seed=1), 0, 5)).tolist()
    assert first != second
    assert first != other
    assert order.epoch(order.slots_per_epoch - 1) == 0
    assert order.epoch(order.slots_per_epoch) == 1


def test_an_epoch_ends_inside_a_step() -> None:
    order = CorpusOrder(np.full(10, 8), 8, slots=4, seed=0)
    assert order.steps_per_epoch == 2.5
    assert [order.epoch(2, slot) for slot in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("longest", [128, 512])
def test_slots_are_full_and_quickly_planned(longest: int) -> None:
    """A corpus of a million sequences, 60 % of them full, in slots of 4096 tokens."""
    random = np.random.default_rng(0)
    lengths = np.where(random.random(1_000_000) < 0.6, longest, random.integers(3, longest + 1, 1_000_000))
    began = time.perf_counter()
    order = CorpusOrder(lengths, 4096, 8, seed=0)
    order.slot(0, 0)
    assert time.perf_counter() - began < 10
    assert order.fill > 0.99
    assert order.fill == lengths.sum() / (4096 * order.slots_per_epoch)


def test_slots_mix_long_and_short_sequences() -> None:
    random = np.random.default_rng(0)
    lengths = np.where(random.random(50_000) < 0.5, 128, random.integers(3, 128, 50_000))
    order = CorpusOrder(lengths, 4096, 1, seed=0)
    share = np.array([(lengths[ids] == 128).mean() for ids in slots_from(order, 0, order.slots_per_epoch)])
    expected_spread = np.sqrt(0.25 / 43)  # of draws by chance: 43 sequences in a slot
    assert abs(share.mean() - 0.5) < 0.02
    assert share.std() < 2 * expected_spread


def test_sequences_of_one_length_meet_others_in_every_epoch() -> None:
    order = CorpusOrder(np.full(400, 16), 64, 1, seed=0)
    company = [
        {frozenset(ids.tolist()) for ids in slots_from(order, e * order.slots_per_epoch, order.slots_per_epoch)}
        for e in (0, 1)
    ]
    assert len(company[0] & company[1]) < 5


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_task_slots_are_full_and_epochs_end_to_end(count: int, size: int, slots: int, seed: int) -> None:
    order = TaskOrder(count, size, slots, seed)
    read = slots_from(order, 0, -(-3 * count // size))
    assert all(len(ids) == size for ids in read)
    row = np.concatenate(read)
    for epoch in range(3):
        assert sorted(row[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert order.steps_per_epoch == count / (size * slots)


@settings(max_examples=30)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_task_slot_does_not_depend_on_what_was_asked_before(count: int, size: int, slots: int, chance) -> None:
    order = TaskOrder(count, size, slots, 3)
    in_turn = slots_from(order, 0, 20)
    asked = list(range(20))
    chance.shuffle(asked)
    for number in asked:
        assert order.slot(*divmod(number, slots)).tolist() == in_turn[number].tolist()


def test_task_seeds_differ() -> None:
    assert TaskOrder(100, 10, 1, 0).slot(0, 0).tolist() != TaskOrder(100, 10, 1, 1).slot(0, 0).tolist()


def test_random_sources_share_no_stream() -> None:
    keys = [(p, s, e, i) for p in (0, 1, 2) for s in (0, 1) for e in (0, 1, 2) for i in (0, 1, 2)]
    draws = {tuple(random_source(*key).integers(2**63, size=4).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert len({number for draw in draws for number in draw}) == 4 * len(keys)
