"""Multi-granularity structural distillation (Liu et al., ACL 2022): how representations stand to each other, not what
they are.

    pair(X)_ij = x_i · x_j / √d             angle(X)_ijk = cos of the angle at x_j between x_i and x_k
    R(X_s, X_t) = MSE(pair(X_s), pair(X_t)) + SmoothL1(angle(X_s), angle(X_t))
    L = Σ_lower (token · R(tokens) + span · R(spans)) + Σ_upper sample · R(samples) + hard · CE + soft · T² KL

X are the outputs of student layer m [N, D], split into `heads`, and of teacher layer l = ⌊m L / M⌋; widths may differ.
Layers 1 … `lower` are the lower ones (default: half of them). Spans are `span` tokens of a sequence one after another,
the last one of a sequence shorter, as the mean of their tokens (the paper takes phrases, for which a parser is needed).
Samples are sequences as the mean of theirs, the first 64 of a micro-batch. Pairs are of one sequence, for samples of
one micro-batch. Angles of tokens and spans are seen from the `vertices` that the teacher attends to most, towards the
`neighbours` that each of them attends to most in its sequence; a window of a corpus counts as one text in choosing the
vertices. Angles of samples are all there are. Terms are means over heads and over pairs or angles.

S places of a span of the batch, U spans, B samples, H heads, K vertices, J neighbours.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch, pad, unpad
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.objectives import losses
from lad_dist.objectives.base import uniform_layer_map
from lad_dist.objectives.kd import KD, Weight

Count = Annotated[int, Field(ge=1)]
Places = Annotated[int, Field(ge=2)]

SAMPLES = 64
NEAR = 1e-6  # square of a distance in which there is no direction


class MGSKD(KD):
    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        *,
        token: Weight = 1.0,
        span: Weight = 1.0,
        sample: Weight = 4.0,
        span_tokens: Places = 3,
        lower: Annotated[int, Field(ge=0)] | None = None,
        heads: Count | None = None,
        vertices: Count = 20,
        neighbours: Places = 20,
        soft: Weight = 0.5,
        hard: Weight = 0.5,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
    ):
        super().__init__(student, teacher, soft=soft, hard=hard, temperature=temperature)
        self.heads = heads or student.num_attention_heads
        for shape in (student, teacher):
            if shape.hidden_size % self.heads:
                raise UserError(f"objective.heads: {self.heads} does not divide a width of {shape.hidden_size}")
        matches = uniform_layer_map("mgskd", student, teacher)
        boundary = len(matches) // 2 if lower is None else lower
        if boundary > len(matches):
            raise UserError(f"objective.lower = {lower}, but the student has {student.num_hidden_layers} layers")
        self.weights = {"token": token, "span": span, "sample": sample}
        self.lower = matches[:boundary] if token or span else []
        self.upper = matches[boundary:] if sample else []
        self.span_tokens, self.vertices, self.neighbours = span_tokens, vertices, neighbours
        states = self.lower + self.upper
        self.student_outputs = self.student_outputs._replace(hidden=tuple(m for m, _ in states))
        self.teacher_outputs = OutputSpec(
            self.teacher_outputs.logits, tuple(layer for _, layer in states), tuple(layer for _, layer in self.lower)
        )

    def forward(self, student: ModelOutputs, teacher: ModelOutputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        terms = super().forward(student, teacher, batch)
        found: dict[str, list[Tensor]] = {}
        pools: dict[str, Tensor | None] = {"token": None} if self.weights["token"] else {}
        if self.lower and self.weights["span"]:
            pools["span"] = _pools(batch, self.span_tokens)
        for m, layer in self.lower:
            attention = _attention(*teacher.qkv[layer][:2], batch)
            for name, pool in pools.items():
                pair = student.hidden[m], teacher.hidden[layer]
                found.setdefault(name, []).append(self._inside(*pair, batch, attention, pool))
        for m, layer in self.upper:
            mine, its = (_samples(trace.hidden[n], batch) for trace, n in ((student, m), (teacher, layer)))
            found.setdefault("sample", []).append(self._between(mine, its, batch))
        return terms | {name: self.weights[name] * torch.stack(each).sum() for name, each in found.items()}

    def _inside(self, student: Tensor, teacher: Tensor, batch: Batch, attention: Tensor, pool: Tensor | None) -> Tensor:
        """R of tokens, or of the spans of `pool` [U, S, S], inside sequences."""
        there = batch.is_token
        if pool is not None:
            there = there & (pool.sum(dim=-1) > 0)
            attention = pool @ attention @ pool.transpose(1, 2)
        pairs = batch.visible & there[:, :, None] & there[:, None, :]
        triplets = self._triplets(attention, pairs)

        def error(s: Tensor, t: Tensor) -> Tensor:
            x, y = (pad(z.float(), batch) for z in (s, t))
            if pool is not None:
                x, y = pool @ x, pool @ y
            return _structure(_products(x, self.heads), _products(y, self.heads), pairs, *triplets)

        return losses.recomputed(error, student, teacher)

    def _triplets(self, attention: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of vertices [U, K] and of their neighbours [U, K, J], and whether these are any [U, K, J]."""
        places = attention.shape[-1]
        attention = attention.masked_fill(~pairs, 0.0)
        there = pairs.diagonal(dim1=1, dim2=2)
        received = attention.sum(dim=1).masked_fill(~there, -1.0)
        chosen = received.topk(min(self.vertices, places), dim=1)
        rows = chosen.indices[..., None].expand(-1, -1, places)
        others = pairs & ~torch.eye(places, dtype=torch.bool, device=pairs.device)
        towards = attention.masked_fill(~others, -1.0).gather(1, rows)
        nearest = towards.topk(min(self.neighbours, places), dim=2)
        return chosen.indices, nearest.indices, (nearest.values >= 0) & (chosen.values >= 0)[..., None]

    def _between(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """R of samples [B, D] among each other."""
        count = len(student)
        there = batch.lengths[:count] > 0
        pairs = (there[:, None] & there)[None]
        everyone = torch.arange(count, device=there.device)
        neighbours = everyone.expand(1, count, count)
        valid = pairs & (everyone[:, None] != everyone)

        def error(s: Tensor, t: Tensor) -> Tensor:
            mine, its = (_products(z.float()[None], self.heads) for z in (s, t))
            return _structure(mine, its, pairs, everyone[None], neighbours, valid)

        return losses.recomputed(error, student, teacher)


def _products(x: Tensor, heads: int) -> Tensor:
    """[U, S, D] to x_i · x_j / √d of each head [U, H, S, S]."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (x / x.shape[-1] ** 0.5) @ x.transpose(-1, -2)


def _structure(
    student: Tensor, teacher: Tensor, pairs: Tensor, vertices: Tensor, neighbours: Tensor, valid: Tensor
) -> Tensor:
    """R from the products [U, H, S, S]."""
    heads = student.shape[1]
    error = (student - teacher).masked_fill(~pairs[:, None], 0.0).square().sum() / (heads * pairs.sum())
    different = ~torch.eye(neighbours.shape[-1], dtype=torch.bool, device=valid.device)
    triplets = (valid[..., :, None] & valid[..., None, :] & different)[:, None]
    mine, its = (_angles(x, vertices, neighbours) for x in (student, teacher))
    bent = F.smooth_l1_loss(mine, its, reduction="none").masked_fill(~triplets, 0.0).sum()
    return error + bent / (heads * triplets.sum()).clamp(min=1)


def _angles(products: Tensor, vertices: Tensor, neighbours: Tensor) -> Tensor:
    """Cosines [U, H, K, J, J] at the vertices between any two of their neighbours, from the products alone:
    (x_i - x_j) · (x_k - x_j) = p_ik - p_ij - p_kj + p_jj."""
    _, heads, _, places = products.shape
    flat = products.flatten(2)

    def at(i: Tensor, j: Tensor) -> Tensor:
        index = i * places + j
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, heads, -1)).unflatten(2, index.shape[1:])

    here = vertices[..., None]
    centre = at(here, here)
    towards = at(neighbours, here) - centre
    inner = at(neighbours[..., :, None], neighbours[..., None, :])
    dots = inner - towards[..., :, None] - towards[..., None, :] - centre[..., None]
    lengths = (at(neighbours, neighbours) - 2 * towards - centre).clamp(min=NEAR).rsqrt()
    return dots * lengths[..., :, None] * lengths[..., None, :]


@torch.no_grad()
def _attention(q: Tensor, k: Tensor, batch: Batch) -> Tensor:
    """[U, S, S]: the mean of the heads' attention."""
    q, k = (pad(x.float(), batch).transpose(1, 2) for x in (q, k))
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
    scores = scores.masked_fill_(~batch.visible[:, None], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).mean(dim=1)


def _pools(batch: Batch, tokens: int) -> Tensor:
    """[U, S, S]: in the row of a span's first token, equal shares of its tokens; zeros in other rows."""
    first = pad(batch.position_ids % tokens == 0, batch) & batch.is_token
    places = torch.arange(batch.span_length, device=first.device)
    distance = places - places[:, None]
    inside = (distance >= 0) & (distance < tokens) & first[..., None]
    same = (batch.sequence_ids[:, :, None] == batch.sequence_ids[:, None, :]) & inside
    return same / same.sum(dim=-1, keepdim=True).clamp(min=1)


def _samples(x: Tensor, batch: Batch) -> Tensor:
    """[N, D] to the means of the first sequences [B, D]; zeros for an empty one."""
    lengths = batch.lengths[:SAMPLES]
    mine = unpad(batch.sequence_ids, batch).long()
    mine = mine.masked_fill((mine < 0) | (mine >= len(lengths)), len(lengths))  # the others' own row, left away below
    sums = x.new_zeros(len(lengths) + 1, x.shape[1], dtype=torch.float32).index_add(0, mine, x.float())
    return sums[:-1] / lengths.clamp(min=1)[:, None]
