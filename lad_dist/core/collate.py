"""Batches out of numpy arrays.

B sequences, U spans of S places, N tokens of the batch, R tokens that the head reads.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lad_dist.core.batch import Batch
from lad_dist.core.labels import is_unlabelled

# S, the tokens that a model computes on and the sequences of a corpus are rounded up to multiples. So shapes recur:
# a CPU generates and keeps bf16 kernels for every new shape, a GPU's tensor cores want multiples, and its allocator
# reuses blocks of one size. Much larger padding costs memory: the attention's backward has buffers for each sequence.
SPAN_MULTIPLE, TOKEN_MULTIPLE, SEQUENCE_MULTIPLE = 16, 64, 64


def span_starts(sequences: Sequence[np.ndarray], pad_to: int | None = None) -> np.ndarray:
    """Return where each sequence's span begins in the flat batch, and where the last one ends, int64 [B + 1]."""
    spans = [len(sequence) if pad_to is None else pad_to for sequence in sequences]
    return np.concatenate([[0], np.cumsum(spans)])


def collate(
    sequences: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    head_positions: np.ndarray,
    labels: np.ndarray,
    pad_to: int | None = None,
    pad_id: int = 0,
) -> Batch:
    """Return examples of a task as one flat batch, a span for each.

    Args:
        sequences: Token ids of each sequence, int [length], special tokens included.
        segments: Token type ids of each sequence, int [length].
        head_positions: Places in the flat batch that the head reads, int [R]; see `span_starts`.
        labels: The targets of the head, int64 or float32 [R], or float32 [R, V]; UNLABELLED or NaN in rows without any.
        pad_to: The tokens of every span, at least the longest length; None for spans without padding.
        pad_id: The token id of padding.
    """
    starts = span_starts(sequences, pad_to)
    lengths = np.array([len(sequence) for sequence in sequences])
    spans = np.diff(starts)
    assert (lengths <= spans).all()
    span_length = pad_to if pad_to is not None else _round_up(int(spans.max()), SPAN_MULTIPLE)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], spans)
    labels = np.asarray(labels)
    sequence_ids = np.where(np.arange(span_length) < lengths[:, None], np.arange(len(lengths))[:, None], -1)
    return Batch(
        input_ids=torch.from_numpy(_lay_out(sequences, starts, pad_id)),
        token_type_ids=torch.from_numpy(_lay_out(segments, starts, 0)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        lengths=torch.from_numpy(lengths),
        padded_index=torch.from_numpy(np.repeat(np.arange(len(lengths)) * span_length, spans) + positions),
        sequence_ids=torch.from_numpy(sequence_ids.astype(np.int32)),
        head_positions=torch.from_numpy(np.asarray(head_positions)),
        labels=torch.from_numpy(labels),
        has_padding=bool((lengths < span_length).any()),
        packed=False,
        num_tokens=int(lengths.sum()),
        num_sequences=len(lengths),
        num_pairs=int(np.square(lengths).sum()),
        computed_tokens=_round_up(int(starts[-1]), TOKEN_MULTIPLE),
        num_unlabelled=int(is_unlabelled(labels).sum()),
    )


def pack(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, is_masked: np.ndarray, labels: np.ndarray) -> Batch:
    """Return windows of a corpus as one flat batch: a span for each, in which the sequences lie end to end.

    Empty sequences at the end of `lengths` and `cu_seqlens` make their number a multiple of SEQUENCE_MULTIPLE.

    Args:
        ids: Token ids, int64 [U, S].
        starts: Where each sequence begins in the U * S places, int64 [B].
        lengths: The tokens of each sequence, int64 [B].
        is_masked: The tokens that the head reads, bool [U, S].
        labels: The targets of the head, int64 [U, S].
    """
    count = int(lengths.sum())
    cu_seqlens = np.full(_round_up(max(1, len(lengths)), SEQUENCE_MULTIPLE) + 1, count, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(lengths) + 1] = np.cumsum(lengths)
    first = np.repeat(cu_seqlens[: len(lengths)], lengths)
    positions = np.arange(count) - first
    index = np.repeat(starts, lengths) + positions
    sequence_ids = np.full(ids.size, -1, dtype=np.int32)
    sequence_ids[index] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    head_positions = np.flatnonzero(is_masked.ravel()[index])
    return Batch(
        input_ids=torch.from_numpy(ids.ravel()[index]),
        token_type_ids=torch.zeros(count, dtype=torch.int64),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=torch.from_numpy(np.diff(cu_seqlens).astype(np.int64)),
        padded_index=torch.from_numpy(index),
        sequence_ids=torch.from_numpy(sequence_ids.reshape(ids.shape)),
        head_positions=torch.from_numpy(head_positions),
        labels=torch.from_numpy(labels.ravel()[index[head_positions]]),
        has_padding=count < ids.size,
        packed=bool((np.bincount(starts // ids.shape[1], minlength=len(ids)) != 1).any()),
        num_tokens=count,
        num_sequences=len(lengths),
        num_pairs=int(np.square(lengths).sum()),
        computed_tokens=_round_up(ids.size, TOKEN_MULTIPLE),
    )


def _lay_out(sequences: Sequence[np.ndarray], starts: np.ndarray, filler: int) -> np.ndarray:
    """Return the sequences in one array, int64 [N], each at its start, and the filler between them."""
    flat = np.full(starts[-1], filler, dtype=np.int64)
    for start, sequence in zip(starts[:-1].tolist(), sequences, strict=True):
        flat[start : start + len(sequence)] = sequence
    return flat


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
