"""What passes between data, models and objectives: flat batches in, traces out.

    Batch   sequences laid end to end, without padding between embedding and loss
    Shape   the sizes of a model that an objective needs to know
    Needs   which parts of a forward an objective wants to see
    Trace   what one forward left behind, and only what was needed
    pad, unpad   flat [N, ...] to [U, S, ...] and back, for what must know where sequences end
    apart   the same batch with a span for each sequence, for what knows no sequences inside a span

B sequences, N tokens of all of them, U spans of S places, R rows that the head reads, D width, H heads, V outputs of
the head.
"""

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

Head = Literal["none", "mlm", "classification", "regression", "tagging", "question_answering"]


class Batch(NamedTuple):
    """Sequences end to end. Where attention cannot work on flat tokens, it works on U spans of S places: a span holds
    one sequence of a task, or those of one window of a corpus. `lengths` are the attended tokens of each sequence:
    shorter than what it takes up only where `pad_to` pads."""

    input_ids: Tensor  # [N]
    token_type_ids: Tensor  # [N]
    position_ids: Tensor  # [N], from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1], where the sequences begin and end
    lengths: Tensor  # [B]
    padded_index: Tensor  # [N], place of each token in [U * S]
    sequence_ids: Tensor  # [U, S], the sequence that each place belongs to; -1 where there is nothing to attend to
    head_positions: (
        Tensor  # [R], tokens that the head reads: masked ones for MLM, first ones of sequences or words for tasks
    )
    labels: Tensor  # [R], what the head should say there; [R, 2] where an answer begins and ends
    has_padding: bool  # whether there is any place with nothing to attend to
    packed: bool  # whether any span holds more or less than one sequence
    num_tokens: int  # sum of lengths: real tokens
    num_sequences: int  # sequences that are not empty: the first ones
    computed_tokens: int  # N or a little more: so many tokens a model computes on, so that shapes recur

    def to(self, device: torch.device | str) -> Self:
        ahead = torch.device(device).type != "cpu"  # a host would read what has not arrived
        tensors = {
            name: x.to(device, non_blocking=ahead) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**tensors)  # type: ignore[arg-type]

    @property
    def span_length(self) -> int:
        """S."""
        return self.sequence_ids.shape[1]

    @property
    def is_token(self) -> Tensor:
        """Boolean [U, S]: which places of the padded layout are real tokens."""
        return self.sequence_ids >= 0

    @property
    def visible(self) -> Tensor:
        """Boolean [U, S, S], or [U, 1, S] where that says it all: which places a place attends to. One without a token
        attends to its like, so that no softmax is over nothing."""
        if not self.packed:
            return self.is_token[:, None, :]
        return self.sequence_ids[:, :, None] == self.sequence_ids[:, None, :]


def pad(x: Tensor, batch: Batch) -> Tensor:
    """[N, ...] to [U, S, ...], zeros in the gaps."""
    spans, places = batch.sequence_ids.shape
    if len(x) == spans * places:
        return x.view(spans, places, *x.shape[1:])
    padded = x.new_zeros(spans * places, *x.shape[1:])
    return padded.index_copy(0, batch.padded_index, x).view(spans, places, *x.shape[1:])


def unpad(x: Tensor, batch: Batch) -> Tensor:
    """[U, S, ...] to [N, ...]: the inverse of `pad`."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat if len(flat) == len(batch.padded_index) else flat.index_select(0, batch.padded_index)


def one_span_per_sequence(batch: Batch) -> Batch:
    """The same tokens with one span of S places for each sequence that is not empty."""
    if not batch.packed:
        return batch
    places = torch.arange(batch.span_length, device=batch.lengths.device)
    number = torch.arange(batch.num_sequences, dtype=batch.sequence_ids.dtype, device=batch.lengths.device)[:, None]
    sequence = torch.where(places < batch.lengths[: batch.num_sequences, None], number, -1)
    mine = batch.sequence_ids.flatten().index_select(0, batch.padded_index).long()
    return batch._replace(
        padded_index=mine * batch.span_length + batch.position_ids,
        sequence_ids=sequence,
        has_padding=True,
        packed=False,
    )
