"""MGSKD: multi-granularity structural distillation, how representations stand to each other, not what they are."""

from typing import Annotated

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


class MGSKD(KD):
    """Multi-granularity structural knowledge distillation (Liu et al., ACL 2022).

        pair(X)_ij = x_i · x_j / √d             angle(X)_ijk = cos of the angle at x_j between x_i and x_k
        R(X_s, X_t) = MSE(pair(X_s), pair(X_t)) + SmoothL1(angle(X_s), angle(X_t))
        L = Σ_lower (token · R(tokens) + span · R(spans)) + Σ_upper sample · R(samples) + hard · CE + soft · T² KL

    X are the outputs of student layer m [N, D], split into `heads`, and of teacher layer l = ⌊m L / M⌋; widths may
    differ. Layers 1 … `lower` are the lower ones. Spans are `span_tokens` consecutive tokens of a sequence, as the mean
    of their tokens; the last one of a sequence may be shorter. (The paper takes phrases, for which a parser is needed.)
    Samples are the first 64 sequences of a micro-batch, each as the mean of its tokens.

    Pairs are of one sequence; pairs of samples are of one micro-batch. Angles of tokens and spans are at the `vertices`
    that the teacher attends to most. They open towards the `neighbours` that each vertex attends to most in its
    sequence. A window of a corpus counts as one text in the choice of vertices. Samples use all angles. Terms are means
    over heads and over pairs or angles.

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
        span_tokens: AtLeastTwo = 3,
        lower: Annotated[int, Field(ge=0)] | None = None,
        heads: AtLeastOne | None = None,
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
            sample: Weight of samples in the upper layers.
            span_tokens: Tokens of a span.
            lower: Number of lower layers; None: half of the student's.
            heads: Number of heads; None: the student's.
            vertices: Number of places with angles, per sequence.
            neighbours: Number of places that the angles of a vertex open towards.
            soft: Weight of the teacher's logits.
            hard: Weight of the labels.
            temperature: T.

        Raises:
            UserError: `heads` does not divide a width, the student has fewer layers than `lower` or more than the
                teacher, or the teacher lacks the head that `soft` needs.
        """
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        self.heads = heads or student.num_attention_heads
        for dims in (student, teacher):
            if dims.hidden_size % self.heads:
                raise UserError(f"objective.heads: {self.heads} does not divide a width of {dims.hidden_size}")
        layer_map = uniform_layer_map("mgskd", student, teacher)
        boundary = len(layer_map) // 2 if lower is None else lower
        if boundary > len(layer_map):
            raise UserError(f"objective.lower = {lower}, but the student has {student.num_hidden_layers} layers")
        self.weights = {"token": token, "span": span, "sample": sample}
        self.lower = layer_map[:boundary] if token or span else []
        self.upper = layer_map[boundary:] if sample else []
        self.span_tokens, self.vertices, self.neighbours = span_tokens, vertices, neighbours
        compared = self.lower + self.upper
        self.student_spec = self.student_spec._replace(hidden=tuple(m for m, _ in compared))
        self.teacher_spec = OutputSpec(
            logits=self.teacher_spec.logits,
            hidden=tuple(layer for _, layer in compared),
            qkv=tuple(layer for _, layer in self.lower),
        )

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        """Compute KD's terms and the structural errors of tokens, spans and samples.

        Returns:
            KD's terms, and "token", "span" and "sample", each only if its weight is not 0.
        """
        assert teacher is not None
        terms = super().forward(student, teacher, batch)
        errors: dict[str, list[Tensor]] = {}
        pools: dict[str, Tensor | None] = {"token": None} if self.weights["token"] else {}
        if self.lower and self.weights["span"]:
            pools["span"] = _span_pool(batch, self.span_tokens)
        for m, layer in self.lower:
            attention = _attention(*teacher.qkv[layer][:2], batch)
            for name, pool in pools.items():
                states = student.hidden[m], teacher.hidden[layer]
                errors.setdefault(name, []).append(self._token_error(*states, batch, attention, pool))
        for m, layer in self.upper:
            states = student.hidden[m], teacher.hidden[layer]
            student_means, teacher_means = (losses.sequence_means(x, batch, limit=MAX_SAMPLES) for x in states)
            errors.setdefault("sample", []).append(self._sample_error(student_means, teacher_means, batch))
        return terms | {name: self.weights[name] * torch.stack(values).sum() for name, values in errors.items()}

    def _token_error(
        self, student: Tensor, teacher: Tensor, batch: Batch, attention: Tensor, pool: Tensor | None
    ) -> Tensor:
        """Return R of tokens, or of the spans of `pool` [U, S, S], inside sequences."""
        valid = batch.is_token
        if pool is not None:
            valid = valid & (pool.sum(dim=-1) > 0)
            attention = pool @ attention @ pool.transpose(1, 2)
        pairs = batch.visible & valid[:, :, None] & valid[:, None, :]
        triplets = self._triplets(attention, pairs)

        def error(s: Tensor, t: Tensor) -> Tensor:
            x, y = (pad(z.float(), batch) for z in (s, t))
            if pool is not None:
                x, y = pool @ x, pool @ y
            return _structure_error(losses.products(x, self.heads), losses.products(y, self.heads), pairs, triplets)

        return losses.recompute_in_backward(error, student, teacher)

    def _triplets(self, attention: Tensor, pairs: Tensor) -> losses.Triplets:
        """Return the vertices that the teacher attends to most, each with the neighbours that it attends to most."""
        places = attention.shape[-1]
        attention = attention.masked_fill(~pairs, 0.0)
        valid = pairs.diagonal(dim1=1, dim2=2)
        received = attention.sum(dim=1).masked_fill(~valid, -1.0)
        vertices = received.topk(min(self.vertices, places), dim=1)
        rows = vertices.indices[..., None].expand(-1, -1, places)
        others = pairs & ~torch.eye(places, dtype=torch.bool, device=pairs.device)
        towards = attention.masked_fill(~others, -1.0).gather(1, rows)
        neighbours = towards.topk(min(self.neighbours, places), dim=2)
        usable = (neighbours.values >= 0) & (vertices.values >= 0)[..., None]
        return losses.Triplets(vertices.indices, neighbours.indices, usable)

    def _sample_error(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return R of samples [B, D] among each other."""
        nonempty = batch.lengths[: len(student)] > 0
        pairs = (nonempty[:, None] & nonempty)[None]
        triplets = losses.all_triplets(pairs[0])

        def error(s: Tensor, t: Tensor) -> Tensor:
            x, y = (losses.products(z.float()[None], self.heads) for z in (s, t))
            return _structure_error(x, y, pairs, triplets)

        return losses.recompute_in_backward(error, student, teacher)


def _structure_error(student: Tensor, teacher: Tensor, pairs: Tensor, triplets: losses.Triplets) -> Tensor:
    """Return R from the products [U, H, S, S]."""
    heads = student.shape[1]
    pair_error = (student - teacher).masked_fill(~pairs[:, None], 0.0).square().sum() / (heads * pairs.sum())
    angle_error = losses.angle_error(student, teacher, triplets) / (heads * triplets.num_angles).clamp(min=1)
    return pair_error + angle_error


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
