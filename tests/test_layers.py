"""Objectives that match layers, each against an independent naive twin: looped over sequences, in fp64."""

import pytest
import torch
import torch.nn.functional as F
import toy
import twins
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from twins import LENGTHS, NARROW, STUDENT, TEACHER, traces

from lad_dist.flat import Batch, Shape
from lad_dist.objectives.alp import ALP
from lad_dist.objectives.distilbert import DistilBERT
from lad_dist.objectives.minilm import MiniLM
from lad_dist.objectives.minilm2 import MiniLM2
from lad_dist.objectives.pkd import PKD
from lad_dist.objectives.tinybert import TinyBERT

SEEDS = st.integers(0, 1000)
few = settings(max_examples=20, deadline=None)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


@few
@given(
    batch=twins.batches(),
    seed=SEEDS,
    mapping=st.sampled_from(["skip", "last"]),
    rows=st.sampled_from(["first", "all"]),
    normalised=st.booleans(),
)
def test_pkd_equals_its_equations(batch: Batch, seed: int, mapping: str, rows: str, normalised: bool) -> None:
    shapes = STUDENT._replace(layers=3), TEACHER._replace(layers=6)
    student, teacher = traces(batch, seed, *shapes)
    objective = PKD(*shapes, hidden=7.0, mapping=mapping, tokens=rows, normalised=normalised)  # type: ignore[arg-type]
    total, count = 0.0, 0
    for m, layer in {"skip": [(1, 2), (2, 4)], "last": [(1, 4), (2, 5)]}[mapping]:
        pick = twins.firsts if rows == "first" else twins.tokens
        for s, t in zip(pick(student.hidden[m], batch), pick(teacher.hidden[layer], batch), strict=True):
            if normalised:
                s, t = s / s.norm(), t / t.norm()
            total += ((s - t) ** 2).mean().item()
            count += 1
    assert objective(student, teacher, batch)["hidden"].item() == close(7 * total / count)


@pytest.mark.parametrize(
    ("layers", "mapping", "expected"),
    [
        (6, "skip", [2, 4, 6, 8, 10]),
        (6, "last", [7, 8, 9, 10, 11]),
        (3, "skip", [4, 8]),
        (3, "last", [10, 11]),
        (4, "skip", [3, 6, 9]),
    ],
)
def test_pkd_matches_the_published_layers(layers: int, mapping: str, expected: list[int]) -> None:
    objective = PKD(STUDENT._replace(layers=layers), TEACHER._replace(layers=12), mapping=mapping)  # type: ignore[arg-type]
    assert [layer for _, layer in objective.matches] == expected


def test_pkd_normalised_does_not_see_lengths() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    longer = teacher._replace(hidden={layer: 3 * x for layer, x in teacher.hidden.items()})
    values = [
        [
            PKD(STUDENT, TEACHER, normalised=normalised)(student, seen, batch)["hidden"].item()
            for seen in (teacher, longer)
        ]
        for normalised in (True, False)
    ]
    assert values[0][0] == close(values[0][1])
    assert values[1][0] != close(values[1][1])


@few
@given(batch=twins.batches(), seed=SEEDS)
def test_distilbert_equals_its_equations(batch: Batch, seed: int) -> None:
    student, teacher = traces(batch, seed)
    terms = DistilBERT(STUDENT, TEACHER, cosine=3.0, soft=5.0, hard=2.0, temperature=2.0)(student, teacher, batch)
    pairs = zip(twins.tokens(student.hidden[2], batch), twins.tokens(teacher.hidden[4], batch), strict=True)
    angles = [1 - (s @ t / (s.norm() * t.norm())).item() for s, t in pairs]
    assert terms["cosine"].item() == close(3 * sum(angles) / len(angles))
    assert student.logits is not None
    assert teacher.logits is not None
    z, t = student.logits.double(), teacher.logits.double()
    p, q = torch.softmax(t / 2, dim=1), torch.softmax(z / 2, dim=1)
    divergence = (p * (p / q).log()).sum().item() / len(z)
    assert terms["soft"].item() == pytest.approx(5 * 4 * divergence, rel=1e-4, abs=1e-5)
    assert terms["hard"].item() == close((2 * F.nll_loss(torch.log_softmax(z, dim=1), batch.labels)).item())


def mapped(linear: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(linear, torch.nn.Identity):
        return x
    assert isinstance(linear, torch.nn.Linear)
    return x @ linear.weight.detach().double().T + linear.bias.detach().double()


@few
@given(batch=twins.batches(), seed=SEEDS, shape=st.sampled_from([STUDENT, NARROW]))
def test_tinybert_equals_its_equations(batch: Batch, seed: int, shape: Shape) -> None:
    student, teacher = traces(batch, seed, shape)
    objective = TinyBERT(shape, TEACHER, embedding=2.0, hidden=3.0, attention=5.0)

    def states(m: int, layer: int) -> float:
        mine = mapped(objective.projection, twins.tokens(student.hidden[m], batch))
        return (mine - twins.tokens(teacher.hidden[layer], batch)).square().mean().item()

    def attention(m: int, layer: int) -> float:
        return twins.naive_score_error(student.qkv[m][:2], teacher.qkv[layer][:2], batch, 2)

    terms = objective(student, teacher, batch)
    assert terms["embedding"].item() == close(2 * states(0, 0))
    assert terms["hidden"].item() == close(3 * (states(1, 2) + states(2, 4)))
    assert terms["attention"].item() == close(5 * (attention(1, 2) + attention(2, 4)))


def test_tinybert_learns_a_map_only_where_widths_differ() -> None:
    batch = toy.batch(LENGTHS)
    assert not list(TinyBERT(STUDENT, TEACHER).parameters())
    objective = TinyBERT(NARROW, TEACHER)
    terms = objective(*traces(batch, student=NARROW), batch)
    learnt = list(objective.parameters())
    assert [tuple(p.shape) for p in learnt] == [(8, 4), (8,)]
    gradients = torch.autograd.grad(terms["hidden"] + terms["embedding"], learnt)
    assert all(g.abs().sum() > 0 for g in gradients)
    assert not any(g is not None for g in torch.autograd.grad(terms["attention"], learnt, allow_unused=True))


@few
@given(batch=twins.batches(), seed=SEEDS, shape=st.sampled_from([STUDENT, NARROW]))
def test_minilm_equals_its_equations(batch: Batch, seed: int, shape: Shape) -> None:
    student, teacher = traces(batch, seed, shape)
    terms = MiniLM(shape, TEACHER)(student, teacher, batch)
    (qs, ks, vs), (qt, kt, vt) = student.qkv[2], teacher.qkv[4]
    assert terms["attention"].item() == close(twins.naive_relation((qs, ks), (qt, kt), batch, 2))
    assert terms["value"].item() == close(twins.naive_relation((vs, vs), (vt, vt), batch, 2))


@few
@given(batch=twins.batches(), seed=SEEDS, heads=st.sampled_from([1, 2, 4]), layers=st.tuples(*[st.integers(1, 2)] * 2))
def test_minilm2_equals_its_equations(batch: Batch, seed: int, heads: int, layers: tuple[int, int]) -> None:
    student, teacher = traces(batch, seed, NARROW)
    objective = MiniLM2(NARROW, TEACHER, heads=heads, student_layer=layers[0], teacher_layer=layers[1])
    terms = objective(student, teacher, batch)
    for name, s, t in zip(terms, student.qkv[layers[0]], teacher.qkv[layers[1]], strict=True):
        assert terms[name].item() == close(twins.naive_relation((s, s), (t, t), batch, heads) / 3)


@few
@given(batch=twins.batches(), seed=SEEDS)
def test_alp_equals_its_equations(batch: Batch, seed: int) -> None:
    student, teacher = traces(batch, seed)
    objective = ALP(STUDENT, TEACHER, hidden=3.0)
    layers = [twins.firsts(teacher.hidden[layer], batch) for layer in (1, 2, 3, 4)]
    total, read = 0.0, dict[str, float]()
    for m in (1, 2):
        rows = twins.firsts(student.hidden[m], batch)
        for b, row in enumerate(rows):
            energies = torch.stack([row @ layer[b] for layer in layers])
            shares = (energies - energies.logsumexp(0)).exp().tolist()
            mixed = sum(share * layer[b] for share, layer in zip(shares, layers, strict=True))
            total += (row - mixed).square().mean().item() / len(rows)
            for layer, share in enumerate(shares, start=1):
                read[f"reads/{m}/{layer}"] = read.get(f"reads/{m}/{layer}", 0.0) + share / len(rows)
    assert objective(student, teacher, batch)["hidden"].item() == close(3 * total)
    assert {name: x.item() for name, x in objective.observed.items()} == {name: close(x) for name, x in read.items()}


def test_alp_of_equal_teacher_layers_that_the_student_has_is_zero() -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = traces(batch)
    same = teacher._replace(hidden=dict.fromkeys(teacher.hidden, teacher.hidden[1]))
    assert ALP(STUDENT, TEACHER)(same, same, batch)["hidden"].item() == pytest.approx(0.0, abs=1e-9)
