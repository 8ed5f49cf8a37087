import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.data.batch import collate, span_starts
from lad_dist.flat import pad, unpad

ragged = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def sequences_for(lengths: list[int]) -> list[np.ndarray]:
    return [np.arange(1, n + 1) + 10 * i for i, n in enumerate(lengths)]


@given(ragged)
def test_flat_and_padded_layouts_agree(lengths: list[int]) -> None:
    sequences = sequences_for(lengths)
    batch = collate(sequences, None, span_starts(sequences)[:-1], np.zeros(len(lengths), dtype=np.int64))
    assert batch.longest % 16 == 0
    assert 0 <= batch.longest - max(lengths) < 16
    assert batch.tokens == sum(lengths) == len(batch.input_ids)
    assert batch.ragged == (min(lengths) < batch.longest)
    padded = pad(batch.input_ids, batch)
    assert (padded != 0).equal(batch.attended)
    for row, sequence in zip(padded, sequences, strict=True):
        assert row[: len(sequence)].tolist() == sequence.tolist()
    assert unpad(padded, batch).equal(batch.input_ids)
    assert batch.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.input_ids[batch.rows].tolist() == [s[0] for s in sequences]


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
    assert batch.tokens == sum(lengths)
    assert batch.longest == pad_to
    assert batch.ragged == (min(lengths) < pad_to)
    assert batch.rows.tolist() == [pad_to * i for i in range(len(lengths))]
    assert batch.padded_index.tolist() == list(range(pad_to * len(lengths)))
    assert batch.attended.sum() == sum(lengths)


def test_types() -> None:
    sequences = [np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)]
    batch = collate(sequences, None, np.array([0, 2]), np.array([0.5, 1.5], dtype=np.float32))
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.labels.dtype == torch.float32
    integers = (
        batch.input_ids,
        batch.token_type_ids,
        batch.position_ids,
        batch.lengths,
        batch.padded_index,
        batch.rows,
    )
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert type(batch.longest) is type(batch.tokens) is int
    assert type(batch.ragged) is bool
