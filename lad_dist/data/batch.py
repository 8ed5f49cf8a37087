"""Sequences laid end to end: `flat.Batch` out of numpy arrays."""

from collections.abc import Sequence

import numpy as np
import torch

from lad_dist.flat import Batch

MULTIPLE = 16  # S is rounded up to it, so that the shapes of padded attention recur; `models.MULTIPLE` says why


def span_starts(sequences: Sequence[np.ndarray], pad_to: int | None = None) -> np.ndarray:
    """int64 [B + 1]: where each sequence's span begins in the flat batch, and where the last one ends."""
    spans = [len(sequence) if pad_to is None else pad_to for sequence in sequences]
    return np.concatenate([[0], np.cumsum(spans)])


def collate(
    sequences: Sequence[np.ndarray],
    segments: Sequence[np.ndarray] | None,
    rows: np.ndarray,
    labels: np.ndarray,
    pad_to: int | None = None,
    pad_id: int = 0,
) -> Batch:
    """The sequences (int [length] each, special tokens included) as one flat batch.

    segments: their token type ids, zeros when None. rows: int [R], places in the flat batch that the head reads (see
    `span_starts`); labels: int64 or float32 [R]. With pad_to, at least the longest length, every span has pad_to
    tokens, the last ones pad_id."""
    starts = span_starts(sequences, pad_to)
    lengths = np.array([len(sequence) for sequence in sequences])
    spans = np.diff(starts)
    assert (lengths <= spans).all()
    longest = int(spans.max()) if pad_to is not None else -(-int(spans.max()) // MULTIPLE) * MULTIPLE
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], spans)
    return Batch(
        input_ids=torch.from_numpy(_lay_out(sequences, starts, pad_id)),
        token_type_ids=torch.from_numpy(_lay_out(segments if segments is not None else [], starts, 0)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        lengths=torch.from_numpy(lengths),
        padded_index=torch.from_numpy(np.repeat(np.arange(len(lengths)) * longest, spans) + positions),
        rows=torch.from_numpy(np.asarray(rows)),
        labels=torch.from_numpy(np.asarray(labels)),
        longest=longest,
        ragged=bool((lengths < longest).any()),
        tokens=int(lengths.sum()),
    )


def _lay_out(parts: Sequence[np.ndarray], starts: np.ndarray, filler: int) -> np.ndarray:
    flat = np.full(starts[-1], filler, dtype=np.int64)
    for start, part in zip(starts.tolist(), parts, strict=False):  # starts has the end as well; no parts: all filler
        flat[start : start + len(part)] = part
    return flat
