"""Objectives that match layers, each against an independent naive version: looped over sequences, in fp64."""

from typing import Any

import naive_twins
import pytest
import torch
import torch.nn.functional as F
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT
from naive_twins import LENGTHS, NARROW, STUDENT, TEACHER, naive_cosines, naive_divergence, random_outputs, split_heads
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.config.load import read_toml
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs
from lad_dist.objectives.alp import ALP
from lad_dist.objectives.distilbert import DistilBERT
from lad_dist.objectives.kd import KD
from lad_dist.objectives.mgskd import MGSKD
from lad_dist.objectives.minilm import MiniLM
from lad_dist.objectives.minilm2 import MiniLM2
from lad_dist.objectives.pkd import PKD
from lad_dist.objectives.rkd import RKD
from lad_dist.objectives.tinybert import TinyBERT

SEEDS = st.integers(0, 1000)
few = settings(max_examples=20)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


@few
@given(
    batch=naive_twins.batches(),
    seed=SEEDS,
    mapping=st.sampled_from(["skip", "last"]),
    rows=st.sampled_from(["first", "all"]),
    normalised=st.booleans(),
)
def test_pkd_equals_the_equations(batch: Batch, seed: int, mapping: str, rows: str, normalised: bool) -> None:
    dims = STUDENT._replace(num_hidden_layers=3), TEACHER._replace(num_hidden_layers=6)
    student, teacher = random_outputs(batch, seed, *dims)
    objective = PKD(*dims, hidden=7.0, mapping=mapping, tokens=rows, normalised=normalised)  # type: ignore[arg-type]
    total, count = 0.0, 0
    for m, layer in {"skip": [(1, 2), (2, 4)], "last": [(1, 4), (2, 5)]}[mapping]:
        pick = naive_twins.first_tokens if rows == "first" else naive_twins.real_tokens
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
    objective = PKD(STUDENT._replace(num_hidden_layers=layers), TEACHER._replace(num_hidden_layers=12), mapping=mapping)  # type: ignore[arg-type]
    assert [layer for _, layer in objective.layer_map] == expected


def test_pkd_normalised_does_not_see_lengths() -> None:
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    longer = teacher._replace(hidden={layer: 3 * x for layer, x in teacher.hidden.items()})
    values = [
        [
            PKD(STUDENT, TEACHER, normalised=normalised)(student, outputs, batch)["hidden"].item()
            for outputs in (teacher, longer)
        ]
        for normalised in (True, False)
    ]
    assert values[0][0] == close(values[0][1])
    assert values[1][0] != close(values[1][1])


@few
@given(batch=naive_twins.batches(), seed=SEEDS, soft_tokens=st.sampled_from([None, "masked", "all"]))
def test_distilbert_equals_the_authors_step(batch: Batch, seed: int, soft_tokens: str | None) -> None:
    """On a corpus their command compares the logits of all tokens; with restrict_ce_to_mask those of masked ones."""
    dims, options = [STUDENT, TEACHER], {"cosine": 3.0}
    if soft_tokens and not batch.has_padding:
        dims, options = [x._replace(head="mlm") for x in dims], {"cosine": 3.0, "soft_tokens": soft_tokens}
    objective = DistilBERT(*dims, **options)  # type: ignore[arg-type]
    spec = objective.student_spec
    assert spec.all_tokens == objective.teacher_spec.all_tokens == (options.get("soft_tokens") == "all")
    everywhere = batch._replace(head_positions=torch.arange(len(batch.input_ids)))
    student, teacher = random_outputs(everywhere if spec.all_tokens else batch, seed)
    student = student._replace(logits=student.logits.requires_grad_())
    labelled = student.logits[batch.head_positions] if spec.all_tokens else student.logits
    hidden = [torch.cat(naive_twins.sequences(x, batch)) for x in (student.hidden[2], teacher.hidden[4])]
    expected = 5 * naive_divergence(student.logits, teacher.logits, 2.0).sum(dim=1).mean()
    expected = expected + 2 * F.cross_entropy(labelled.double(), batch.labels)
    expected = expected + 3 * (1 - F.cosine_similarity(*hidden)).mean()
    loss = sum(objective(student, teacher, batch).values(), torch.tensor(0.0))
    naive_twins.assert_same_gradients(loss, expected, [student.logits, student.hidden[2]])


def test_pkd_config_equals_the_authors_loss() -> None:
    """Their weights on RTE are 0.7 of the teacher, whose divergence is a mean over labels too, 0.3 and 500."""
    config = read_toml(ROOT / "configs" / "task" / "pkd.toml")["objective"]
    dims = STUDENT._replace(num_hidden_layers=3), TEACHER._replace(num_hidden_layers=6)
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch, 0, *dims)
    student = student._replace(logits=student.logits.requires_grad_())
    firsts = [
        torch.stack([torch.stack([x[0] for x in naive_twins.sequences(outputs.hidden[m], batch)]) for m in layers])
        for outputs, layers in ((student, (1, 2)), (teacher, (2, 4)))
    ]
    patience = F.mse_loss(*(F.normalize(x, dim=2) for x in firsts))
    soft = naive_divergence(student.logits, teacher.logits, 10.0).mean()
    expected = 0.7 * soft + 0.3 * F.cross_entropy(student.logits.double(), batch.labels) + 500 * patience
    loss = sum(PKD(*dims, **{key: x for key, x in config.items() if key != "name"})(student, teacher, batch).values())
    naive_twins.assert_same_gradients(loss, expected, [student.logits, student.hidden[1], student.hidden[2]])


def mapped(linear: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(linear, torch.nn.Identity):
        return x
    assert isinstance(linear, torch.nn.Linear)
    return x @ linear.weight.detach().double().T + linear.bias.detach().double()


@few
@given(batch=naive_twins.batches(), seed=SEEDS, dims=st.sampled_from([STUDENT, NARROW]))
def test_tinybert_equals_the_equations(batch: Batch, seed: int, dims: ModelDims) -> None:
    student, teacher = random_outputs(batch, seed, dims)
    objective = TinyBERT(dims, TEACHER, embedding=2.0, hidden=3.0, attention=5.0)

    def states(m: int, layer: int) -> float:
        projected = mapped(objective.projection, naive_twins.real_tokens(student.hidden[m], batch))
        return (projected - naive_twins.real_tokens(teacher.hidden[layer], batch)).square().mean().item()

    def attention(m: int, layer: int) -> float:
        return naive_twins.naive_score_error(student.qkv[m][:2], teacher.qkv[layer][:2], batch, 2)

    terms = objective(student, teacher, batch)
    assert terms["embedding"].item() == close(2 * states(0, 0))
    assert terms["hidden"].item() == close(3 * (states(1, 2) + states(2, 4)))
    assert terms["attention"].item() == close(5 * (attention(1, 2) + attention(2, 4)))


def test_tinybert_with_both_phases_in_one() -> None:
    """LadaBERT's fourth loss is kd's."""
    batch = toy.batch(LENGTHS, labels=[0, 1, 1])
    student, teacher = random_outputs(batch)
    both = TinyBERT(STUDENT, TEACHER, soft=3.0, temperature=2.0)
    terms, first_phase = both(student, teacher, batch), TinyBERT(STUDENT, TEACHER)(student, teacher, batch)
    second_phase = KD(STUDENT, TEACHER, soft=3.0, hard=0.0, temperature=2.0)(student, teacher, batch)
    assert terms.keys() == first_phase.keys() | second_phase.keys() == {"embedding", "hidden", "attention", "soft"}
    assert all(torch.equal(term, (first_phase | second_phase)[name]) for name, term in terms.items())
    assert both.student_spec.logits
    assert both.teacher_spec.logits
    with pytest.raises(UserError, match="tinybert trains no head"):
        TinyBERT(STUDENT._replace(head="none"), TEACHER, soft=1.0)


def test_tinybert_learns_a_map_only_where_widths_differ() -> None:
    batch = toy.batch(LENGTHS)
    assert not list(TinyBERT(STUDENT, TEACHER).parameters())
    objective = TinyBERT(NARROW, TEACHER)
    terms = objective(*random_outputs(batch, student=NARROW), batch)
    learnt = list(objective.parameters())
    assert [tuple(p.shape) for p in learnt] == [(8, 4), (8,)]
    gradients = torch.autograd.grad(terms["hidden"] + terms["embedding"], learnt)
    assert all(g.abs().sum() > 0 for g in gradients)
    assert not any(g is not None for g in torch.autograd.grad(terms["attention"], learnt, allow_unused=True))


@few
@given(batch=naive_twins.batches(), seed=SEEDS, dims=st.sampled_from([STUDENT, NARROW]))
def test_minilm_equals_the_equations(batch: Batch, seed: int, dims: ModelDims) -> None:
    student, teacher = random_outputs(batch, seed, dims)
    terms = MiniLM(dims, TEACHER)(student, teacher, batch)
    (qs, ks, vs), (qt, kt, vt) = student.qkv[2], teacher.qkv[4]
    assert terms["attention"].item() == close(naive_twins.naive_relation((qs, ks), (qt, kt), batch, 2))
    assert terms["value"].item() == close(naive_twins.naive_relation((vs, vs), (vt, vt), batch, 2))


@few
@given(
    batch=naive_twins.batches(),
    seed=SEEDS,
    heads=st.sampled_from([1, 2, 4]),
    layers=st.tuples(*[st.integers(1, 2)] * 2),
)
def test_minilm2_equals_the_equations(batch: Batch, seed: int, heads: int, layers: tuple[int, int]) -> None:
    student, teacher = random_outputs(batch, seed, NARROW)
    objective = MiniLM2(NARROW, TEACHER, heads=heads, student_layer=layers[0], teacher_layer=layers[1])
    terms = objective(student, teacher, batch)
    for name, s, t in zip(terms, student.qkv[layers[0]], teacher.qkv[layers[1]], strict=True):
        assert terms[name].item() == close(naive_twins.naive_relation((s, s), (t, t), batch, heads) / 3)


@few
@given(batch=naive_twins.batches(), seed=SEEDS)
def test_alp_equals_the_equations(batch: Batch, seed: int) -> None:
    student, teacher = random_outputs(batch, seed)
    objective = ALP(STUDENT, TEACHER, hidden=3.0)
    layers = [naive_twins.first_tokens(teacher.hidden[layer], batch) for layer in (1, 2, 3, 4)]
    total, weights = 0.0, dict[str, float]()
    for m in (1, 2):
        rows = naive_twins.first_tokens(student.hidden[m], batch)
        for b, row in enumerate(rows):
            energies = torch.stack([row @ layer[b] for layer in layers])
            shares = (energies - energies.logsumexp(0)).exp().tolist()
            mixed = sum(share * layer[b] for share, layer in zip(shares, layers, strict=True))
            total += (row - mixed).square().mean().item() / len(rows)
            for layer, share in enumerate(shares, start=1):
                key = f"teacher_layer_weight/{m}/{layer}"
                weights[key] = weights.get(key, 0.0) + share / len(rows)
    assert objective(student, teacher, batch)["hidden"].item() == close(3 * total)
    assert {name: x.item() for name, x in objective.metrics.items()} == {name: close(x) for name, x in weights.items()}


def test_alp_of_equal_teacher_layers_that_the_student_has_is_zero() -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = random_outputs(batch)
    same = teacher._replace(hidden=dict.fromkeys(teacher.hidden, teacher.hidden[1]))
    assert ALP(STUDENT, TEACHER)(same, same, batch)["hidden"].item() == pytest.approx(0.0, abs=1e-9)


Groups = list[tuple[Tensor, Tensor, list[tuple[int, list[int]]]]]


def naive_pairs(groups: Groups, heads: int) -> Tensor:
    """Return MGSKD's P over groups of student rows, teacher rows, and the neighbours of each vertex."""
    squares = []
    for student, teacher, _ in groups:
        for s, t in zip(*(split_heads(x, heads) for x in (student, teacher)), strict=True):
            squares += [(s @ s.T / s.shape[1] ** 0.5 - t @ t.T / t.shape[1] ** 0.5).square().flatten()]
    return torch.cat(squares).mean() if squares else torch.tensor(0.0, dtype=torch.float64)


def naive_angles(groups: Groups, heads: int) -> tuple[Tensor, int]:
    """Return the sum of MGSKD's A over such groups, and the number of triplets of different places."""
    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    for student, teacher, angles_at in groups:
        for s, t in zip(*(split_heads(x, heads) for x in (student, teacher)), strict=True):
            for j, places in angles_at:
                cosines = [naive_cosines(x, j)[places][:, places] for x in (s, t)]
                total = total + F.smooth_l1_loss(*cosines, reduction="sum")
                count += len(places) * (len(places) - 1)
    return total, max(1, count)


def naive_neighbours(attention: Tensor, vertices: int, neighbours: int) -> list[tuple[int, list[int]]]:
    """Return the most attended positions, and the positions that each of them attends to most."""
    most_attended = attention.sum(dim=0).argsort(descending=True)[:vertices].tolist()
    return [
        (j, [i for i in attention[j].argsort(descending=True).tolist() if i != j][:neighbours]) for j in most_attended
    ]


@few
@given(
    batch=naive_twins.batches(),
    seed=SEEDS,
    dims=st.sampled_from([STUDENT, NARROW]),
    heads=st.sampled_from([1, 2]),
    few_angles=st.booleans(),
    additions=st.sampled_from([{}, {"angle_heads": 2, "sample_pairs": 7.0, "ranking": "attention"}]),
)
def test_mgskd_equals_the_authors_loss(
    batch: Batch, seed: int, dims: ModelDims, heads: int, few_angles: bool, additions: dict[str, Any]
) -> None:
    """Values and gradients, by default and with this project's additions."""
    student, teacher = random_outputs(batch, seed, dims)
    vertices, neighbours = (2 if few_angles and not batch.packed else 20), (3 if few_angles else 20)
    options = {"token": 2.0, "span": 3.0, "sample": 5.0, "heads": heads, **additions}
    terms = MGSKD(dims, TEACHER, vertices=vertices, neighbours=neighbours, **options)(student, teacher, batch)
    groups: dict[str, Groups] = {"token": [], "span": []}
    attention_scores = naive_twins.naive_scores(*teacher.qkv[2][:2], batch, 2)
    states = naive_twins.sequences(student.hidden[1], batch), naive_twins.sequences(teacher.hidden[2], batch)
    for s, t, scores in zip(*states, attention_scores, strict=True):
        attention = torch.stack([torch.softmax(head, dim=1) for head in scores]).mean(dim=0)
        ranges = [list(range(n, min(n + 3, len(s)))) for n in range(0, len(s), 3)]
        spans = [torch.stack([x[tokens].mean(dim=0) for tokens in ranges]) for x in (s, t)]
        span_attention = torch.stack([torch.stack([attention[a][:, b].mean() for b in ranges]) for a in ranges])
        for name, rows, ranks in (("token", (s, t), attention), ("span", spans, span_attention)):
            ranks = ranks if additions else naive_twins.naive_ranks(rows[1], heads)
            if name == "token" or len(ranges) >= 3:
                groups[name].append((*rows, naive_neighbours(ranks, vertices, neighbours)))
    upper = naive_twins.sequences(student.hidden[2], batch), naive_twins.sequences(teacher.hidden[4], batch)
    means = [torch.stack([x.mean(dim=0) for x in side]) for side in upper]
    everyone = list(range(len(means[0])))
    samples: Groups = [(*means, [(j, everyone) for j in everyone])]
    expected = {"sample": 5 * naive_angles(samples, heads)[0] / (heads * len(everyone) ** 3)}
    if additions:
        expected["sample_pairs"] = 7 * naive_pairs(samples, heads)
    for name, weight in (("token", 2), ("span", 3)):
        total, count = naive_angles(groups[name], additions.get("angle_heads", 1))
        expected[name] = weight * (naive_pairs(groups[name], heads) + total / count)
    assert terms.keys() == expected.keys() | {"soft", "hard"}
    for name, value in expected.items():
        naive_twins.assert_same_gradients(terms[name], value + 0 * states[0][0].sum(), [*student.hidden.values()][1:])


def test_mgskd_has_the_published_heads_where_they_fit() -> None:
    wide = [dims._replace(hidden_size=width) for dims, width in ((STUDENT, 384), (TEACHER, 768))]
    assert (MGSKD(*wide).heads, MGSKD(STUDENT, TEACHER).heads) == (64, STUDENT.num_attention_heads)
    assert not MGSKD(*wide).teacher_spec.qkv


def test_mgskd_does_not_see_where_representations_are() -> None:
    """Turning the student's space changes nothing; moving it leaves the angles alone."""
    batch = toy.batch(LENGTHS)
    _, teacher = random_outputs(batch)
    objective = MGSKD(TEACHER, TEACHER, heads=1, soft=0.0, hard=0.0)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    turned = teacher._replace(hidden={layer: x @ turn for layer, x in teacher.hidden.items()})
    assert {k: x.item() for k, x in objective(turned, teacher, batch).items()} == pytest.approx(
        dict.fromkeys(("token", "span", "sample"), 0.0), abs=1e-6
    )


@few
@given(
    batch=naive_twins.batches(),
    seed=SEEDS,
    dims=st.sampled_from([STUDENT, NARROW]),
    pooled=st.sampled_from(["mean", "first"]),
    limit=st.integers(2, 5),
)
def test_rkd_equals_the_equations(batch: Batch, seed: int, dims: ModelDims, pooled: str, limit: int) -> None:
    student, teacher = random_outputs(batch, seed, dims)
    objective = RKD(dims, TEACHER, distance=3.0, angle=5.0, pooled=pooled, max_sequences=limit)  # type: ignore[arg-type]
    terms = objective(student, teacher, batch)
    points = [
        torch.stack([x.mean(dim=0) if pooled == "mean" else x[0] for x in naive_twins.sequences(hidden, batch)[:limit]])
        for hidden in (student.hidden[2], teacher.hidden[4])
    ]
    distance, angle = naive_twins.naive_relational_errors(*points)
    assert terms["distance"].item() == pytest.approx(3 * distance, rel=1e-4, abs=1e-6)
    assert terms["angle"].item() == pytest.approx(5 * angle, rel=1e-4, abs=1e-6)


def relational_terms(student: list[list[float]], teacher: list[list[float]]) -> tuple[dict[str, float], Tensor]:
    """Return RKD's terms of points, each a sequence of one token, and the gradient of the student's points."""
    batch = toy.batch([1] * len(student))
    points = torch.tensor(student, requires_grad=True)
    dims = STUDENT._replace(hidden_size=points.shape[1]), TEACHER._replace(hidden_size=len(teacher[0]))
    outputs = ModelOutputs(hidden={2: points}), ModelOutputs(hidden={4: torch.tensor(teacher)})
    terms = RKD(*dims, soft=0.0, hard=0.0)(*outputs, batch)
    sum(terms.values(), torch.tensor(0.0)).backward()
    assert points.grad is not None
    return {name: x.item() for name, x in terms.items()}, points.grad


def test_rkd_of_three_points() -> None:
    """Sides of 1, 2 and 3 on a line against 3, 4 and 5: means of 2 and 4, cosines of ±1 against 0, 0.6 and 0.8."""
    terms, _ = relational_terms([[0.0], [1.0], [3.0]], [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    distances = [(0.5 - 0.75) ** 2 / 2, (1.5 - 1.0) ** 2 / 2, (1.0 - 1.25) ** 2 / 2]
    angles = [(1 - 0.0) ** 2 / 2, (1 + 0.6) - 0.5, (1 - 0.8) ** 2 / 2]
    assert terms == {"distance": close(sum(distances) / 3), "angle": close(2 * sum(angles) / 3)}


def test_rkd_sees_neither_place_nor_turn_nor_scale() -> None:
    torch.manual_seed(0)
    points = torch.randn(6, 4)
    turned = 3 * points @ torch.linalg.qr(torch.randn(4, 4)).Q + 1000  # far away, where fp32 has few digits left
    assert relational_terms(turned.tolist(), points.tolist())[0] == {
        "distance": pytest.approx(0.0, abs=1e-6),
        "angle": pytest.approx(0.0, abs=1e-6),
    }


@pytest.mark.parametrize("count", [1, 2])
def test_rkd_without_relations_learns_nothing(count: int) -> None:
    terms, gradient = relational_terms([[1.0, 2.0], [3.0, 5.0]][:count], [[1.0], [4.0]][:count])
    assert terms == {"distance": close(0.0), "angle": close(0.0)}
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("equal", [2, 4])
def test_rkd_of_equal_points_has_a_finite_gradient(equal: int) -> None:
    """Such points have a distance of 0 and are part of no angle."""
    points = [[1.0, 2.0]] * equal + [[0.0, 1.0], [3.0, 0.0], [5.0, 5.0], [1.0, 1.0]][: 4 - equal]
    others = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    for student, teacher in ((points, others), (others, points)):
        terms, gradient = relational_terms(student, teacher)
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 10
        assert terms["distance"] > 0
        assert (terms["angle"] == 0) == (equal == 4)


def test_rkd_in_chunks_equals_the_angles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    points = torch.randn(7, 3).tolist(), torch.randn(7, 5).tolist()
    whole = relational_terms(*points)
    monkeypatch.setattr("lad_dist.objectives.rkd.CHUNK_ANGLES", 100)  # two vertices at a time
    parts = relational_terms(*points)
    assert parts[0] == pytest.approx(whole[0])
    torch.testing.assert_close(parts[1], whole[1])
