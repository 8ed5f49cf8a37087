"""`flat.Batch` out of numpy arrays.

    collate   examples of a task: a span each
    pack      windows of a corpus: a span each, in which the sequences lie end to end

B sequences, U spans, S tokens of a span, N tokens of the batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lad_dist.core.batch import Batch

# S and the tokens that a model computes on are rounded up to multiples, so that shapes recur: for every new one a CPU's
# bf16 kernels are generated and kept, and a GPU's tensor cores want multiples.
SPAN_MULTIPLE, MULTIPLE = 16, 64


def span_starts(sequences: Sequence[np.ndarray], pad_to: int | None = None) -> np.ndarray:
    """int64 [B + 1]: where each sequence's span begins in the flat batch, and where the last one ends."""
    spans = [len(sequence) if pad_to is None else pad_to for sequence in sequences]
    return np.concatenate([[0], np.cumsum(spans)])


def collate(
    sequences: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    rows: np.ndarray,
    labels: np.ndarray,
    pad_to: int | None = None,
    pad_id: int = 0,
) -> Batch:
    """The sequences (int [length] each, special tokens included) as one flat batch.

    segments: their token type ids. rows: int [R], places in the flat batch that the head reads (see `span_starts`);
    labels: int64 or float32 [R]. With pad_to, at least the longest length, every span has pad_to tokens, the last ones
    pad_id."""
    starts = span_starts(sequences, pad_to)
    lengths = np.array([len(sequence) for sequence in sequences])
    spans = np.diff(starts)
    assert (lengths <= spans).all()
    longest = pad_to if pad_to is not None else _round_up(int(spans.max()), SPAN_MULTIPLE)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], spans)
    sequence = np.where(np.arange(longest) < lengths[:, None], np.arange(len(lengths))[:, None], -1)
    return Batch(
        input_ids=torch.from_numpy(_lay_out(sequences, starts, pad_id)),
        token_type_ids=torch.from_numpy(_lay_out(segments, starts, 0)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        lengths=torch.from_numpy(lengths),
        padded_index=torch.from_numpy(np.repeat(np.arange(len(lengths)) * longest, spans) + positions),
        sequence_ids=torch.from_numpy(sequence.astype(np.int32)),
        head_positions=torch.from_numpy(np.asarray(rows)),
        labels=torch.from_numpy(np.asarray(labels)),
        has_padding=bool((lengths < longest).any()),
        packed=False,
        num_tokens=int(lengths.sum()),
        num_sequences=len(lengths),
        computed_tokens=_round_up(int(starts[-1]), MULTIPLE),
    )


def pack(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, hidden: np.ndarray, labels: np.ndarray, shortest: int
) -> Batch:
    """Spans of sequences as one flat batch, whose shapes depend on [U, S] alone, but for N and where less can be hidden
    than was asked for.

    ids: int64 [U, S]; starts, lengths: int64 [B], where each sequence begins in the U * S places and how long it is;
    hidden: bool [U, S], tokens that the head reads; labels: int64 [U, S], what it should say there; shortest: tokens of
    the shortest sequence that can occur. `cu_seqlens` and `lengths` end in empty sequences, as many as could be."""
    count = int(lengths.sum())
    cu_seqlens = np.full(ids.size // shortest + 1, count, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(lengths) + 1] = np.cumsum(lengths)
    first = np.repeat(cu_seqlens[: len(lengths)], lengths)
    positions = np.arange(count) - first
    index = np.repeat(starts, lengths) + positions
    sequence = np.full(ids.size, -1, dtype=np.int32)
    sequence[index] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    rows = np.flatnonzero(hidden.ravel()[index])
    return Batch(
        input_ids=torch.from_numpy(ids.ravel()[index]),
        token_type_ids=torch.zeros(count, dtype=torch.int64),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=torch.from_numpy(np.diff(cu_seqlens).astype(np.int64)),
        padded_index=torch.from_numpy(index),
        sequence_ids=torch.from_numpy(sequence.reshape(ids.shape)),
        head_positions=torch.from_numpy(rows),
        labels=torch.from_numpy(labels.ravel()[index[rows]]),
        has_padding=count < ids.size,
        packed=bool((np.bincount(starts // ids.shape[1], minlength=len(ids)) != 1).any()),
        num_tokens=count,
        num_sequences=len(lengths),
        computed_tokens=_round_up(ids.size, MULTIPLE),
    )


def _lay_out(parts: Sequence[np.ndarray], starts: np.ndarray, filler: int) -> np.ndarray:
    flat = np.full(starts[-1], filler, dtype=np.int64)
    for start, part in zip(starts[:-1].tolist(), parts, strict=True):
        flat[start : start + len(part)] = part
    return flat


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
