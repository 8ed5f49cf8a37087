"""MGSKD: multi-granularity structural distillation, how representations stand to each other, not what they are."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch, pad
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import uniform_layer_map
from lad_dist.objectives.kd import KD, Weight

AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]

MAX_SAMPLES = 64
PUBLISHED_HEADS = 64
MIN_SPANS = 3  # of a sequence; fewer have no angle


class MGSKD(KD):
    """Multi-granularity structural knowledge distillation (Liu et al., ACL 2022).

        pair(X)_ij = x_i · x_j / √d             angle(X)_ijk = cos of the angle at x_j between x_i and x_k
        P(X_s, X_t) = MSE(pair(X_s), pair(X_t))             A(X_s, X_t) = SmoothL1(angle(X_s), angle(X_t))
        L = Σ_lower (token · (P + A)(tokens) + span · (P + A)(spans))
            + Σ_upper (sample · A(samples) + sample_pairs · P(samples)) + hard · CE + soft · T² KL

    X are the outputs of student layer m [N, D] and of teacher layer l = ⌊m L / M⌋; widths may differ. Layers 1 to
    `lower` are the lower ones. Spans are `span_tokens` consecutive tokens of a sequence, as the mean of their tokens;
    the last one of a sequence may be shorter, and sequences of less than three spans are left out. Samples are the
    first 64 sequences of a micro-batch, as the mean of their tokens.

    Pairs, and angles of samples, are of X split into `heads`; angles of tokens and spans are of `angle_heads`. Pairs
    are of one sequence; pairs of samples are of one micro-batch. Angles of tokens and spans are at the `vertices` that
    rank highest. They open towards the `neighbours` that rank highest at each vertex:

        r_ij = Σ_heads softmax over j of pair(X_t)_ij          vertices j by Σ_i r_ij, neighbours i of j by r_ji, i ≠ j

    With `ranking = "attention"`, r is the teacher's attention. A window of a corpus counts as one text in the choice
    of vertices. Samples use all angles. Terms are means over heads and over pairs or angles. That of samples is over
    all B³ triplets, of which those with an equal place count as 0.

    The defaults are those of the authors' released loss, whose `heads` are 64. Their spans are phrases, for which a
    parser is needed. `sample_pairs`, more `angle_heads` and "attention" are additions of this project.

    U spans of the batch of S places, B samples, H heads, K vertices, J neighbours.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        token: Weight = 1.0,
        span: Weight = 1.0,
        sample: Weight = 4.0,
        sample_pairs: Annotated[
            float, Field(ge=0, description="weight of products of samples; none as published")
        ] = 0.0,
        span_tokens: AtLeastTwo = 3,
        lower: Annotated[int, Field(ge=0)] | None = None,
        heads: Annotated[
            int | None,
            Field(ge=1, description="default: 64, or the student's where 64 does not divide both widths"),
        ] = None,
        angle_heads: Annotated[int, Field(ge=1, description="heads of the angles of tokens and spans")] = 1,
        ranking: Annotated[
            Literal["hidden", "attention"],
            Field(description="what ranks vertices and neighbours: products of hidden states, or attention"),
        ] = "hidden",
        vertices: AtLeastOne = 20,
        neighbours: AtLeastTwo = 20,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        """Build the objective for two models.

        Args:
            student: Dimensions of the student.
            teacher: Dimensions of the teacher.
            token: Weight of tokens in the lower layers.
            span: Weight of spans in the lower layers.
            sample: Weight of the samples' angles in the upper layers.
            sample_pairs: Weight of the samples' products in the upper layers.
            span_tokens: Tokens of a span.
            lower: Number of lower layers; None: half of the student's.
            heads: Number of heads; None: 64, or the student's where 64 does not divide both widths.
            angle_heads: Number of heads of the angles of tokens and spans.
            ranking: Whether products of the teacher's hidden states or its attention rank vertices and neighbours.
            vertices: Number of places with angles, per sequence.
            neighbours: Number of places that the angles of a vertex open towards.
            soft: Weight of the teacher's logits.
            hard: Weight of the labels.
            temperature: T.

        Raises:
            UserError: `heads` or `angle_heads` does not divide a width, the student has fewer layers than `lower` or
                more than the teacher, or the teacher lacks the head that `soft` needs.
        """
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        widths = student.hidden_size, teacher.hidden_size
        published = not any(width % PUBLISHED_HEADS for width in widths)
        self.heads = heads or (PUBLISHED_HEADS if published else student.num_attention_heads)
        self.angle_heads = angle_heads
        for key, count in (("heads", self.heads), ("angle_heads", angle_heads)):
            for width in widths:
                if width % count:
                    raise UserError(f"objective.{key}: {count} does not divide a width of {width}")
        layer_map = uniform_layer_map("mgskd", student, teacher)
        boundary = len(layer_map) // 2 if lower is None else lower
        if boundary > len(layer_map):
            raise UserError(f"objective.lower = {lower}, but the student has {student.num_hidden_layers} layers")
        self.weights = {"token": token, "span": span, "sample": sample, "sample_pairs": sample_pairs}
        self.lower = layer_map[:boundary] if token or span else []
        self.upper = layer_map[boundary:] if sample or sample_pairs else []
        self.span_tokens, self.vertices, self.neighbours = span_tokens, vertices, neighbours
        compared = self.lower + self.upper
        self.student_spec = self.student_spec._replace(hidden=tuple(m for m, _ in compared))
        self.teacher_spec = OutputSpec(
            logits=self.teacher_spec.logits,
            hidden=tuple(layer for _, layer in compared),
            qkv=tuple(layer for _, layer in self.lower) if ranking == "attention" else (),
        )

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Compute KD's terms and the structural errors of tokens, spans and samples.

        Returns:
            KD's terms, and "token", "span", "sample" and "sample_pairs", each only if its weight is not 0.
        """
        assert teacher is not None
        terms = super().forward(student, teacher, batch)
        errors: dict[str, list[Tensor]] = {}
        pools: dict[str, Tensor | None] = {"token": None} if self.weights["token"] else {}
        if self.lower and self.weights["span"]:
            pools["span"] = _span_pool(batch, self.span_tokens)
        for m, layer in self.lower:
            attention = _attention(*teacher.qkv[layer][:2], batch) if self.teacher_spec.qkv else None
            for name, pool in pools.items():
                states = student.hidden[m], teacher.hidden[layer]
                errors.setdefault(name, []).append(self._token_error(*states, batch, attention=attention, pool=pool))
        for m, layer in self.upper:
            states = student.hidden[m], teacher.hidden[layer]
            means = [losses.sequence_means(x, batch, limit=MAX_SAMPLES) for x in states]
            for name, error in (("sample", self._sample_angles), ("sample_pairs", self._sample_pairs)):
                if self.weights[name]:
                    errors.setdefault(name, []).append(losses.recompute_in_backward(error(batch), *means))
        return terms | {name: self.weights[name] * torch.stack(values).sum() for name, values in errors.items()}

    def _token_error(
        self, student: Tensor, teacher: Tensor, batch: Batch, *, attention: Tensor | None, pool: Tensor | None
    ) -> Tensor:
        """Return P + A of tokens, or of the spans of `pool` [U, S, S], inside sequences."""
        valid = batch.is_token
        if pool is not None:
            valid = valid & (pool.sum(dim=-1) > 0)
        pairs = batch.visible & valid[:, :, None] & valid[:, None, :]
        if pool is not None:
            pairs = pairs & (pairs.sum(dim=-1, keepdim=True) >= MIN_SPANS)

        def states(x: Tensor) -> Tensor:
            x = pad(x.float(), batch)
            return x if pool is None else pool @ x

        with torch.no_grad():
            if attention is None:
                ranks = _similarity(losses.products(states(teacher), self.heads), pairs)
            else:
                ranks = attention if pool is None else pool @ attention @ pool.transpose(1, 2)
            triplets = self._triplets(ranks, pairs)

        def error(s: Tensor, t: Tensor) -> Tensor:
            x, y = states(s), states(t)
            pair_error = _pair_error(losses.products(x, self.heads), losses.products(y, self.heads), pairs)
            angles = losses.products(x, self.angle_heads), losses.products(y, self.angle_heads)
            count = (self.angle_heads * triplets.num_angles).clamp(min=1)
            return pair_error + losses.angle_error(*angles, triplets) / count

        return losses.recompute_in_backward(error, student, teacher)

    def _triplets(self, ranks: Tensor, pairs: Tensor) -> losses.Triplets:
        """Return the vertices that rank highest among all, each with the neighbours that rank highest at it."""
        places = ranks.shape[-1]
        ranks = ranks.masked_fill(~pairs, 0.0)
        valid = pairs.diagonal(dim1=1, dim2=2)
        received = ranks.sum(dim=1).masked_fill(~valid, -1.0)
        vertices = received.topk(min(self.vertices, places), dim=1)
        rows = vertices.indices[..., None].expand(-1, -1, places)
        others = pairs & ~torch.eye(places, dtype=torch.bool, device=pairs.device)
        towards = ranks.masked_fill(~others, -1.0).gather(1, rows)
        neighbours = towards.topk(min(self.neighbours, places), dim=2)
        usable = (neighbours.values >= 0) & (vertices.values >= 0)[..., None]
        return losses.Triplets(vertices.indices, neighbours.indices, usable)

    def _sample_angles(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """Return A as a function of the student's and the teacher's samples [B, D]."""
        pairs = _sample_mask(batch)
        triplets, count = losses.all_triplets(pairs), pairs.diagonal().sum()

        def error(s: Tensor, t: Tensor) -> Tensor:
            x, y = (losses.products(z[None], self.heads) for z in (s, t))
            return losses.angle_error(x, y, triplets) / (self.heads * count**3)

        return error

    def _sample_pairs(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """Return P as a function of the student's and the teacher's samples [B, D]."""
        pairs = _sample_mask(batch)[None]

        def error(s: Tensor, t: Tensor) -> Tensor:
            x, y = (losses.products(z[None], self.heads) for z in (s, t))
            return _pair_error(x, y, pairs)

        return error


def _sample_mask(batch: Batch) -> Tensor:
    """Return the pairs of samples that are not empty, bool [B, B]."""
    nonempty = batch.lengths[:MAX_SAMPLES] > 0
    return nonempty[:, None] & nonempty


def _pair_error(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """Return P from the products [U, H, S, S]; 0 without a pair."""
    squares = (student - teacher).masked_fill(~pairs[:, None], 0.0).square()
    return squares.sum() / (student.shape[1] * pairs.sum()).clamp(min=1)


def _similarity(products: Tensor, pairs: Tensor) -> Tensor:
    """Return the softmax of products [U, H, S, S] over the places of a pair, summed over heads, as [U, S, S]."""
    return torch.softmax(products.masked_fill(~pairs[:, None], torch.finfo(products.dtype).min), dim=-1).sum(dim=1)


@torch.no_grad()
def _attention(q: Tensor, k: Tensor, batch: Batch) -> Tensor:
    """Return the mean of the heads' attention, [U, S, S]."""
    q, k = (pad(x.float(), batch).transpose(1, 2) for x in (q, k))
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
    scores = scores.masked_fill_(~batch.visible[:, None], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).mean(dim=1)


def _span_pool(batch: Batch, tokens: int) -> Tensor:
    """Return [U, S, S]: in the row of a span's first token, equal shares of the span's tokens; zeros in other rows."""
    first = pad(batch.position_ids % tokens == 0, batch) & batch.is_token
    places = torch.arange(batch.span_length, device=first.device)
    distance = places - places[:, None]
    inside = (distance >= 0) & (distance < tokens) & first[..., None]
    same = (batch.sequence_ids[:, :, None] == batch.sequence_ids[:, None, :]) & inside
    return same / same.sum(dim=-1, keepdim=True).clamp(min=1)
