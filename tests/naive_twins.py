"""Random model outputs, and naive versions of what objectives compute: one sequence at a time, in fp64."""

from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
import toy
from hypothesis import strategies as st
from torch import Tensor

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs

TEACHER = ModelDims(num_hidden_layers=4, hidden_size=8, num_attention_heads=2, head="classification", num_outputs=2)
STUDENT = TEACHER._replace(num_hidden_layers=2)
NARROW = STUDENT._replace(hidden_size=4)
LENGTHS = [5, 3, 7]


def random_outputs(
    batch: Batch, seed: int = 0, student: ModelDims = STUDENT, teacher: ModelDims = TEACHER
) -> tuple[ModelOutputs, ModelOutputs]:
    """Return outputs of a student and a teacher: hidden states, queries, keys and values of every layer, and logits."""
    torch.manual_seed(seed)
    num_tokens, rows = len(batch.input_ids), len(batch.head_positions)

    def outputs(dims: ModelDims) -> ModelOutputs:
        hidden = {
            layer: torch.randn(num_tokens, dims.hidden_size, requires_grad=True)
            for layer in range(dims.num_hidden_layers + 1)
        }
        split = (num_tokens, dims.num_attention_heads, dims.hidden_size // dims.num_attention_heads)
        qkv = {
            layer: tuple(torch.randn(split, requires_grad=True) for _ in range(3))
            for layer in range(1, dims.num_hidden_layers + 1)
        }
        return ModelOutputs(torch.randn(rows, dims.num_outputs), hidden, qkv)  # type: ignore[arg-type]

    return outputs(student), outputs(teacher)


@st.composite
def batches(draw: Any) -> Batch:
    """Draw a batch in one of three layouts: a span per sequence, spans of several and empty ones at the end, padded."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    layout = draw(st.sampled_from(["flat", "packed", "padded"]))
    if layout == "padded":
        return toy.batch(lengths, pad_to=max(lengths) + draw(st.integers(0, 2)))
    flat = toy.batch(lengths)
    return toy.packed(flat, max(lengths) + draw(st.integers(0, 6))) if layout == "packed" else flat


def sequences(x: Tensor, batch: Batch) -> list[Tensor]:
    """Return the real tokens of [N, ...], sequence by sequence, in fp64."""
    starts, lengths = batch.cu_seqlens.tolist(), batch.lengths.tolist()
    return [x[start : start + n].double() for start, n in zip(starts, lengths, strict=False) if n]


def assert_same_gradients(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compare two losses and their gradients; of the expected one in fp64."""
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    gradients = [torch.autograd.grad(x, inputs, **options) for x in (loss, expected)]
    largest = max(x.abs().max().item() for x in gradients[1])
    for ours, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-3, atol=1e-4 * largest + 1e-9)


def real_tokens(x: Tensor, batch: Batch) -> Tensor:
    """Return the real tokens of [N, ...], in fp64 and without a graph."""
    return torch.cat(sequences(x.detach(), batch))


def first_tokens(x: Tensor, batch: Batch) -> Tensor:
    """Return the first token of each sequence in [N, ...], in fp64."""
    return torch.stack([rows[0] for rows in sequences(x.detach(), batch)])


def naive_scores(x: Tensor, y: Tensor, batch: Batch, heads: int) -> list[list[Tensor]]:
    """Return x yᵀ / √d of each sequence and head."""
    split = [z.reshape(len(z), heads, -1) for z in (x, y)]
    return [
        [(a[:, h] @ b[:, h].T) / a.shape[-1] ** 0.5 for h in range(heads)]
        for a, b in zip(*(sequences(z.detach(), batch) for z in split), strict=True)
    ]


def naive_relation(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], batch: Batch, heads: int) -> float:
    """Return the KL of the student's softmax from the teacher's: head and query one at a time."""
    total = 0.0
    for s, t in zip(naive_scores(*student, batch, heads), naive_scores(*teacher, batch, heads), strict=True):
        for head in range(heads):
            p, q = torch.softmax(t[head], dim=1), torch.softmax(s[head], dim=1)
            total += sum((p[i] * (p[i].log() - q[i].log())).sum().item() for i in range(len(p)))
    return total / (heads * batch.num_tokens)


def naive_score_error(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], batch: Batch, heads: int
) -> float:
    """Return the mean squared difference of scores over heads and pairs of tokens of one sequence."""
    s, t = (
        torch.cat([head.flatten() for heads_of in naive_scores(*pair, batch, heads) for head in heads_of])
        for pair in (student, teacher)
    )
    return (s - t).square().mean().item()


def naive_angle(i: Tensor, j: Tensor, k: Tensor) -> float:
    """Return the cosine of the angle at j."""
    return F.cosine_similarity(i - j, k - j, dim=0).item()


def naive_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² p (log p - log q) of each row and output of logits [R, V]."""
    p, q = (torch.softmax(x.double() / temperature, dim=1) for x in (teacher, student))
    return temperature**2 * p * (p.log() - q.log())


def naive_cosines(states: Tensor, vertex: int) -> Tensor:
    """Return the cosines [S, S] at a vertex between any two places of [S, D]; 0 towards the vertex itself."""
    directions = F.normalize(states - states[vertex], dim=1)
    return directions @ directions.T


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) < 1 else abs(error) - 0.5


def split_heads(x: Tensor, heads: int) -> list[Tensor]:
    """Return the columns of [S, D] by head."""
    return list(x.unflatten(1, (heads, -1)).unbind(1))


def naive_ranks(states: Tensor, heads: int) -> Tensor:
    """Return how much each place [S, S] attends to each other, if it attends by products of the states [S, D]."""
    scores = [x @ x.T / x.shape[1] ** 0.5 for x in split_heads(states, heads)]
    return torch.stack([torch.softmax(x, dim=1) for x in scores]).sum(dim=0)


def naive_relational_errors(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Return RKD's mean errors over pairs and over triplets of points [B, D], one at a time; 0 where none exists."""
    pairs, triplets = ([*permutations(range(len(student)), count)] for count in (2, 3))
    s, t = ([(x[i] - x[j]).norm().item() for i, j in pairs] for x in (student, teacher))
    distances = [huber(a * len(pairs) / sum(s) - b * len(pairs) / sum(t)) for a, b in zip(s, t, strict=True)]
    angles = [
        huber(naive_angle(*(student[n] for n in places)) - naive_angle(*(teacher[n] for n in places)))
        for places in triplets
    ]
    return sum(distances) / max(1, len(pairs)), sum(angles) / max(1, len(triplets))
