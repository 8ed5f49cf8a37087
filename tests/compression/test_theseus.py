"""Theseus: which of a predecessor's block and its successor runs when, what learns, and what is exported."""

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
from launching import ROOT
from torch import nn
from transformers import AutoModelForSequenceClassification

from lad_dist.compression import compressed_module
from lad_dist.compression.layers import keep_layers, set_dropout
from lad_dist.compression.theseus import TheseusBlock, replacement_probability
from lad_dist.config.errors import UserError
from lad_dist.config.load import read_toml
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
    paths = {}
    for family in toy_families.SIZES:
        torch.manual_seed(1)
        architecture = toy_families.architecture(family, pad_token_id=1)
        model = loading.create_model(architecture, "classification", vocab_size=300, labels=toy.LABELS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        paths[family] = tmp_path_factory.mktemp(family)
        save_model(model, paths[family])
    return paths


def loaded(folder: Path, layers: list[int] | None = None) -> PreTrainedModel:
    model = loading.load_model(str(folder), "classification", labels=toy.LABELS)
    return model if layers is None else keep_layers(model, layers)


def forced(model: PreTrainedModel, coins: list[bool]) -> PreTrainedModel:
    """Return the model in training, with these blocks replaced."""
    model.train()
    for module, coin in zip(compressed_module.compressed_modules(model), coins, strict=True):
        assert isinstance(module, TheseusBlock)
        module.runs_successor = coin
    return model


def coins_at(model: PreTrainedModel, state: StepState) -> list[bool]:
    """Return the coins of a step."""
    modules = compressed_module.compressed_modules(model)
    for module in modules:
        module.on_step_start(state)
    return [module.runs_successor for module in modules if isinstance(module, TheseusBlock)]


def assert_equal(student: ModelOutputs, other: ModelOutputs, layers: tuple[int, ...]) -> None:
    """Compare the student's layers 0, 1 and 2 with these of the other."""
    assert torch.equal(student.logits, other.logits)  # type: ignore[arg-type]
    for student_layer, layer in enumerate(layers):
        assert torch.equal(student.hidden[student_layer], other.hidden[layer])
    for student_layer, layer in enumerate(layers[1:], start=1):
        for x, y in zip(student.qkv[student_layer], other.qkv[layer], strict=True):
            assert torch.equal(x, y)


def outputs_of(model: PreTrainedModel, layers: tuple[int, ...] = (0, 1, 2), batch: Batch | None = None) -> ModelOutputs:
    output_spec = OutputSpec(logits=True, hidden=layers, qkv=layers[1:])
    return compute_outputs(model, toy.batch(LENGTHS) if batch is None else batch, output_spec)


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
    assert replacement_probability(progress, 0.2, 0.5, curriculum) == pytest.approx(expected)


def test_the_config_has_the_curriculum_of_the_authors() -> None:
    """On MRPC they add 0.0006 at each of 1,725 steps to 0.3, up to 1."""
    options = read_toml(ROOT / "configs" / "task" / "theseus.toml")["compression"][0]
    start, end, curriculum = (options[key] for key in ("start", "end", "curriculum"))
    for step in range(1725):
        probability = replacement_probability(step / 1725, start, end, curriculum)
        assert probability == pytest.approx(min(1.0, 0.3 + 0.0006 * step), abs=5e-3)


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "constant"]))
def test_it_never_falls_and_ends_at_one(start: float, end: float, curriculum: Any) -> None:
    curve = [replacement_probability(progress, start, end, curriculum) for progress in np.linspace(0, 1, 50)]
    assert all(start <= one <= other <= 1 for one, other in pairwise(curve))
    assert curve[-1] == 1


def coins(probability: float, seed: int, number: int, steps: int = 500) -> np.ndarray:
    module = TheseusBlock([nn.Identity()], nn.Identity(), lambda _: probability, number)
    tosses = []
    for step in range(steps):
        module.on_step_start(StepState(step, steps, seed))
        tosses.append(module.runs_successor)
    return np.array(tosses)


@settings(max_examples=20)
@given(st.floats(0, 1), st.integers(0, 2**31), st.integers(1, 24))
def test_coins_fall_as_often_as_they_should(probability: float, seed: int, number: int) -> None:
    """Within five standard deviations and two coins; always and never exactly."""
    tosses = coins(probability, seed, number)
    deviation = np.sqrt(probability * (1 - probability) * len(tosses))
    assert abs(tosses.sum() - probability * len(tosses)) <= 5 * deviation + 2 * (0 < probability < 1)


def test_a_coin_of_probability_zero_or_one_has_one_side() -> None:
    assert not coins(0.0, 0, 1).any()
    assert coins(1.0, 0, 1).all()


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 24))
def test_coins_are_functions_of_seed_step_and_block(seed: int, number: int) -> None:
    """The same in any process and after any past; of neighbours they agree about half of the time."""
    tosses = coins(0.5, seed, number)
    assert np.array_equal(tosses, coins(0.5, seed, number))
    for other in (coins(0.5, seed + 1, number), coins(0.5, seed, number + 1), np.roll(tosses, 1)):
        assert 0.35 < (tosses == other).mean() < 0.65


@settings(max_examples=30)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_blocks_end_where_other_methods_match_layers(sizes: tuple[int, int]) -> None:
    """Each layer of the predecessor is in one block, in order, and blocks differ by one layer at most."""
    old, new = sizes
    model = loading.create_model({**toy.SIZES, "num_hidden_layers": new}, "none", vocab_size=8)
    with torch.device("meta"):
        predecessor = new_model(architecture_config({**toy.SIZES, "num_hidden_layers": old}, 8), "none")
    layers = list(encoder_layers(predecessor))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lad_dist.compression.theseus._layers_of", lambda *_: encoder_layers(predecessor))
        patch.setattr("lad_dist.compression.theseus.load_hf_config", lambda _: predecessor.config)
        toy.compress(model, "theseus", predecessor="folder")
    modules = compressed_module.compressed_modules(model)
    blocks = [list(module.predecessor) for module in modules if isinstance(module, TheseusBlock)]
    assert [layer for block in blocks for layer in block] == layers
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    ends = [layers.index(block[-1]) + 1 for block in blocks]
    dims = ModelDims(new, 32, 4, "none", 0)
    assert ends == [layer for _, layer in uniform_layer_map("", dims, dims._replace(num_hidden_layers=old))]


# What


@pytest.mark.parametrize("family", REPLACEABLE)
def test_with_no_block_replaced_it_is_the_predecessor(family: str, folders: dict[str, Path]) -> None:
    """Each layer of the student returns the hidden states after a block, and q, k and v of the block's last layer."""
    model = toy.compress(loaded(folders[family], [1, 3]), "theseus")
    assert_equal(
        outputs_of(forced(model, [False, False])), outputs_of(loaded(folders[family]).eval(), (0, 2, 4)), (0, 2, 4)
    )


@pytest.mark.parametrize("family", REPLACEABLE)
def test_with_all_blocks_replaced_it_is_the_plain_student(family: str, folders: dict[str, Path]) -> None:
    student = outputs_of(loaded(folders[family], [1, 3]).eval())
    model = toy.compress(loaded(folders[family], [1, 3]), "theseus")
    assert_equal(outputs_of(forced(model, [True, True])), student, (0, 1, 2))
    assert_equal(outputs_of(forced(model, [False, True]).eval()), student, (0, 1, 2))  # evaluation asks no coin
    assert_equal(outputs_of(compressed_module.merge_all(model).train()), student, (0, 1, 2))  # type: ignore[arg-type]
    assert not compressed_module.compressed_modules(model)


@pytest.mark.parametrize("coins", [[True, False], [False, True]])
def test_with_one_block_replaced_it_runs_these_layers_in_a_row(coins: list[bool], folders: dict[str, Path]) -> None:
    """It computes what a plain model with the layers that the coins choose does.

    These are 1 and 2, or 3 and 4 of the predecessor, and the first or the second of the student, which differs from it.
    """
    torch.manual_seed(7)
    model, plain = loaded(folders["bert"], [1, 3]), loaded(folders["bert"])
    for weight in encoder_layers(model).parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    student, predecessor = list(encoder_layers(model)), list(encoder_layers(plain))
    rows = [[student[0]], predecessor[2:]] if coins[0] else [predecessor[:2], [student[1]]]
    stack = encoder_layers(plain)
    del stack[:]
    stack.extend(layer for row in rows for layer in row)
    expected = outputs_of(plain.eval(), (0, len(rows[0]), 3))
    assert_equal(outputs_of(forced(toy.compress(model, "theseus"), coins)), expected, (0, len(rows[0]), 3))


def test_a_constant_probability_of_zero_and_one(folders: dict[str, Path]) -> None:
    """Until the end of the replacing the predecessor runs, and from then on the student."""
    model = toy.compress(loaded(folders["bert"], [1, 3]), "theseus", start=0.0, end=0.5, curriculum="constant")
    assert coins_at(model, StepState(0, 10, 3)) == coins_at(model, StepState(4, 10, 3)) == [False, False]
    assert coins_at(model, StepState(5, 10, 3)) == [True, True]
    always = toy.compress(loaded(folders["bert"], [1, 3]), "theseus", start=1.0)
    assert all(coins_at(always, StepState(step, 10, 3)) == [True, True] for step in range(10))


def test_coins_of_blocks_differ(folders: dict[str, Path]) -> None:
    model = toy.compress(loaded(folders["bert"], [1, 3]), "theseus", end=1.0, curriculum="constant")
    assert {tuple(coins_at(model, StepState(step, 64, 0))) for step in range(64)} == {
        (False, False), (False, True), (True, False), (True, True)
    }  # fmt: skip


@pytest.mark.parametrize("coins", [[True, False], [False, True], [False, False], [True, True]])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(coins: list[bool], frozen: bool, folders: dict[str, Path]) -> None:
    """A layer that ran has gradients, one that did not has gradients of 0, the predecessor has None.

    Embeddings and head have gradients unless they are frozen.
    """
    model = forced(toy.compress(loaded(folders["bert"], [1, 3]), "theseus", frozen=frozen), coins)
    logits = outputs_of(model).logits
    logits.square().sum().backward()
    for module, coin in zip(compressed_module.compressed_modules(model), coins, strict=True):
        assert isinstance(module, TheseusBlock)
        gradients = [weight.grad for weight in module.successor.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients if gradient is not None) == coin
        assert all(weight.grad is None for weight in module.predecessor.parameters())
    inside = {id(weight) for weight in encoder_layers(model).parameters()}
    assert all((weight.grad is None) == frozen for weight in model.parameters() if id(weight) not in inside)


@pytest.mark.parametrize("replaced", [True, False])
def test_only_successors_drop(replaced: bool, folders: dict[str, Path]) -> None:
    model = forced(
        toy.compress(set_dropout(loaded(folders["bert"], [1, 3]), 0.5, 0.5), "theseus"), [replaced, replaced]
    )
    model.get_submodule("bert.embeddings").eval()
    once, again = (outputs_of(model).hidden[2] for _ in range(2))
    assert torch.equal(once, again) != replaced


def test_compressed_modules_inside_the_successors(folders: dict[str, Path]) -> None:
    """Compressions before it change the layers, and nothing else."""
    model = toy.compress(toy.compress(loaded(folders["bert"], [1, 3]), "low_rank", keep=0.5), "theseus")
    plain = compressed_module.merge_all(toy.compress(loaded(folders["bert"], [1, 3]), "low_rank", keep=0.5)).eval()
    merged = compressed_module.merge_all(model).eval()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(outputs_of(merged).logits, outputs_of(plain).logits)  # type: ignore[arg-type]


# In a run


def tables(world: World, work: Path, objective: str = "supervised", **arguments: Any) -> dict[str, Any]:
    """Return the config of a run whose student is cut out of the teacher."""
    config = toy.task_config(work, world.files, world.teacher, world.teacher)
    config |= {"objective": {"name": objective}, "compression": [{"name": "theseus", **arguments}]}
    if objective == "supervised":
        del config["teacher"]
    return config


@pytest.mark.parametrize("objective", ["supervised", "kd", "lad", "tinybert", "minilm"])
def test_it_trains_and_the_export_is_the_trained_student(
    objective: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the predecessor still runs: the export is what evaluation sees, of the student's size and names."""
    student_outputs: list[ModelOutputs] = []
    export = Distiller.export

    def watched(distiller: Distiller) -> PreTrainedModel:
        with torch.no_grad():
            student_outputs.append(outputs_of(distiller.student.eval()))  # type: ignore[arg-type]
        return export(distiller)

    monkeypatch.setattr(Distiller, "export", watched)
    rows: list[dict[str, Any]] = []
    config = tables(world, tmp_path, objective, start=0.3, end=1.0, frozen=objective == "supervised")
    result = train(toy.parsed(config, {"run.steps": 4}), rows.append)
    assert len({row["loss"] for row in rows if "loss" in row}) == 4
    folder = result.folder / "export"
    plain = keep_layers(loaded(world.teacher), [2, 4])
    assert result.results["student"]["parameters"] == count_parameters(plain)
    exported = AutoModelForSequenceClassification.from_pretrained(folder)
    assert exported.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        again = outputs_of(loading.load_model(str(folder), "classification", labels=toy.LABELS).eval()).logits
    torch.testing.assert_close(again, student_outputs[0].logits, rtol=1e-5, atol=1e-5)
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
    result = train(toy.parsed(tables, {"run.steps": 2}))
    weights = loading.load_model(str(result.folder / "export"), "mlm").state_dict()
    before = loading.load_model(str(world.pretrained), "mlm").state_dict()
    word_embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(weights[word_embeddings], before[word_embeddings])
    assert torch.equal(weights["cls.predictions.bias"], before["cls.predictions.bias"])


def test_memory_and_checkpoints_are_as_estimated(world: World, tmp_path: Path) -> None:
    """The predecessor's weights count once, without gradients and moments."""
    origin = toy.model(tmp_path / "wide", world.tokenizer, "classification", toy.LABELS, hidden_size=128)
    layer = count_parameters(encoder_layers(loaded(origin))[0])
    both = []
    for name, compressions in (("plain", []), ("theseus", [{"name": "theseus", "frozen": False}])):
        student_tables = tables(world, tmp_path) | {
            "compression": compressions,
            "student": {"path": str(origin), "num_hidden_layers": 2},
        }
        stage = {"stage": 1, "reduce_bucket_size": 1000}
        changes = {"run.name": name, "run.steps": 2, "run.save_every": 1, "deepspeed.zero_optimization": stage}
        config = toy.parsed(student_tables, changes)
        estimate = cost_model.estimate(run_spec.resolve_run(config), 1)
        (checkpoint, *_) = sorted((train(config).folder / "checkpoints").glob("step-*"))
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        both.append((estimate, size))
    (plain, plain_size), (wrapped, wrapped_size) = both
    assert wrapped.memory.weights == plain.memory.weights + 4 * 4 * layer
    assert (wrapped.memory.gradients, wrapped.memory.optimizer) == (plain.memory.gradients, plain.memory.optimizer)
    assert (wrapped.student, wrapped.export) == (plain.student, plain.export)
    assert wrapped.checkpoint == plain.checkpoint + 4 * 4 * layer
    assert wrapped_size - plain_size == pytest.approx(4 * 4 * layer, rel=0.05)


# Mistakes


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"student.path": "{pretrained}"}, "{pretrained} has no classification head with the labels no, yes, and a new"),
    ({"student.embeddings": "random"}, "frozen embeddings and head have to be the predecessor's; set student.path to"),
    ({"predecessor": "{pretrained}"}, "frozen embeddings and head have to be the predecessor's; set student.path to"),
    ({"frozen": False, "predecessor": "{nowhere}"}, "{nowhere}: cannot read a model"),
    ({"frozen": False, "predecessor": "{weightless}"}, "{weightless}: no weights, neither"),
    ({"frozen": False, "predecessor": "{narrow}"}, "compression theseus: the student is 32 wide and {narrow} 16; take"),
    (
        {"frozen": False, "predecessor": "{shallow}"},
        "2 student layers, only 1 in {shallow}; set student.num_hidden_layers to less",
    ),
    ({"frozen": False, "predecessor": "{roberta}"}, "the student is of the family bert, {roberta} of roberta"),
    ({"student.path": "{albert}"}, "compression theseus: all layers of albert are one, and none can be replaced"),
    ({"student.path": "{modernbert}"}, "compression theseus: the layers of {modernbert} differ in kind, and none can"),
    ({"student.path": "{deberta-v2}"}, "compression theseus: the layers of {deberta-v2} differ in kind, and none can"),
    (
        {"student.path": "{mpnet}", "frozen": False, "predecessor": "{other-mpnet}"},
        "layers of mpnet need the positions of their own model; leave predecessor away",
    ),
    ({"student.path": None, "student.architecture": toy.SIZES}, "a new student starts from no model; name a"),
    ({"start": 1.5}, "compression theseus: start: input should be less than or equal to 1"),
    ({"curriculum": "linaer"}, "compression theseus: curriculum: input should be 'linear' or 'constant'"),
]


@pytest.fixture(scope="module")
def places(world: World, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = tmp_path_factory.mktemp("places")
    sizes = {"narrow": {"hidden_size": 16}, "shallow": {"num_hidden_layers": 1}, "weightless": {}}
    models = {name: toy.model(work / name, world.tokenizer, "none", **changes) for name, changes in sizes.items()}
    (models["weightless"] / "model.safetensors").unlink()
    other = work / "other"
    other.symlink_to(folders["mpnet"])
    paths = vars(world) | folders | models | {"nowhere": work / "nowhere", "other-mpnet": other}
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_one_line_before_any_weight_is_read(
    changes: dict[str, Any], message: str, world: World, places: dict[str, str], tmp_path: Path, no_weights: None
) -> None:
    filled = {key: x.format_map(places) if isinstance(x, str) else x for key, x in changes.items()}
    config = tables(world, tmp_path, **{key: filled.pop(key) for key in list(filled) if "." not in key})
    config["student"]["tokenizer"] = str(world.tokenizer)
    with pytest.raises(UserError) as caught:
        run_spec.resolve_run(toy.parsed(config, filled))
    assert message.format_map(places) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_predecessor_than_the_students_origin(world: World, tmp_path: Path) -> None:
    """Then the student's own embeddings and head learn."""
    arguments = {"predecessor": str(world.teacher), "frozen": False}
    config = tables(world, tmp_path, **arguments)
    result = train(toy.parsed(config, {"student.path": str(world.pretrained), "run.steps": 1}))
    assert json.loads((result.folder / "results.json").read_text())["steps"] == 1
