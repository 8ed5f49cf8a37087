"""Properties of every objective: packing, identities, output specs, memory, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
from naive_twins import LENGTHS, NARROW, STUDENT, TEACHER, random_outputs
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.config.load import keyword_parameters
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.models import loading
from lad_dist.models.dims import model_dims
from lad_dist.models.forward import compute_outputs
from lad_dist.objectives.lad import LAD
from lad_dist.objectives.registry import OBJECTIVES

WITH_TEACHER = sorted(name for name, kind in OBJECTIVES.items() if kind.requires_teacher)
WITH_ATTENTION = [name for name in WITH_TEACHER if OBJECTIVES[name](STUDENT, TEACHER).student_spec.qkv]
MIXING = {"alp", "emd", "lad"}  # a student layer learns from several teacher layers at once


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_loss_does_not_depend_on_how_sequences_are_packed(name: str) -> None:
    """Same sequences in another order, in shared spans, and padded: the same terms, through a real model."""
    torch.manual_seed(0)
    sizes = {**toy.SIZES, "initializer_range": 0.2}  # logits far enough apart that rounding is small beside them
    student, teacher = (
        loading.create_model(sizes, "classification", vocab_size=50, labels=toy.LABELS).eval() for _ in range(2)
    )
    dims = model_dims(student.config, "classification", labels=2)
    objective = OBJECTIVES[name](dims, dims)
    flat = toy.batch(LENGTHS, labels=[0, 1, 1])
    lengths = [7, 5, 3]
    ids = flat.input_ids.split(LENGTHS)
    other = toy.batch(lengths, labels=[1, 0, 1])._replace(input_ids=torch.cat([ids[2], ids[0], ids[1]]))
    layouts = [flat, other, toy.packed(flat, 9)]
    if name != "lad":  # it compares padding too, as published
        layouts.append(toy.batch(LENGTHS, labels=[0, 1, 1], pad_to=9))
    values = []
    for batch in layouts:
        with torch.no_grad():
            outputs = compute_outputs(student, batch, objective.student_spec)
            target = compute_outputs(teacher, batch, objective.teacher_spec)
            values.append({key: term.item() for key, term in objective(outputs, target, batch).items()})
    for terms in values[1:]:
        assert terms == pytest.approx(values[0], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "name", [name for name in WITH_TEACHER if OBJECTIVES[name](STUDENT, TEACHER).teacher_spec.logits]
)
def test_outputs_beyond_the_vocabulary_are_not_compared(name: str) -> None:
    """The vocabulary of the teacher, of the student or of both is padded."""
    batch, terms = toy.batch(LENGTHS), []
    student, teacher = random_outputs(batch)
    for padding in ((0, 0), (0, 3), (3, 0), (2, 3)):
        objective = OBJECTIVES[name](STUDENT._replace(vocabulary=2), TEACHER._replace(vocabulary=2))
        padded = (
            x._replace(logits=F.pad(x.logits, (0, n), value=9.0))
            for x, n in zip((student, teacher), padding, strict=True)
        )
        terms.append(objective(*padded, batch)["soft"])
    assert all(torch.equal(term, terms[0]) for term in terms)


def test_gates_are_not_supervised_by_outputs_beyond_the_vocabulary() -> None:
    batch, terms = toy.batch(LENGTHS), []
    student, teacher = random_outputs(batch)
    padded = TEACHER._replace(num_outputs=TEACHER.num_outputs + 3, vocabulary=TEACHER.num_outputs)
    objective = LAD(STUDENT._replace(vocabulary=TEACHER.num_outputs), padded, gate_supervision=1.0)
    for value in (0.0, 9.0):
        target = teacher._replace(logits=F.pad(teacher.logits, (0, 3), value=value))
        terms.append(objective(student, target, batch)["gate_supervision"])
    assert torch.equal(*terms)


@pytest.mark.parametrize("name", sorted(set(WITH_TEACHER) - MIXING))
def test_a_student_equal_to_the_teacher_has_loss_zero(name: str) -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = random_outputs(batch)
    options = {"hard": 0.0} if "hard" in keyword_parameters(OBJECTIVES[name]) else {}
    terms = OBJECTIVES[name](TEACHER, TEACHER, **options)(teacher, teacher, batch)
    assert terms
    assert "hard" not in terms
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(dict.fromkeys(terms, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_order_of_heads_does_not_matter(name: str) -> None:
    """A permutation of both models' heads changes nothing; one of the student's alone changes the terms."""
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    objective = OBJECTIVES[name](STUDENT, TEACHER).eval()

    def flipped(outputs: ModelOutputs) -> ModelOutputs:
        return outputs._replace(qkv={layer: tuple(x.flip(1) for x in qkv) for layer, qkv in outputs.qkv.items()})

    def terms(a: ModelOutputs, b: ModelOutputs) -> dict[str, float]:
        return {key: term.item() for key, term in objective(a, b, batch).items()}

    unflipped = terms(student, teacher)
    assert terms(flipped(student), flipped(teacher)) == pytest.approx(unflipped, rel=1e-5)
    assert terms(flipped(student), teacher) != pytest.approx(unflipped, rel=1e-3)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_every_term_teaches_the_student(name: str) -> None:
    """Terms have gradients for all tensors of `student_spec`, and for no others."""
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    student = student._replace(logits=student.logits.requires_grad_())
    objective = OBJECTIVES[name](STUDENT, TEACHER)
    inputs: dict[str, Tensor | None] = {"logits": student.logits}
    inputs |= {f"hidden {layer}": x for layer, x in student.hidden.items()}
    inputs |= {f"qkv {layer} {n}": x for layer, qkv in student.qkv.items() for n, x in enumerate(qkv)}
    differentiated = set()
    for term in objective(student, teacher, batch).values():
        gradients = torch.autograd.grad(term, list(inputs.values()), allow_unused=True, retain_graph=True)
        moved = {key for key, g in zip(inputs, gradients, strict=True) if g is not None and g.abs().sum() > 0}
        assert moved
        differentiated |= moved
    spec = objective.student_spec
    assert ("logits" in differentiated) == spec.logits
    assert {int(key.split()[1]) for key in differentiated if key.startswith("hidden")} == set(spec.hidden)
    assert {int(key.split()[1]) for key in differentiated if key.startswith("qkv")} == set(spec.qkv)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_may_have_more_precision_than_the_student(name: str) -> None:
    """Losses are in fp32 and see all of it: nothing rounds a teacher to its student."""
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    objective = OBJECTIVES[name](STUDENT, TEACHER).bfloat16()
    rounded = ModelOutputs(
        None if student.logits is None else student.logits.bfloat16(),
        {layer: x.bfloat16() for layer, x in student.hidden.items()},
        {layer: (q.bfloat16(), k.bfloat16(), v.bfloat16()) for layer, (q, k, v) in student.qkv.items()},
    )
    terms = objective(rounded, teacher, batch)
    assert {x.dtype for x in terms.values()} == {torch.float32}
    if objective.teacher_spec.logits:  # a change that bf16 would round away
        nudged = teacher._replace(logits=teacher.logits * (1 + 1e-4))
        assert objective(rounded, nudged, batch)["soft"] != terms["soft"]


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_no_scores_are_stored_for_the_backward(name: str) -> None:
    """No stored tensor is as large as the scores [U, H, S, S] of one layer."""
    batch = toy.batch([64, 64])
    student, teacher = random_outputs(batch)
    objective = OBJECTIVES[name](STUDENT, TEACHER)
    stored: list[int] = []

    def pack(x: Tensor) -> Tensor:
        stored.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sum(objective(student, teacher, batch).values())
    assert max(stored, default=0) < 2 * TEACHER.num_attention_heads * 64 * 64 / 4


REFUSED: list[tuple[str, dict[str, Any], ModelDims, ModelDims, str]] = [
    ("alp", {}, NARROW, TEACHER, "4 wide"),
    ("distilbert", {}, NARROW, TEACHER, "4 wide"),
    ("distilbert", {"soft_tokens": "all"}, STUDENT, TEACHER, "is for a corpus"),
    ("emd", {}, STUDENT._replace(num_attention_heads=4), TEACHER, "4 heads and the teacher 2"),
    ("kd", {}, STUDENT, TEACHER._replace(head="none"), "no head"),
    ("lad", {}, NARROW, TEACHER, "4 wide"),
    ("lad", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
    ("lad", {"norm": "sequence"}, STUDENT, TEACHER, "data.pad_to"),
    ("mgskd", {"heads": 3}, STUDENT, TEACHER, "3 does not divide a width of 8"),
    ("mgskd", {"angle_heads": 3}, STUDENT, TEACHER, "angle_heads: 3 does not divide a width of 8"),
    ("mgskd", {"lower": 3}, STUDENT, TEACHER, "the student has 2 layers"),
    ("mgskd", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
    ("minilm", {}, STUDENT._replace(num_attention_heads=4), TEACHER, "4 heads and the teacher 2"),
    ("minilm2", {"heads": 3}, STUDENT, TEACHER, "does not divide"),
    ("minilm2", {"teacher_layer": 9}, STUDENT, TEACHER, "the model has 4 layers"),
    ("pkd", {}, NARROW, TEACHER, "4 wide"),
    ("pkd", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
    ("pkd", {}, STUDENT._replace(num_hidden_layers=1), TEACHER, "take kd"),
    ("tinybert", {}, STUDENT._replace(num_attention_heads=4), TEACHER, "4 heads and the teacher 2"),
    ("tinybert", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
]


def test_objectives_that_accept_different_widths() -> None:
    batch = toy.batch(LENGTHS)
    accepted = set()
    for name in WITH_TEACHER:
        try:
            objective = OBJECTIVES[name](NARROW, TEACHER)
        except UserError:
            continue
        accepted.add(name)
        student, teacher = random_outputs(batch, student=NARROW)
        assert all(term.isfinite() for term in objective(student, teacher, batch).values())
    assert set(WITH_TEACHER) - accepted == {name for name, _, student, *_ in REFUSED if student is NARROW}


@pytest.mark.parametrize(("name", "options", "student", "teacher", "message"), REFUSED)
def test_models_and_options_that_exclude_each_other_are_refused(
    name: str, options: dict, student: ModelDims, teacher: ModelDims, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        OBJECTIVES[name](student, teacher, **options)


@pytest.mark.parametrize("name", ["emd", "tinybert"])
def test_a_weight_of_zero_leaves_the_term_out(name: str) -> None:
    """The others stay as they are; without attention, heads may differ."""
    batch = toy.batch(LENGTHS)
    student, teacher = random_outputs(batch)
    terms = OBJECTIVES[name](STUDENT, TEACHER)(student, teacher, batch)
    for left_out in ("attention", "hidden", "embedding"):
        objective = OBJECTIVES[name](STUDENT, TEACHER, **{left_out: 0.0})
        rest = objective(student, teacher, batch)
        assert set(terms) - set(rest) == {left_out}
        assert {key: x.item() for key, x in rest.items()} == {key: terms[key].item() for key in rest}
        spec = objective.student_spec
        assert (left_out == "attention", left_out == "embedding") == (not spec.qkv, 0 not in spec.hidden)
        assert (left_out == "hidden") == (set(spec.hidden) <= {0})
    other = STUDENT._replace(num_attention_heads=4)
    terms_without = OBJECTIVES[name](other, TEACHER, attention=0.0)(*random_outputs(batch, student=other), batch)
    assert set(terms) - set(terms_without) == {"attention"}


def test_output_specs_name_only_what_is_used() -> None:
    assert OBJECTIVES["minilm2"](STUDENT, TEACHER).teacher_spec == OutputSpec(qkv=(4,))
    assert OBJECTIVES["kd"](STUDENT, TEACHER, soft=0.0).teacher_spec == OutputSpec()
    assert OBJECTIVES["lad"](STUDENT, TEACHER, soft=0.0).teacher_spec == OutputSpec(hidden=(1, 2, 3, 4))
    assert OBJECTIVES["pkd"](STUDENT, TEACHER).student_spec == OutputSpec(logits=True, hidden=(1,))
    assert OBJECTIVES["tinybert"](STUDENT, TEACHER).teacher_spec == OutputSpec(hidden=(0, 2, 4), qkv=(2, 4))
