"""What holds for every objective: packing, identities, needs, memory, refusals."""

import pytest
import torch
import toy
from naive_twins import LENGTHS, NARROW, STUDENT, TEACHER, traces
from torch import Tensor

from lad_dist.config.errors import UserError
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.models import loading
from lad_dist.models.dims import model_dims
from lad_dist.models.forward import compute_outputs
from lad_dist.objectives import OBJECTIVES

TAUGHT = sorted(name for name, kind in OBJECTIVES.items() if kind.requires_teacher)
ATTENTIVE = ["emd", "minilm", "minilm2", "tinybert"]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_loss_does_not_depend_on_how_sequences_are_packed(name: str) -> None:
    """Same sequences in another order, in shared spans, and padded: the same terms, through a real model."""
    torch.manual_seed(0)
    sizes = {**toy.SIZES, "initializer_range": 0.2}  # logits far enough apart that rounding is small beside them
    student, teacher = (
        loading.create_model(sizes, "classification", vocabulary=50, labels=toy.LABELS).eval() for _ in range(2)
    )
    size = model_dims(student.config, "classification", labels=2)
    objective = OBJECTIVES[name](size, size)
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
            seen = compute_outputs(student, batch, objective.student_outputs)
            target = compute_outputs(teacher, batch, objective.teacher_outputs)
            values.append({key: term.item() for key, term in objective(seen, target, batch).items()})
    for others in values[1:]:
        assert others == pytest.approx(values[0], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["distilbert", "kd", "mgskd", "minilm", "minilm2", "pkd", "tinybert"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name: str) -> None:
    batch = toy.batch(LENGTHS)
    _, teacher = traces(batch)
    options = {"hard": 0.0} if name in ("distilbert", "kd", "mgskd", "pkd") else {}
    terms = OBJECTIVES[name](TEACHER, TEACHER, **options)(teacher, teacher, batch)
    assert terms
    assert "hard" not in terms
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(dict.fromkeys(terms, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", ATTENTIVE)
def test_heads_have_no_order(name: str) -> None:
    """What permutes the heads of both changes nothing; of one, where heads are compared one to one, it does."""
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    objective = OBJECTIVES[name](STUDENT, TEACHER).eval()

    def turned(trace: ModelOutputs) -> ModelOutputs:
        return trace._replace(qkv={layer: tuple(x.flip(1) for x in qkv) for layer, qkv in trace.qkv.items()})

    def terms(a: ModelOutputs, b: ModelOutputs) -> dict[str, float]:
        return {key: term.item() for key, term in objective(a, b, batch).items()}

    straight = terms(student, teacher)
    assert terms(turned(student), turned(teacher)) == pytest.approx(straight, rel=1e-5)
    assert terms(turned(student), teacher) != pytest.approx(straight, rel=1e-3)


@pytest.mark.parametrize("name", TAUGHT)
def test_every_term_teaches_the_student(name: str) -> None:
    """Alone, each gives gradients of what the objective says that it needs, and of nothing else."""
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    assert student.logits is not None
    student = student._replace(logits=student.logits.requires_grad_())
    objective = OBJECTIVES[name](STUDENT, TEACHER)
    inputs: dict[str, Tensor | None] = {"logits": student.logits}
    inputs |= {f"hidden {layer}": x for layer, x in student.hidden.items()}
    inputs |= {f"qkv {layer} {n}": x for layer, qkv in student.qkv.items() for n, x in enumerate(qkv)}
    learnt = set()
    for term in objective(student, teacher, batch).values():
        gradients = torch.autograd.grad(term, list(inputs.values()), allow_unused=True, retain_graph=True)
        moved = {key for key, g in zip(inputs, gradients, strict=True) if g is not None and g.abs().sum() > 0}
        assert moved
        learnt |= moved
    needs = objective.student_outputs
    assert ("logits" in learnt) == needs.logits
    assert {int(key.split()[1]) for key in learnt if key.startswith("hidden")} == set(needs.hidden)
    assert {int(key.split()[1]) for key in learnt if key.startswith("qkv")} == set(needs.qkv)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_may_have_more_precision_than_the_student(name: str) -> None:
    """Losses are in fp32 and see all of it: nothing rounds a teacher to its student."""
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    objective = OBJECTIVES[name](STUDENT, TEACHER).bfloat16()
    rounded = ModelOutputs(
        None if student.logits is None else student.logits.bfloat16(),
        {layer: x.bfloat16() for layer, x in student.hidden.items()},
        {layer: (q.bfloat16(), k.bfloat16(), v.bfloat16()) for layer, (q, k, v) in student.qkv.items()},
    )
    terms = objective(rounded, teacher, batch)
    assert {x.dtype for x in terms.values()} == {torch.float32}
    assert teacher.logits is not None
    if objective.teacher_outputs.logits:  # a change that bf16 would round away
        nudged = teacher._replace(logits=teacher.logits * (1 + 1e-4))
        assert objective(rounded, nudged, batch)["soft"] != terms["soft"]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_no_scores_wait_for_the_backward(name: str) -> None:
    """Nothing as large as the scores [U, H, S, S] of one layer is kept."""
    batch = toy.batch([64, 64])
    student, teacher = traces(batch)
    objective = OBJECTIVES[name](STUDENT, TEACHER)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sum(objective(student, teacher, batch).values())
    assert max(kept, default=0) < 2 * TEACHER.num_attention_heads * 64 * 64 / 4


def test_where_widths_may_differ() -> None:
    batch = toy.batch(LENGTHS)
    able = set()
    for name in TAUGHT:
        try:
            objective = OBJECTIVES[name](NARROW, TEACHER)
        except UserError:
            continue
        able.add(name)
        student, teacher = traces(batch, student=NARROW)
        assert all(term.isfinite() for term in objective(student, teacher, batch).values())
    assert able == {"emd", "kd", "mgskd", "minilm", "minilm2", "tinybert"}


@pytest.mark.parametrize(
    ("name", "options", "student", "teacher", "message"),
    [
        ("alp", {}, NARROW, TEACHER, "4 wide"),
        ("distilbert", {}, NARROW, TEACHER, "4 wide"),
        ("emd", {}, STUDENT._replace(num_attention_heads=4), TEACHER, "4 heads and the teacher 2"),
        ("kd", {}, STUDENT, TEACHER._replace(head="none"), "no head"),
        ("lad", {}, NARROW, TEACHER, "4 wide"),
        ("lad", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
        ("lad", {"norm": "sequence"}, STUDENT, TEACHER, "data.pad_to"),
        ("mgskd", {"heads": 3}, STUDENT, TEACHER, "3 does not divide a width of 8"),
        ("mgskd", {"lower": 3}, STUDENT, TEACHER, "the student has 2 layers"),
        ("mgskd", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
        ("minilm", {}, STUDENT._replace(num_attention_heads=4), TEACHER, "4 heads and the teacher 2"),
        ("minilm2", {"heads": 3}, STUDENT, TEACHER, "does not divide"),
        ("minilm2", {"teacher_layer": 9}, STUDENT, TEACHER, "there are 4 layers"),
        ("pkd", {}, NARROW, TEACHER, "4 wide"),
        ("pkd", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
        ("pkd", {}, STUDENT._replace(num_hidden_layers=1), TEACHER, "take kd"),
        ("tinybert", {}, STUDENT._replace(num_attention_heads=4), TEACHER, "4 heads and the teacher 2"),
        ("tinybert", {}, STUDENT._replace(num_hidden_layers=6), TEACHER, "6 student layers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: str, options: dict, student: ModelDims, teacher: ModelDims, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        OBJECTIVES[name](student, teacher, **options)


@pytest.mark.parametrize("name", ["emd", "tinybert"])
def test_a_weight_of_zero_leaves_its_term_away(name: str) -> None:
    """The others stay as they are; without attention, heads may differ."""
    batch = toy.batch(LENGTHS)
    student, teacher = traces(batch)
    terms = OBJECTIVES[name](STUDENT, TEACHER)(student, teacher, batch)
    for gone in ("attention", "hidden", "embedding"):
        objective = OBJECTIVES[name](STUDENT, TEACHER, **{gone: 0.0})
        rest = objective(student, teacher, batch)
        assert set(terms) - set(rest) == {gone}
        assert {key: x.item() for key, x in rest.items()} == {key: terms[key].item() for key in rest}
        needs = objective.student_outputs
        assert (gone == "attention", gone == "embedding") == (not needs.qkv, 0 not in needs.hidden)
        assert (gone == "hidden") == (set(needs.hidden) <= {0})
    other = STUDENT._replace(num_attention_heads=4)
    found = OBJECTIVES[name](other, TEACHER, attention=0.0)(*traces(batch, student=other), batch)
    assert set(terms) - set(found) == {"attention"}


def test_needs_name_only_what_is_used() -> None:
    assert OBJECTIVES["minilm2"](STUDENT, TEACHER).teacher_outputs == OutputSpec(qkv=(4,))
    assert OBJECTIVES["kd"](STUDENT, TEACHER, soft=0.0).teacher_outputs == OutputSpec()
    assert OBJECTIVES["lad"](STUDENT, TEACHER, soft=0.0).teacher_outputs == OutputSpec(hidden=(1, 2, 3, 4))
    assert OBJECTIVES["pkd"](STUDENT, TEACHER).student_outputs == OutputSpec(logits=True, hidden=(1,))
    assert OBJECTIVES["tinybert"](STUDENT, TEACHER).teacher_outputs == OutputSpec(hidden=(0, 2, 4), qkv=(2, 4))
