"""Layers that take the places of a predecessor's blocks: which one runs when, what it learns, what is left of it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
import toy_families
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForSequenceClassification

from lad_dist.compression import compressed_module
from lad_dist.compression.layers import keep_layers, set_dropout
from lad_dist.compression.low_rank import low_rank
from lad_dist.compression.theseus import Theseus, replacing, theseus
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelDims, ModelOutputs, OutputSpec
from lad_dist.core.step_state import StepState
from lad_dist.models import loading
from lad_dist.models.dims import count_parameters, encoder_layers
from lad_dist.models.forward import compute_outputs
from lad_dist.models.hf_config import architecture_config
from lad_dist.models.loading import PreTrainedModel, new_model, save_model
from lad_dist.objectives.base import uniform_layer_map
from lad_dist.training import cost_model, run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.train import train

LENGTHS = [5, 3, 9]
EVERYTHING = OutputSpec(logits=True, hidden=(0, 1, 2), qkv=(1, 2))
# Families whose layers can be replaced; some take padded batches, some return tuples.
REPLACEABLE = [name for name in toy_families.SIZES if name not in ("albert", "deberta-v2", "modernbert")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, four layers, weights far from the tiny ones of a new model."""
    found = {}
    for family in toy_families.SIZES:
        torch.manual_seed(1)
        architecture = toy_families.architecture(family, pad_token_id=1)
        made = loading.create_model(architecture, "classification", vocabulary=300, labels=toy.LABELS)
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        found[family] = tmp_path_factory.mktemp(family)
        save_model(made, found[family])
    return found


def loaded(folder: Path, kept: list[int] | None = None) -> PreTrainedModel:
    model = loading.load_model(str(folder), "classification", labels=toy.LABELS)
    return model if kept is None else keep_layers(model, kept)


def forced(model: PreTrainedModel, coins: list[bool]) -> PreTrainedModel:
    """In training, with these blocks replaced."""
    model.train()
    for part, coin in zip(compressed_module.compressed_modules(model), coins, strict=True):
        assert isinstance(part, Theseus)
        part.replaced = coin
    return model


def at(model: PreTrainedModel, moment: StepState) -> list[bool]:
    """The coins of a moment."""
    for part in compressed_module.compressed_modules(model):
        part.on_step_start(moment)
    return [part.replaced for part in compressed_module.compressed_modules(model) if isinstance(part, Theseus)]


def compared(mine: ModelOutputs, its: ModelOutputs, layers: tuple[int, ...]) -> None:
    """The student's layers 0, 1 and 2 with these of the other."""
    assert torch.equal(mine.logits, its.logits)  # type: ignore[arg-type]
    for layer, other in enumerate(layers):
        assert torch.equal(mine.hidden[layer], its.hidden[other])
    for layer, other in enumerate(layers[1:], start=1):
        for x, y in zip(mine.qkv[layer], its.qkv[other], strict=True):
            assert torch.equal(x, y)


def traced(model: PreTrainedModel, layers: tuple[int, ...] = (0, 1, 2), batch: Batch | None = None) -> ModelOutputs:
    needs = OutputSpec(logits=True, hidden=layers, qkv=layers[1:])
    return compute_outputs(model, toy.batch(LENGTHS) if batch is None else batch, needs)


# When


@pytest.mark.parametrize(
    ("curriculum", "progress", "expected"),
    [
        ("linear", 0.0, 0.2),
        ("linear", 0.25, 0.6),
        ("linear", 0.4999, 0.99984),
        ("linear", 0.5, 1.0),
        ("linear", 0.9, 1.0),
        ("constant", 0.0, 0.2),
        ("constant", 0.4999, 0.2),
        ("constant", 0.5, 1.0),
    ],
)
def test_probability_of_the_successors(curriculum: Any, progress: float, expected: float) -> None:
    assert replacing(progress, 0.2, 0.5, curriculum) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "constant"]))
def test_it_never_falls_and_ends_at_one(start: float, end: float, curriculum: Any) -> None:
    found = [replacing(progress, start, end, curriculum) for progress in np.linspace(0, 1, 50)]
    assert all(start <= one <= other <= 1 for one, other in pairwise(found))
    assert found[-1] == 1


def coins(probability: float, seed: int, number: int, steps: int = 500) -> np.ndarray:
    part = Theseus([nn.Identity()], nn.Identity(), lambda _: probability, number)
    found = []
    for step in range(steps):
        part.on_step_start(StepState(step, steps, seed))
        found.append(part.replaced)
    return np.array(found)


@settings(max_examples=20)
@given(st.floats(0, 1), st.integers(0, 2**31), st.integers(1, 24))
def test_coins_fall_as_often_as_they_should(probability: float, seed: int, number: int) -> None:
    """Within five standard deviations and two coins; always and never exactly."""
    found = coins(probability, seed, number)
    deviation = np.sqrt(probability * (1 - probability) * len(found))
    assert abs(found.sum() - probability * len(found)) <= 5 * deviation + 2 * (0 < probability < 1)


def test_a_coin_of_probability_zero_or_one_has_one_side() -> None:
    assert not coins(0.0, 0, 1).any()
    assert coins(1.0, 0, 1).all()


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 24))
def test_coins_are_functions_of_seed_step_and_block(seed: int, number: int) -> None:
    """The same in any process and after any past; of neighbours they agree about half of the time."""
    mine = coins(0.5, seed, number)
    assert np.array_equal(mine, coins(0.5, seed, number))
    for other in (coins(0.5, seed + 1, number), coins(0.5, seed, number + 1), np.roll(mine, 1)):
        assert 0.35 < (mine == other).mean() < 0.65


@settings(max_examples=30)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_blocks_end_where_other_methods_match_layers(sizes: tuple[int, int]) -> None:
    """Each layer of the predecessor is in one block, in order, and blocks differ by one layer at most."""
    old, new = sizes
    model = loading.create_model({**toy.SIZES, "num_hidden_layers": new}, "none", vocabulary=8)
    with torch.device("meta"):
        its = new_model(architecture_config({**toy.SIZES, "num_hidden_layers": old}, 8), "none")
    wide = list(encoder_layers(its))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lad_dist.compression.theseus._layers_of", lambda *_: encoder_layers(its))
        patch.setattr("lad_dist.compression.theseus.load_hf_config", lambda _: its.config)
        theseus(model, predecessor="there")
    blocks = [
        list(part.predecessor) for part in compressed_module.compressed_modules(model) if isinstance(part, Theseus)
    ]
    assert [layer for block in blocks for layer in block] == wide
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    ends = [wide.index(block[-1]) + 1 for block in blocks]
    shape = ModelDims(new, 32, 4, "none", 0)
    assert ends == [layer for _, layer in uniform_layer_map("", shape, shape._replace(num_hidden_layers=old))]


# What


@pytest.mark.parametrize("family", REPLACEABLE)
def test_with_no_block_replaced_it_is_the_predecessor(family: str, folders: dict[str, Path]) -> None:
    """Hidden states after each block, and q, k and v of its last layer, are there for every layer of the student."""
    model = theseus(loaded(folders[family], [1, 3]))
    compared(traced(forced(model, [False, False])), traced(loaded(folders[family]).eval(), (0, 2, 4)), (0, 2, 4))


@pytest.mark.parametrize("family", REPLACEABLE)
def test_with_all_blocks_replaced_it_is_the_plain_student(family: str, folders: dict[str, Path]) -> None:
    student = traced(loaded(folders[family], [1, 3]).eval())
    model = theseus(loaded(folders[family], [1, 3]))
    compared(traced(forced(model, [True, True])), student, (0, 1, 2))
    compared(traced(forced(model, [False, True]).eval()), student, (0, 1, 2))  # evaluation asks no coin
    compared(traced(compressed_module.merge_all(model).train()), student, (0, 1, 2))  # type: ignore[arg-type]
    assert not compressed_module.compressed_modules(model)


@pytest.mark.parametrize("coins", [[True, False], [False, True]])
def test_with_one_block_replaced_it_runs_these_layers_in_a_row(coins: list[bool], folders: dict[str, Path]) -> None:
    """As a plain model with the layers that the coins choose: of the predecessor 1 and 2, or 3 and 4; of the student,
    which was made otherwise, the first or the second."""
    torch.manual_seed(7)
    model, hand = loaded(folders["bert"], [1, 3]), loaded(folders["bert"])
    for weight in encoder_layers(model).parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    own, its = list(encoder_layers(model)), list(encoder_layers(hand))
    rows = [[own[0]], its[2:]] if coins[0] else [its[:2], [own[1]]]
    stack = encoder_layers(hand)
    del stack[:]
    stack.extend(layer for row in rows for layer in row)
    expected = traced(hand.eval(), (0, len(rows[0]), 3))
    compared(traced(forced(theseus(model), coins)), expected, (0, len(rows[0]), 3))


def test_a_constant_probability_of_zero_and_one(folders: dict[str, Path]) -> None:
    """Until the end of the replacing the predecessor runs, and from then on the student."""
    model = theseus(loaded(folders["bert"], [1, 3]), start=0.0, end=0.5, curriculum="constant")
    assert at(model, StepState(0, 10, 3)) == at(model, StepState(4, 10, 3)) == [False, False]
    assert at(model, StepState(5, 10, 3)) == [True, True]
    always = theseus(loaded(folders["bert"], [1, 3]), start=1.0)
    assert all(at(always, StepState(step, 10, 3)) == [True, True] for step in range(10))


def test_coins_of_blocks_differ(folders: dict[str, Path]) -> None:
    model = theseus(loaded(folders["bert"], [1, 3]), end=1.0, curriculum="constant")
    assert {tuple(at(model, StepState(step, 64, 0))) for step in range(64)} == {
        (False, False), (False, True), (True, False), (True, True)
    }  # fmt: skip


@pytest.mark.parametrize("coins", [[True, False], [False, True], [False, False], [True, True]])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(coins: list[bool], frozen: bool, folders: dict[str, Path]) -> None:
    """Of a layer that ran, some; of one that did not, 0 and not none; of the predecessor none. Embeddings and head have
    theirs unless they are frozen."""
    model = forced(theseus(loaded(folders["bert"], [1, 3]), frozen=frozen), coins)
    logits = traced(model).logits
    assert logits is not None
    logits.square().sum().backward()
    for part, coin in zip(compressed_module.compressed_modules(model), coins, strict=True):
        assert isinstance(part, Theseus)
        gradients = [weight.grad for weight in part.successor.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients if gradient is not None) == coin
        assert all(weight.grad is None for weight in part.predecessor.parameters())
    inside = {id(weight) for weight in encoder_layers(model).parameters()}
    assert all((weight.grad is None) == frozen for weight in model.parameters() if id(weight) not in inside)


@pytest.mark.parametrize("replaced", [True, False])
def test_only_successors_drop(replaced: bool, folders: dict[str, Path]) -> None:
    model = forced(theseus(set_dropout(loaded(folders["bert"], [1, 3]), 0.5, 0.5)), [replaced, replaced])
    model.get_submodule("bert.embeddings").eval()
    once, again = (traced(model).hidden[2] for _ in range(2))
    assert torch.equal(once, again) != replaced


def test_parts_inside_the_successors(folders: dict[str, Path]) -> None:
    """Surgeries before it have their way with the layers, and with them alone."""
    model = theseus(low_rank(loaded(folders["bert"], [1, 3]), keep=0.5))
    plain = compressed_module.merge_all(low_rank(loaded(folders["bert"], [1, 3]), keep=0.5)).eval()
    found = compressed_module.merge_all(model).eval()
    assert found.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(traced(found).logits, traced(plain).logits)  # type: ignore[arg-type]


# In a run


def tables(world: World, work: Path, objective: str = "supervised", **arguments: Any) -> dict[str, Any]:
    """A run whose student is cut out of the teacher."""
    made = toy.task_config(work, world.files, world.teacher, world.teacher)
    made |= {"objective": {"name": objective}, "compression": [{"name": "theseus", **arguments}]}
    if objective == "supervised":
        del made["teacher"]
    return made


@pytest.mark.parametrize("objective", ["supervised", "kd", "lad", "tinybert", "minilm"])
def test_it_trains_and_the_export_is_the_trained_student(
    objective: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the predecessor still runs: the export is what evaluation sees, of the student's size and names."""
    seen: dict[str, torch.Tensor] = {}
    export = Distiller.export

    def watched(method: Distiller) -> PreTrainedModel:
        with torch.no_grad():
            logits = traced(method.student.eval()).logits  # type: ignore[arg-type]
        assert logits is not None
        seen["logits"] = logits
        return export(method)

    monkeypatch.setattr(Distiller, "export", watched)
    rows: list[dict[str, Any]] = []
    words = tables(world, tmp_path, objective, start=0.3, end=1.0, frozen=objective == "supervised")
    outcome = train(toy.parsed(words, {"run.steps": 4}), rows.append)
    assert outcome.results is not None
    assert len({row["loss"] for row in rows if "loss" in row}) == 4
    folder = outcome.folder / "export"
    plain = keep_layers(loaded(world.teacher), [2, 4])
    assert outcome.results["student"]["parameters"] == count_parameters(plain)
    exported = AutoModelForSequenceClassification.from_pretrained(folder)
    assert exported.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        again = traced(loading.load_model(str(folder), "classification", labels=toy.LABELS).eval()).logits
    torch.testing.assert_close(again, seen["logits"], rtol=1e-5, atol=1e-5)
    layers = f"{plain.base_model_prefix}.encoder.layer"
    moved = {
        name for name, weight in plain.state_dict().items() if not torch.equal(exported.state_dict()[name], weight)
    }
    assert any(name.startswith(layers) for name in moved)
    assert all(name.startswith(layers) for name in moved) == (objective == "supervised")


def test_on_a_corpus(world: World, tmp_path: Path) -> None:
    """With an MLM head that stays as it is, tied to the embeddings."""
    changes = {"objective": {"name": "kd"}, "compression": [{"name": "theseus"}]}
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained, **changes)
    outcome = train(toy.parsed(tables, {"run.steps": 2}))
    weights = loading.load_model(str(outcome.folder / "export"), "mlm").state_dict()
    before = loading.load_model(str(world.pretrained), "mlm").state_dict()
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(weights[words], before[words])
    assert torch.equal(weights["cls.predictions.bias"], before["cls.predictions.bias"])


def test_memory_and_checkpoints_are_as_foreseen(world: World, tmp_path: Path) -> None:
    """The predecessor's weights count once, without gradients and moments."""
    origin = toy.model(tmp_path / "wide", world.tokenizer, "classification", toy.LABELS, hidden_size=128)
    layer = count_parameters(encoder_layers(loaded(origin))[0])
    both = []
    for name, operations in (("plain", []), ("theseus", [{"name": "theseus", "frozen": False}])):
        words = tables(world, tmp_path) | {
            "compression": operations,
            "student": {"path": str(origin), "num_hidden_layers": 2},
        }
        stage = {"stage": 1, "reduce_bucket_size": 1000}
        changes = {"run.name": name, "run.steps": 2, "run.save_every": 1, "deepspeed.zero_optimization": stage}
        config = toy.parsed(words, changes)
        foreseen = cost_model.estimate(run_spec.resolve_run(config), 1)
        (checkpoint, *_) = sorted((train(config).folder / "checkpoints").glob("step-*"))
        found = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        both.append((foreseen, found))
    (plain, its_size), (mine, my_size) = both
    assert mine.memory.weights == plain.memory.weights + 4 * 4 * layer
    assert (mine.memory.gradients, mine.memory.optimizer) == (plain.memory.gradients, plain.memory.optimizer)
    assert (mine.student, mine.export) == (plain.student, plain.export)
    assert mine.checkpoint == plain.checkpoint + 4 * 4 * layer
    assert my_size - its_size == pytest.approx(4 * 4 * layer, rel=0.05)


# Mistakes


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"student.path": "{pretrained}"}, "{pretrained} has no classification head with the labels no, yes, and a new"),
    ({"student.embeddings": "random"}, "frozen embeddings and head have to be the predecessor's; set student.path to"),
    ({"predecessor": "{pretrained}"}, "frozen embeddings and head have to be the predecessor's; set student.path to"),
    ({"frozen": False, "predecessor": "{nowhere}"}, "{nowhere}: no model can be read there"),
    ({"frozen": False, "predecessor": "{weightless}"}, "{weightless}: no weights there"),
    ({"frozen": False, "predecessor": "{narrow}"}, "surgery theseus: the student is 32 wide and {narrow} 16; take"),
    (
        {"frozen": False, "predecessor": "{shallow}"},
        "2 student layers, only 1 in {shallow}; set student.num_hidden_layers to less",
    ),
    ({"frozen": False, "predecessor": "{roberta}"}, "the student is of the family bert, {roberta} of roberta"),
    ({"student.path": "{albert}"}, "surgery theseus: all layers of albert are one, and none can be replaced"),
    ({"student.path": "{modernbert}"}, "surgery theseus: the layers of {modernbert} differ in kind, and none can"),
    ({"student.path": "{deberta-v2}"}, "surgery theseus: the layers of {deberta-v2} differ in kind, and none can"),
    (
        {"student.path": "{mpnet}", "frozen": False, "predecessor": "{other-mpnet}"},
        "layers of mpnet need the positions of their own model; leave predecessor away",
    ),
    ({"student.path": None, "student.architecture": toy.SIZES}, "a new student starts from no model; name its"),
    ({"deepspeed.zero_optimization.stage": 3}, "under ZeRO 3 the same layers must run in each step; set a stage up"),
    ({"compression": ["theseus", "theseus"]}, "it wraps layers as they are; list it once, after all others"),
    ({"compression": ["theseus", "low_rank"]}, "it wraps layers as they are; list it once, after all others"),
    ({"start": 1.5}, "surgery theseus: start: input should be less than or equal to 1"),
    ({"curriculum": "linaer"}, "surgery theseus: curriculum: input should be 'linear' or 'constant'"),
]


@pytest.fixture(scope="module")
def places(world: World, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("places")
    sizes = {"narrow": {"hidden_size": 16}, "shallow": {"num_hidden_layers": 1}, "weightless": {}}
    made = {name: toy.model(work / name, world.tokenizer, "none", **changes) for name, changes in sizes.items()}
    (made["weightless"] / "model.safetensors").unlink()
    other = work / "other"
    other.symlink_to(folders["mpnet"])
    found = vars(world) | folders | made | {"nowhere": work / "nowhere", "other-mpnet": other}
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_one_line_before_any_weight_is_read(
    changes: dict[str, Any],
    message: str,
    world: World,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "load_model", unread)
    filled = {key: x.format_map(places) if isinstance(x, str) else x for key, x in changes.items()}
    operations = {"theseus": {"name": "theseus"}, "low_rank": {"name": "low_rank", "keep": 0.5}}
    operations["theseus"] |= {key: filled.pop(key) for key in list(filled) if "." not in key and key != "compression"}
    words = tables(world, tmp_path)
    words["student"]["tokenizer"] = str(world.tokenizer)
    words["compression"] = [operations[name] for name in filled.pop("compression", ["theseus"])]
    with pytest.raises(UserError) as caught:
        run_spec.resolve_run(toy.parsed(words, filled))
    assert message.format_map(places) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_predecessor_than_the_students_origin(world: World, tmp_path: Path) -> None:
    """Then the student's own embeddings and head learn."""
    arguments = {"predecessor": str(world.teacher), "frozen": False}
    words = tables(world, tmp_path, **arguments)
    outcome = train(toy.parsed(words, {"student.path": str(world.pretrained), "run.steps": 1}))
    assert json.loads((outcome.folder / "results.json").read_text())["steps"] == 1
