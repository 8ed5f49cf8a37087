"""Flat batches: sequences laid end to end, without padding between embedding and loss.

B sequences, N tokens of all sequences, U spans of S places, R tokens that the head reads.
"""

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

Head = Literal["none", "mlm", "classification", "multilabel", "regression", "tagging", "question_answering"]
TEXT_HEADS = ("classification", "multilabel", "regression")  # those that read the first token of a text


class Counts(NamedTuple):
    """How much there is of each unit that losses are means over: in a batch, or on the average of several."""

    rows: float  # R
    labelled_rows: float
    tokens: float  # real ones
    padded_tokens: float  # N: more only where `pad_to` pads
    sequences: float  # those that are not empty
    pairs: float  # of tokens of one sequence, in both orders and each with itself


class Batch(NamedTuple):
    """Sequences end to end.

    Where attention cannot work on flat tokens, it works on U spans of S places. A span holds one sequence of a task, or
    the sequences of one window of a corpus. `lengths` counts the tokens that are attended to: fewer than the sequence
    takes up only where `pad_to` pads.
    """

    input_ids: Tensor  # [N]
    token_type_ids: Tensor  # [N]
    position_ids: Tensor  # [N], from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1], where the sequences begin and end; of a corpus, the last sequences are empty
    lengths: Tensor  # [B]
    padded_index: Tensor  # [N], place of each token in [U * S]
    sequence_ids: Tensor  # [U, S], the sequence that each place belongs to; -1 where there is nothing to attend to
    head_positions: Tensor  # [R], tokens that the head reads: masked ones (MLM), first ones of sequences or words
    labels: Tensor  # [R], the targets of the head; [R, V] of several labels; [R, 2] where an answer begins and ends
    has_padding: bool  # whether any place has nothing to attend to
    packed: bool  # whether any span holds more or less than one sequence
    num_tokens: int  # sum of lengths: real tokens
    num_sequences: int  # sequences that are not empty: the first ones
    num_pairs: int  # sum of squared lengths: pairs of real tokens of one sequence
    computed_tokens: int  # tokens that a model computes on: N, rounded up so that shapes recur
    num_unlabelled: int = 0  # rows without a label: see labels.py
    row_weights: Tensor | None = None  # as labels, what each row or label counts in the loss against them; None: 1
    step_counts: Counts | None = None  # mean over all micro-batches of the step; None: the batch is no part of one

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on a device."""
        non_blocking = torch.device(device).type != "cpu"  # a CPU would read what has not arrived
        tensors = {
            name: x.to(device, non_blocking=non_blocking) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**tensors)  # type: ignore[arg-type]

    @property
    def counts(self) -> Counts:
        """What the batch holds."""
        rows = len(self.head_positions)
        return Counts(
            rows=rows,
            labelled_rows=rows - self.num_unlabelled,
            tokens=self.num_tokens,
            padded_tokens=len(self.input_ids),
            sequences=self.num_sequences,
            pairs=self.num_pairs,
        )

    @property
    def divisors(self) -> Counts:
        """What losses divide sums over the batch by, so that the mean over a step's micro-batches is that of the step.

        A micro-batch that holds more than others then weighs more. Alone, a batch gets the means over what it holds.
        """
        return self.counts if self.step_counts is None else self.step_counts

    @property
    def span_length(self) -> int:
        """The places of a span, S."""
        return self.sequence_ids.shape[1]

    @property
    def is_token(self) -> Tensor:
        """The places of the padded layout that hold real tokens, bool [U, S]."""
        return self.sequence_ids >= 0

    @property
    def visible(self) -> Tensor:
        """The places that a place attends to, bool [U, S, S], or [U, 1, S] where all places of a span see the same.

        A place without a token attends to other such places, so that no softmax is over nothing.
        """
        if not self.packed:
            return self.is_token[:, None, :]
        return self.sequence_ids[:, :, None] == self.sequence_ids[:, None, :]


def pad(x: Tensor, batch: Batch) -> Tensor:
    """Return [N, ...] as [U, S, ...], with zeros at places without a token."""
    spans, places = batch.sequence_ids.shape
    if len(x) == spans * places:
        return x.view(spans, places, *x.shape[1:])
    padded = x.new_zeros(spans * places, *x.shape[1:])
    return padded.index_copy(0, batch.padded_index, x).view(spans, places, *x.shape[1:])


def unpad(x: Tensor, batch: Batch) -> Tensor:
    """Return [U, S, ...] as [N, ...]: the inverse of `pad`."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat if len(flat) == len(batch.padded_index) else flat.index_select(0, batch.padded_index)


def one_span_per_sequence(batch: Batch) -> Batch:
    """Return the same tokens with one span of S places for each sequence that is not empty."""
    if not batch.packed:
        return batch
    places = torch.arange(batch.span_length, device=batch.lengths.device)
    numbers = torch.arange(batch.num_sequences, dtype=batch.sequence_ids.dtype, device=batch.lengths.device)[:, None]
    sequence_ids = torch.where(places < batch.lengths[: batch.num_sequences, None], numbers, -1)
    sequence_of_token = batch.sequence_ids.flatten().index_select(0, batch.padded_index).long()
    return batch._replace(
        padded_index=sequence_of_token * batch.span_length + batch.position_ids,
        sequence_ids=sequence_ids,
        has_padding=True,
        packed=False,
    )
