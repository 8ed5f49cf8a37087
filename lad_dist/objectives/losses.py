"""Losses as plain functions of tensors, in fp32 whatever the model computes in, and means over what is real.

B sequences, N tokens, R rows that the head read, D width, H heads, V outputs, U spans of S places.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lad_dist.core.batch import Batch, Head, one_span_per_sequence, pad, unpad

Pair = tuple[Tensor, Tensor]

CHUNK = 1 << 24  # elements: what a loss over the vocabulary may hold at a time beside the logits themselves


def hard(logits: Tensor, batch: Batch, head: Head) -> Tensor:
    """Against the batch's labels: cross-entropy of logits [R, V], mean over rows; squared error of [R, 1] for
    regression. For question answering the cross-entropy of the rows of each sequence where the answer begins, and of
    those where it ends, mean over both and over sequences (Devlin et al., 2019, section 4.2)."""
    if head == "regression":
        return F.mse_loss(logits.float().squeeze(-1), batch.labels.float())
    if head == "question_answering":
        return -(batch.labels * over_rows(logits, batch)).sum() / (2 * batch.num_sequences)
    sum_of = partial(F.cross_entropy, reduction="sum")
    return _by_rows(lambda x, y: sum_of(x.float(), y), logits, batch.labels) / len(batch.labels)


def soft(student: Tensor, teacher: Tensor, batch: Batch, head: Head, temperature: float) -> Tensor:
    """Against the teacher's logits [R, V]: T² KL(teacher || student) of the tempered distributions, mean over rows
    (Hinton et al., 2015); squared error for regression. For question answering the distributions are over the rows of
    a sequence, one for where the answer begins and one for where it ends, and the mean over both and over sequences."""
    if head == "regression":
        return F.mse_loss(student.float(), teacher.float())
    if head == "question_answering":
        s, t = (over_rows(x.float() / temperature, batch) for x in (student, teacher))
        return temperature**2 * F.kl_div(s, t, log_target=True, reduction="sum") / (2 * batch.num_sequences)

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        s, t = (F.log_softmax(x.float() / temperature, dim=-1) for x in (s, t))
        return F.kl_div(s, t, log_target=True, reduction="sum")

    return temperature**2 * _by_rows(divergence, student, teacher) / len(student)


def over_rows(logits: Tensor, batch: Batch) -> Tensor:
    """Each column of [R, V] as the logarithms of a distribution over the rows of the same sequence, fp32 [R, V]."""
    batch = one_span_per_sequence(batch)
    places = batch.padded_index.index_select(0, batch.head_positions)
    spans = logits.new_full((batch.sequence_ids.numel(), logits.shape[1]), -torch.inf, dtype=torch.float32)
    spans = spans.index_copy(0, places, logits.float()).view(*batch.sequence_ids.shape, -1)
    return F.log_softmax(spans, dim=1).flatten(0, 1).index_select(0, places)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of [N, D] and [N, D], as [N] (DistilBERT, Sanh et al., 2019)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def squared(student: Tensor, target: Tensor) -> Tensor:
    """Squared error of [N, D] and [N, D], mean over the width, as [N]."""
    return (student.float() - target.float()).square().mean(dim=-1)


def over_tokens(values: Tensor, batch: Batch) -> Tensor:
    """Mean of values [N] over the real tokens."""
    if batch.num_tokens == len(values):
        return values.mean()
    return values.masked_fill(~unpad(batch.is_token, batch), 0.0).sum() / batch.num_tokens


def first_tokens(x: Tensor, batch: Batch) -> Tensor:
    """[N, ...] to [B, ...]: the first token of each sequence, and any for an empty one (see `over_sequences`)."""
    return x.index_select(0, batch.cu_seqlens[:-1].clamp(max=len(x) - 1))


def over_sequences(values: Tensor, batch: Batch) -> Tensor:
    """Mean of values [B] over the sequences that are not empty."""
    there = batch.lengths > 0
    return values.masked_fill(~there, 0.0).sum() / there.sum()


def relation(student: Pair, teacher: Pair, batch: Batch, heads: int) -> Tensor:
    """KL between the teacher's and the student's relations softmax(X Yᵀ / √d) of X, Y [N, *], split into `heads`; mean
    over heads and tokens. With queries and keys these are attention's distributions (MiniLM, Wang et al., 2020), with
    X = Y self-relations (MiniLMv2, Wang et al., 2021, equations 2 to 4). Widths may differ."""

    def divergence(*xs: Tensor) -> Tensor:
        s, t = (_log_relation(x, y, batch, heads) for x, y in (xs[:2], xs[2:]))
        pairs = batch.is_token[:, None, :, None] & batch.visible[:, None]
        return (t.exp() * (t - s)).masked_fill(~pairs, 0.0).sum() / (heads * batch.num_tokens)

    return recomputed(divergence, *student, *teacher)


class Scores(NamedTuple):
    """Attention scores Q Kᵀ / √d of a layer before their softmax, not multiplied out. In fp32, 0 where there is no
    token; d may differ between models."""

    queries: Tensor  # [B, H, S, d], divided by √d
    keys: Tensor  # [B, H, S, d]
    square: Tensor  # the sum of all squared scores


def scores(pair: Pair, batch: Batch, heads: int) -> Scores:
    """Of queries and keys [N, *], split into `heads`."""
    batch = one_span_per_sequence(batch)
    padding = None if batch.num_tokens == len(pair[0]) else ~batch.is_token[:, None, :, None]
    queries, keys = (_by_heads(x, batch, heads) for x in pair)
    if padding is not None:
        queries, keys = queries.masked_fill(padding, 0.0), keys.masked_fill(padding, 0.0)
    queries = queries / queries.shape[-1] ** 0.5
    return Scores(queries, keys, _products(queries, keys, queries, keys))


def score_error(student: Scores, teacher: Scores, batch: Batch) -> Tensor:
    """Squared error between attention scores, mean over heads and over pairs of tokens of one sequence (TinyBERT, Jiao
    et al., 2020, equation 7): ‖A - B‖² = ‖A‖² - 2 ⟨A, B⟩ + ‖B‖²."""
    between = _products(student.queries, student.keys, teacher.queries, teacher.keys)
    pairs = batch.lengths.long().square().sum()
    return (student.square - 2 * between + teacher.square) / (student.keys.shape[1] * pairs)


def _products(queries: Tensor, keys: Tensor, others_queries: Tensor, others_keys: Tensor) -> Tensor:
    """⟨Q Kᵀ, P Lᵀ⟩ = ⟨Qᵀ P, Kᵀ L⟩, summed over sequences and heads: with S tokens it takes S d² instead of S² d, and
    nothing is [S, S]."""
    return ((queries.mT @ others_queries) * (keys.mT @ others_keys)).sum()


def _by_heads(x: Tensor, batch: Batch, heads: int) -> Tensor:
    """[N, *] to [U, H, S, d] in fp32. Laid out by heads once, as each product would otherwise do it anew."""
    return pad(x.reshape(len(x), heads, -1), batch).transpose(1, 2).contiguous().float()


def _log_relation(x: Tensor, y: Tensor, batch: Batch, heads: int) -> Tensor:
    """[N, *] and [N, *] to log softmax(X Yᵀ / √d) [U, H, S, S], over the tokens of the same sequence."""
    x, y = (_by_heads(z, batch, heads) for z in (x, y))
    scores = (x / x.shape[-1] ** 0.5) @ y.transpose(-1, -2)
    return F.log_softmax(scores.masked_fill_(~batch.visible[:, None], torch.finfo(scores.dtype).min), dim=-1)


def recomputed(function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """function(*xs), computed again in the backward: what is as large as [U, H, S, S] is not kept until then."""
    result = checkpoint(function, *xs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def _by_rows(sum_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """sum_of(x, y) in chunks of rows, whose softmaxes are computed again in the backward: over a vocabulary they are
    the largest tensors of the whole step."""
    rows = max(1, CHUNK // x.shape[-1])
    if len(x) <= rows:
        return sum_of(x, y)
    pairs = zip(x.split(rows), y.split(rows), strict=True)
    return torch.stack([checkpoint(sum_of, a, b, use_reentrant=False) for a, b in pairs]).sum()
