"""Losses and means as plain functions of tensors.

Losses are computed in fp32 whatever the model computes in. Means are over real tokens and sequences, never over
padding. They are sums over a batch divided by `batch.divisors`, which makes them means over a whole step.

B sequences, N tokens, R tokens that the head reads, D width, H heads, V outputs, U spans of S places.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lad_dist.core.batch import Batch, Head, one_span_per_sequence, pad, unpad
from lad_dist.core.labels import UNLABELLED

Pair = tuple[Tensor, Tensor]

CHUNK_ELEMENTS = 1 << 24  # what a loss over the vocabulary may hold at a time beside the logits themselves
MIN_SQUARED_DISTANCE = 1e-6  # below it two points have no direction


def hard_label_loss(logits: Tensor, batch: Batch, head: Head) -> Tensor:
    """Return the loss of logits [R, V] against the batch's labels, a scalar.

    It is the cross-entropy, mean over the rows that have a label, each times its `batch.row_weights` where there are
    some; for regression the squared error of [R, 1]. Of several labels it is the binary cross-entropy, mean over rows
    and labels, where `batch.row_weights` are [R, V]. It is 0 where no row of the step has a label. For question
    answering, start and end of the answer are distributions over the rows of a sequence. The cross-entropy is then a
    mean over both and over sequences (Devlin et al., NAACL 2019, section 4.2).
    """
    rows = batch.divisors.labelled_rows or 1.0
    if head == "multilabel":
        missing = batch.labels.isnan()
        labels = batch.labels.masked_fill(missing, 0.0)
        errors = F.binary_cross_entropy_with_logits(logits.float(), labels, batch.row_weights, reduction="none")
        return errors.masked_fill(missing, 0.0).sum() / (rows * logits.shape[1])
    if head == "regression":
        values, labels = logits.float().squeeze(-1), batch.labels.float()
        return F.mse_loss(values, torch.where(labels.isnan(), values.detach(), labels), reduction="sum") / rows
    if head == "question_answering":
        return -(batch.labels * log_softmax_per_sequence(logits, batch)).sum() / (2 * batch.divisors.sequences)
    if batch.row_weights is not None:
        errors = F.cross_entropy(logits.float(), batch.labels, ignore_index=UNLABELLED, reduction="none")
        return (errors * batch.row_weights).sum() / rows
    cross_entropy = partial(F.cross_entropy, ignore_index=UNLABELLED, reduction="sum")
    return _sum_in_chunks(lambda x, y: cross_entropy(x.float(), y), logits, batch.labels) / rows


def soft_label_loss(student: Tensor, teacher: Tensor, batch: Batch, head: Head, temperature: float) -> Tensor:
    """Return the loss of logits [R, V] against the teacher's, a scalar.

    It is T² KL(teacher || student) of the distributions at temperature T, mean over rows (Hinton et al., 2015); for
    regression the squared error. Of several labels each is a Bernoulli distribution of its own, and the divergence a
    mean over rows and labels. For question answering, start and end of the answer are distributions over the rows of
    a sequence. The divergence is then a mean over both and over sequences.
    """
    if head == "multilabel":
        # Of the two logits z and 0 the softmax is sigmoid(z) and 1 - sigmoid(z).
        s, t = (torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(0, 1) for x in (student, teacher))
        return soft_label_sum(s, t, temperature) / (batch.divisors.rows * student.shape[1])
    if head == "regression":
        return F.mse_loss(student.float(), teacher.float(), reduction="sum") / batch.divisors.rows
    if head == "question_answering":
        s, t = (log_softmax_per_sequence(x.float() / temperature, batch) for x in (student, teacher))
        return temperature**2 * F.kl_div(s, t, log_target=True, reduction="sum") / (2 * batch.divisors.sequences)
    return soft_label_sum(student, teacher, temperature) / batch.divisors.rows


def soft_label_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher || student) of logits [R, V] at temperature T, summed over rows, a scalar."""

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        s, t = (F.log_softmax(x.float() / temperature, dim=-1) for x in (s, t))
        return F.kl_div(s, t, log_target=True, reduction="sum")

    return temperature**2 * _sum_in_chunks(divergence, student, teacher)


def log_softmax_per_sequence(logits: Tensor, batch: Batch) -> Tensor:
    """Return logs of distributions, fp32 [R, V]: each column of [R, V] over the rows of the same sequence."""
    batch = one_span_per_sequence(batch)
    index = batch.padded_index.index_select(0, batch.head_positions)
    spans = logits.new_full((batch.sequence_ids.numel(), logits.shape[1]), -torch.inf, dtype=torch.float32)
    spans = spans.index_copy(0, index, logits.float()).view(*batch.sequence_ids.shape, -1)
    return F.log_softmax(spans, dim=1).flatten(0, 1).index_select(0, index)


def squared_error(student: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of [N, D] and [N, D], mean over the width, as [N]."""
    return (student.float() - target.float()).square().mean(dim=-1)


def mean_over_tokens(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean of values [N] over the real tokens, a scalar."""
    if batch.num_tokens < len(values):
        values = values.masked_fill(~unpad(batch.is_token, batch), 0.0)
    return values.sum() / batch.divisors.tokens


def mean_over_padded_tokens(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean of values [N, ...] over all tokens, those that `pad_to` added too, a scalar."""
    return values.sum() / (batch.divisors.padded_tokens * values[0].numel())


def first_tokens(x: Tensor, batch: Batch) -> Tensor:
    """Return the first token of each sequence, [N, ...] to [B, ...].

    An empty sequence gets any token; `mean_over_sequences` leaves it out.
    """
    return x.index_select(0, batch.cu_seqlens[:-1].clamp(max=len(x) - 1))


def mean_over_sequences(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean of values [B] over the sequences that are not empty, a scalar."""
    return values.masked_fill(batch.lengths == 0, 0.0).sum() / batch.divisors.sequences


def sequence_means(x: Tensor, batch: Batch, limit: int) -> Tensor:
    """Return the means of the first `limit` sequences, fp32 [B, D] of [N, D]; zeros for an empty one."""
    lengths = batch.lengths[:limit]
    sequence = unpad(batch.sequence_ids, batch).long()
    # Tokens of other sequences go to a row of their own, which is cut off below.
    sequence = sequence.masked_fill((sequence < 0) | (sequence >= len(lengths)), len(lengths))
    sums = x.new_zeros(len(lengths) + 1, x.shape[1], dtype=torch.float32).index_add(0, sequence, x.float())
    return sums[:-1] / lengths.clamp(min=1)[:, None]


def relation_loss(student: Pair, teacher: Pair, batch: Batch, heads: int) -> Tensor:
    """Return the KL of the student's relations from the teacher's, mean over heads and tokens, a scalar.

    A relation is softmax(X Yᵀ / √d). Of queries and keys it is the attention distribution (MiniLM, Wang et al., 2020).
    With X = Y it is a self-relation (MiniLMv2, Wang et al., 2021, equations 2 to 4).

    Args:
        student: X and Y of the student, [N, *] each; widths may differ from the teacher's.
        teacher: X and Y of the teacher, [N, *] each.
        batch: The batch that both belong to.
        heads: Number of heads that each width is split into.
    """

    def divergence(*xs: Tensor) -> Tensor:
        s, t = (_log_relation(x, y, batch, heads) for x, y in (xs[:2], xs[2:]))
        pairs = batch.is_token[:, None, :, None] & batch.visible[:, None]
        return (t.exp() * (t - s)).masked_fill(~pairs, 0.0).sum() / (heads * batch.divisors.tokens)

    return recompute_in_backward(divergence, *student, *teacher)


class AttentionScores(NamedTuple):
    """Attention scores Q Kᵀ / √d of a layer before the softmax, not multiplied out.

    In fp32, 0 at padding; d may differ between models.
    """

    queries: Tensor  # [B, H, S, d], divided by √d
    keys: Tensor  # [B, H, S, d]
    squared_norm: Tensor  # the sum of all squared scores


def attention_scores(pair: Pair, batch: Batch, heads: int) -> AttentionScores:
    """Return the scores of queries and keys [N, *], split into `heads`."""
    batch = one_span_per_sequence(batch)
    queries, keys = (_split_heads(x, batch, heads) for x in pair)
    if batch.num_tokens < len(pair[0]):
        padding = ~batch.is_token[:, None, :, None]
        queries, keys = queries.masked_fill(padding, 0.0), keys.masked_fill(padding, 0.0)
    queries = queries / queries.shape[-1] ** 0.5
    return AttentionScores(queries, keys, _inner_product(queries, keys, queries, keys))


def attention_score_loss(student: AttentionScores, teacher: AttentionScores, batch: Batch) -> Tensor:
    """Return the squared error between attention scores, a scalar (TinyBERT, Jiao et al., 2020, equation 7).

    It is a mean over heads and over pairs of tokens of one sequence: ‖A - B‖² = ‖A‖² - 2 ⟨A, B⟩ + ‖B‖².
    """
    product = _inner_product(student.queries, student.keys, teacher.queries, teacher.keys)
    heads = student.keys.shape[1]
    return (student.squared_norm - 2 * product + teacher.squared_norm) / (heads * batch.divisors.pairs)


def products(x: Tensor, heads: int) -> Tensor:
    """Return x_i · x_j / √d of each head [U, H, S, S], from [U, S, D]."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (x / x.shape[-1] ** 0.5) @ x.transpose(-1, -2)


class Triplets(NamedTuple):
    """Angles to compare: at each vertex, between any two of its neighbours."""

    vertices: Tensor  # [U, K], places
    neighbours: Tensor  # [U, K, J], places
    valid: Tensor  # bool [U, K, J], the neighbours that count

    @property
    def num_angles(self) -> Tensor:
        """The number of angles; each counts in both directions."""
        neighbours = self.valid.sum(dim=-1)
        return (neighbours * (neighbours - 1)).sum()


def all_triplets(pairs: Tensor) -> Triplets:
    """Return the angles at every place of one span between any two others; `pairs` bool [S, S], those that count."""
    everyone = torch.arange(len(pairs), device=pairs.device)
    valid = pairs & (everyone[:, None] != everyone)
    return Triplets(everyone[None], everyone.expand(1, len(pairs), -1), valid[None])


def angle_error(student: Tensor, teacher: Tensor, triplets: Triplets) -> Tensor:
    """Return the Huber loss between cosines of angles, from `products` [U, H, S, S]: a sum over heads and triplets."""
    different = ~torch.eye(triplets.neighbours.shape[-1], dtype=torch.bool, device=student.device)
    valid = (triplets.valid[..., :, None] & triplets.valid[..., None, :] & different)[:, None]
    student_angles, teacher_angles = (_angles(x, triplets) for x in (student, teacher))
    errors = F.smooth_l1_loss(student_angles, teacher_angles, reduction="none")
    return errors.masked_fill(~valid, 0.0).sum()


def recompute_in_backward(function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """Return function(*xs) with activation checkpointing: tensors as large as [U, H, S, S] are not stored."""
    result = checkpoint(function, *xs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def _angles(products: Tensor, triplets: Triplets) -> Tensor:
    """Return cosines [U, H, K, J, J] at the vertices between any two of their neighbours.

    They follow from the products alone: (x_i - x_j) · (x_k - x_j) = p_ik - p_ij - p_kj + p_jj.
    """
    vertices, neighbours, _ = triplets
    _, heads, _, places = products.shape
    flat = products.flatten(2)

    def at(i: Tensor, j: Tensor) -> Tensor:
        index = i * places + j
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, heads, -1)).unflatten(2, index.shape[1:])

    vertex = vertices[..., None]
    centre = at(vertex, vertex)
    towards = at(neighbours, vertex) - centre
    inner = at(neighbours[..., :, None], neighbours[..., None, :])
    dots = inner - towards[..., :, None] - towards[..., None, :] - centre[..., None]
    inverse_lengths = (at(neighbours, neighbours) - 2 * towards - centre).clamp(min=MIN_SQUARED_DISTANCE).rsqrt()
    return dots * inverse_lengths[..., :, None] * inverse_lengths[..., None, :]


def _inner_product(queries_a: Tensor, keys_a: Tensor, queries_b: Tensor, keys_b: Tensor) -> Tensor:
    """Return ⟨Q Kᵀ, P Lᵀ⟩ = ⟨Qᵀ P, Kᵀ L⟩, summed over sequences and heads.

    With S tokens it takes S d² instead of S² d, and no tensor is [S, S].
    """
    return ((queries_a.mT @ queries_b) * (keys_a.mT @ keys_b)).sum()


def _split_heads(x: Tensor, batch: Batch, heads: int) -> Tensor:
    """Return [N, *] as [U, H, S, d] in fp32, contiguous: each product would otherwise copy it."""
    return pad(x.reshape(len(x), heads, -1), batch).transpose(1, 2).contiguous().float()


def _log_relation(x: Tensor, y: Tensor, batch: Batch, heads: int) -> Tensor:
    """Return log softmax(X Yᵀ / √d) [U, H, S, S] of [N, *] and [N, *], over the tokens of the same sequence."""
    x, y = (_split_heads(z, batch, heads) for z in (x, y))
    scores = (x / x.shape[-1] ** 0.5) @ y.transpose(-1, -2)
    return F.log_softmax(scores.masked_fill_(~batch.visible[:, None], torch.finfo(scores.dtype).min), dim=-1)


def _sum_in_chunks(sum_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return sum_of(x, y) as a sum over chunks of rows, each computed again in the backward.

    Softmaxes over a vocabulary are the largest tensors of the whole step.
    """
    rows = max(1, CHUNK_ELEMENTS // x.shape[-1])
    if len(x) <= rows:
        return sum_of(x, y)
    pairs = zip(x.split(rows), y.split(rows), strict=True)
    return torch.stack([checkpoint(sum_of, a, b, use_reentrant=False) for a, b in pairs]).sum()
