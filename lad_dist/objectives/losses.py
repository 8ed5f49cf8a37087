"""Losses as plain functions of tensors, each a mean over what is real. Computed in fp32 whatever the model computes in.

N tokens, R rows that the head read, D width, V outputs, U spans of S places, H heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lad_dist.flat import Batch, Head, pad

CHUNK = 1 << 24  # elements: what a loss over the vocabulary may hold at a time beside the logits themselves


def hard(logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Against labels [R]: cross-entropy of logits [R, V], or squared error of [R, 1] for regression."""
    if head == "regression":
        return F.mse_loss(logits.float().squeeze(-1), labels.float())
    return _by_rows(lambda x, y: F.cross_entropy(x.float(), y, reduction="sum"), logits, labels) / len(labels)


def soft(student: Tensor, teacher: Tensor, head: Head, temperature: float) -> Tensor:
    """Against the teacher's logits [R, V]: T² KL(teacher || student) of the tempered distributions, mean over rows
    (Hinton et al., 2015); squared error for regression."""
    if head == "regression":
        return F.mse_loss(student.float(), teacher.float())

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        s, t = (F.log_softmax(x.float() / temperature, dim=-1) for x in (s, t))
        return F.kl_div(s, t, log_target=True, reduction="sum")

    return temperature**2 * _by_rows(divergence, student, teacher) / len(student)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of [N, D] and [N, D], mean over tokens (DistilBERT, Sanh et al., 2019)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def squared(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of [N, D] and [N, D]."""
    return F.mse_loss(student.float(), target.float())


def relation(student: Tensor, teacher: Tensor, batch: Batch, heads: int) -> Tensor:
    """KL between the teacher's and the student's self-relations softmax(X Xᵀ / √d) of [N, *] and [N, *], split into
    `heads`; mean over heads and tokens (MiniLMv2, Wang et al., 2021, equations 2 to 4). Widths may differ."""
    s, t = _log_relation(student, batch, heads), _log_relation(teacher, batch, heads)
    real = batch.attended[:, None, :, None] & batch.visible[:, None]
    divergence = (t.exp() * (t - s)).masked_fill(~real, 0.0)
    return divergence.sum() / (heads * batch.tokens)


def _log_relation(x: Tensor, batch: Batch, heads: int) -> Tensor:
    """[N, *] -> log of [U, heads, S, S], over the tokens of the same sequence."""
    split = pad(x.float().reshape(len(x), heads, -1), batch).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    scores = scores.masked_fill(~batch.visible[:, None], torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def _by_rows(sum_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """sum_of(x, y) in chunks of rows, whose softmaxes are computed again in the backward: over a vocabulary they are
    the largest tensors of the whole step."""
    rows = max(1, CHUNK // x.shape[-1])
    if len(x) <= rows:
        return sum_of(x, y)
    pairs = zip(x.split(rows), y.split(rows), strict=True)
    return torch.stack([checkpoint(sum_of, a, b, use_reentrant=False) for a, b in pairs]).sum()
