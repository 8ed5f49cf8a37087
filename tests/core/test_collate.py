from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.core.batch import pad, unpad
from lad_dist.core.collate import collate, pack, span_starts

ragged = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def sequences_for(lengths: list[int]) -> list[np.ndarray]:
    return [np.arange(1, n + 1) + 10 * i for i, n in enumerate(lengths)]


def zeros_like(sequences: list[np.ndarray]) -> list[np.ndarray]:
    return [np.zeros(len(sequence), dtype=np.uint8) for sequence in sequences]


@given(ragged)
def test_flat_and_padded_layouts_agree(lengths: list[int]) -> None:
    sequences = sequences_for(lengths)
    rows = span_starts(sequences)[:-1]
    batch = collate(sequences, zeros_like(sequences), rows, np.zeros(len(lengths), dtype=np.int64))
    assert batch.span_length % 16 == 0
    assert 0 <= batch.span_length - max(lengths) < 16
    assert batch.num_tokens == sum(lengths) == len(batch.input_ids)
    assert 0 <= batch.computed_tokens - batch.num_tokens < 64
    assert batch.computed_tokens % 64 == 0
    assert batch.has_padding == (min(lengths) < batch.span_length)
    padded = pad(batch.input_ids, batch)
    assert (padded != 0).equal(batch.is_token)
    for row, sequence in zip(padded, sequences, strict=True):
        assert row[: len(sequence)].tolist() == sequence.tolist()
    assert unpad(padded, batch).equal(batch.input_ids)
    assert batch.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.input_ids[batch.head_positions].tolist() == [s[0] for s in sequences]
    assert batch.visible.equal(batch.is_token[:, None])


@given(ragged, st.integers(9, 12))
def test_padded_spans(lengths: list[int], pad_to: int) -> None:
    sequences = sequences_for(lengths)
    segments = [np.ones(n, dtype=np.uint8) for n in lengths]
    rows = span_starts(sequences, pad_to)[:-1]
    batch = collate(sequences, segments, rows, np.zeros(len(rows), dtype=np.float32), pad_to, pad_id=99)
    grid = batch.input_ids.view(len(lengths), pad_to)
    for row, kind, sequence in zip(grid, batch.token_type_ids.view(-1, pad_to), sequences, strict=True):
        assert row.tolist() == sequence.tolist() + [99] * (pad_to - len(sequence))
        assert kind.tolist() == [1] * len(sequence) + [0] * (pad_to - len(sequence))
    assert batch.position_ids.tolist() == list(range(pad_to)) * len(lengths)
    assert batch.lengths.tolist() == lengths
    assert batch.num_tokens == sum(lengths)
    assert batch.span_length == pad_to
    assert batch.has_padding == (min(lengths) < pad_to)
    assert batch.head_positions.tolist() == [pad_to * i for i in range(len(lengths))]
    assert batch.padded_index.tolist() == list(range(pad_to * len(lengths)))
    assert batch.is_token.sum() == sum(lengths)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """(U, S, sequences of at least two tokens as (place, length)), which do not overlap or leave their span."""
    spans, places = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    sequences = []
    for span in range(spans):
        at = draw(st.integers(0, 1))
        while at + 2 <= places:
            length = draw(st.integers(2, places - at))
            sequences.append((span * places + at, length))
            at += length + draw(st.integers(0, 2))
    return spans, places, sequences


@given(layouts())
def test_packed_spans(layout: tuple[int, int, list[tuple[int, int]]]) -> None:
    spans, places, sequences = layout
    ids = np.arange(1, spans * places + 1).reshape(spans, places)
    starts, lengths = np.array(sequences, dtype=np.int64).reshape(-1, 2).T
    hidden = np.zeros(ids.shape, dtype=bool)
    hidden.reshape(-1)[starts] = True
    batch = pack(ids, starts, lengths, hidden, -ids)
    expected = [list(range(at + 1, at + 1 + n)) for at, n in sequences]
    bounds = batch.cu_seqlens.tolist()
    packed = [batch.input_ids[a:b].tolist() for a, b in pairwise(bounds) if b > a]
    assert packed == expected
    assert len(bounds) == 64 + 1
    assert batch.lengths.tolist() == np.diff(bounds).tolist()
    assert batch.position_ids.tolist() == [i for _, n in sequences for i in range(n)]
    assert batch.labels.tolist() == (-batch.input_ids[batch.head_positions]).tolist() == [-s[0] for s in expected]
    assert batch.num_tokens == len(batch.input_ids) == lengths.sum()
    assert batch.computed_tokens >= spans * places
    assert pad(batch.input_ids, batch)[batch.is_token].tolist() == batch.input_ids.tolist()
    assert unpad(pad(batch.input_ids, batch), batch).equal(batch.input_ids)
    assert batch.has_padding == (lengths.sum() < spans * places)
    assert batch.packed == ([at // places for at, _ in sequences] != list(range(spans)))
    owner = {place: n for n, (at, length) in enumerate(sequences) for place in range(at, at + length)}
    for span in range(spans):
        for query in range(places):
            query_sequence = owner.get(span * places + query)
            for at in range(places):
                key_sequence = owner.get(span * places + at)
                if query_sequence is not None:
                    visible = batch.visible[span, min(query, batch.visible.shape[1] - 1), at]
                    assert bool(visible) == (key_sequence == query_sequence)
    assert batch.visible.any(dim=-1).all()


@pytest.mark.parametrize(("count", "rounded"), [(0, 64), (1, 64), (20, 64), (64, 64), (65, 128)])
def test_the_number_of_packed_sequences_is_rounded_up_to_a_multiple_of_64(count: int, rounded: int) -> None:
    ids = np.ones((4, 128), dtype=np.int64)
    starts, lengths = np.arange(count) * 4, np.full(count, 4)
    batch = pack(ids, starts, lengths, ids == 0, ids)
    assert batch.num_sequences == count
    assert batch.lengths.tolist() == [4] * count + [0] * (rounded - count)
    assert batch.cu_seqlens.tolist() == [*range(0, 4 * count, 4), *[4 * count] * (rounded - count + 1)]


def test_types() -> None:
    sequences = [np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)]
    labels = np.array([0.5, 1.5], dtype=np.float32)
    task = collate(sequences, zeros_like(sequences), np.array([0, 2]), labels)
    assert task.labels.dtype == torch.float32
    ids = np.array([[1, 2, 3]])
    corpus = pack(ids, np.array([0]), np.array([3]), ids == 2, ids)
    assert corpus.labels.dtype == torch.int64
    for batch in (task, corpus):
        assert batch.cu_seqlens.dtype == batch.sequence_ids.dtype == torch.int32
        integers = (
            batch.input_ids,
            batch.token_type_ids,
            batch.position_ids,
            batch.lengths,
            batch.padded_index,
            batch.head_positions,
        )
        assert {tensor.dtype for tensor in integers} == {torch.int64}
        assert type(batch.span_length) is type(batch.num_tokens) is type(batch.computed_tokens) is int
        assert type(batch.has_padding) is type(batch.packed) is bool
