"""Heads and units by importance: what is measured, what goes, and what the two exports hold."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import toy_families
from conftest import World
from torch import Tensor, nn

from lad_dist.compression import compact, compressed_module, footprint
from lad_dist.compression.heads import ImportancePruning, UnitMask
from lad_dist.compression.pruning.schedule import Schedule
from lad_dist.config.errors import UserError
from lad_dist.core.outputs import OutputSpec
from lad_dist.core.step_state import StepState
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.models import loading
from lad_dist.models.dims import encoder_layers
from lad_dist.models.families import family_of
from lad_dist.models.forward import compute_outputs
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training import run_spec
from lad_dist.training.train import train

HALF = {"name": "heads", "heads": 0.5, "units": 0.5, "update_every": 1}


def prunings(model: nn.Module) -> list[ImportancePruning]:
    modules = compressed_module.compressed_modules(model)
    return [module for module in modules if isinstance(module, ImportancePruning)]


def thinned(model: PreTrainedModel, share: float, **options: Any) -> PreTrainedModel:
    """Return the model after pruning by random importance."""
    toy.compress(model, "heads", **options)
    torch.manual_seed(1)
    for pruning in prunings(model):
        for mask in pruning.masks:
            mask.importance = torch.rand(len(mask.keep))
        pruning.tighten(share)
    return model


def test_importance_is_the_gradient_of_a_gate_token_by_token() -> None:
    """The naive twin has a gate for each token and head, or unit, and differentiates by it."""
    model = toy.new_model()
    gates: list[Tensor] = []

    def gate(count: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            gates.append(torch.ones(*inputs[0].shape[:-1], count, requires_grad=True))
            return (inputs[0] * gates[-1].repeat_interleave(inputs[0].shape[-1] // count, dim=-1),)

        return hook

    twin = copy.deepcopy(model)
    for layer in encoder_layers(twin):
        layer.get_submodule("attention.output.dense").register_forward_pre_hook(gate(4))
        layer.get_submodule("output.dense").register_forward_pre_hook(gate(64))
    toy.logits(twin).square().sum().backward()
    expected = [x.grad.abs().sum(dim=(0, 1)) for x in gates if x.grad is not None]

    toy.compress(model, "heads", heads=0.5, units=0.5)
    toy.logits(model).square().sum().backward()
    heads, units = prunings(model)
    measured = [mask.measured for pair in zip(heads.masks, units.masks, strict=True) for mask in pair]
    assert len(measured) == len(expected) == 8
    for actual, gradient in zip(measured, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-7)


def test_a_step_adds_to_a_moving_sum() -> None:
    model = toy.compress(toy.new_model(), "heads", heads=0.5, update_every=4)
    (pruning,) = prunings(model)
    for value in (1.0, 3.0):
        for mask in pruning.masks:
            mask.measured += value
        pruning.on_step_end()
    assert all(mask.importance.tolist() == [3.75] * 4 for mask in pruning.masks)
    assert all(mask.measured.tolist() == [0.0] * 4 for mask in pruning.masks)


def test_the_least_important_of_all_layers_go_relative_to_their_layer() -> None:
    """Each layer keeps its most important one, and what went stays away."""
    model = toy.compress(toy.new_model(), "heads", heads=0.5)
    (pruning,) = prunings(model)
    values = [[1, 2, 3, 4], [100, 200, 300, 400], [0.0, 0.0, 0.0, 1e-9], [5, 5, 5, 5]]
    for mask, importance in zip(pruning.masks, values, strict=True):
        mask.importance = torch.tensor(importance, dtype=torch.float32)
    pruning.tighten(0.5)
    # Relative to the norms: .18 .37 .55 .73 in the first two, 0 0 0 1 in the third, .5 each in the last.
    half = [False, False, True, True]
    expected = [half, half, [False, False, False, True], [True, False, True, True]]
    assert [mask.keep.tolist() for mask in pruning.masks] == expected
    for mask in pruning.masks:
        mask.importance = 1 - mask.keep.float()
    pruning.tighten(0.5)
    assert [mask.keep.tolist() for mask in pruning.masks] == expected


def test_a_loss_that_is_not_finite_says_nothing() -> None:
    mask = UnitMask(2, 3, torch.device("cpu"))
    pruning = ImportancePruning([mask], Schedule(0.5, update_every=2))
    for gradient in (1.0, torch.nan, torch.inf):
        mask.measure(torch.ones(4, 6), torch.full((4, 6), gradient))
        pruning.on_step_end()
    assert mask.importance.tolist() == [12.0, 12.0]


@pytest.mark.parametrize("head", ["classification", "mlm"])
@pytest.mark.parametrize("family", toy_families.SIZES)
def test_both_exports_have_the_trained_function(family: str, head: str, tmp_path: Path) -> None:
    """The ordinary form has zeros in its old shape, the compact form has no rows for them; q, k and v too."""
    tokenizer = load_tokenizer(toy_families.tokenizer(family, tmp_path / "tokenizer"))
    labels = toy.LABELS if head == "classification" else ()
    model = toy_families.new_model(family, head, tokenizer, labels=labels)
    model.name_or_path = str(tmp_path)
    options = {"heads": 0.5, "units": 0.5} if family_of(model.config).flat else {"units": 0.5}
    everything = OutputSpec(logits=True, hidden=(0, 1, 2, 3, 4), qkv=(1, 4))
    with torch.no_grad():
        trained = compute_outputs(thinned(model, 0.5, **options), toy.BATCH, everything)
        packed = compact.pack(model)
        counted = footprint.footprint(model, toy.BATCH)
        plain = compressed_module.merge_all(copy.deepcopy(model))
        assert isinstance(plain, PreTrainedModel)
        assert counted["parameters"] == sum(weight.numel() for weight in plain.parameters())
        torch.testing.assert_close(compute_outputs(plain, toy.BATCH, everything), trained, rtol=1e-4, atol=1e-4)
        plain.save_pretrained(tmp_path)
        packed.save(tmp_path, None, None)
        thin = compact.load_compact(tmp_path)
        assert counted["stored"] < counted["parameters"]
        if head == "mlm":  # the compact form of a pre-trained student is the encoder alone
            states = compute_outputs(thin, toy.BATCH, everything._replace(logits=False))
            torch.testing.assert_close(states.hidden, trained.hidden, rtol=1e-4, atol=1e-4)
        else:
            assert counted["stored"] == sum(weight.numel() for weight in thin.parameters())
            torch.testing.assert_close(toy.logits(thin), trained.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "heads and units are 0, which leaves all as it is"),
        ({"heads": 1.0}, "heads: input should be less than 1"),
        ({"heads": 0.9}, "heads = 0.9, but each of the 2 layers keeps one; set at most 0.75"),
        ({"units": 0.99}, "units = 0.99, but each of the 2 layers keeps one; set at most 0.984"),
        ({"heads": 0.5, "end": 0.0}, "before the first step no importance is measured; set end above 0"),
        ({"heads": 0.5, "begin": 0.6}, "begin = 0.6 is later than end = 0.5"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str, world: World, tmp_path: Path, no_weights: None) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher)
    compressions = [{"name": "heads", **options}]
    with pytest.raises(UserError, match=f"compression heads: {message}"):
        run_spec.resolve_run(toy.parsed(tables, {"objective": {"name": "kd"}, "compression": compressions}))


def test_heads_stay_where_layers_share_position_biases(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toy_families.tokenizer("mpnet", tmp_path))
    with pytest.raises(UserError, match="the attention of mpnet needs all heads; set heads = 0"):
        toy.compress(toy_families.new_model("mpnet", "none", tokenizer), "heads", heads=0.5)


def test_a_run_of_one_step_has_measured_nothing(world: World, tmp_path: Path) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher, compression=[HALF])
    with pytest.raises(UserError, match="after 0 steps the loss says nothing of layer 1; raise"):
        train(toy.parsed(tables, {"run.steps": 1, "objective": {"name": "kd"}}))


def test_a_layer_that_the_loss_does_not_reach_is_named(world: World, tmp_path: Path) -> None:
    """MiniLMv2 reads q, k and v of the last layer, and nothing after them."""
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher, compression=[HALF])
    with pytest.raises(UserError, match="the loss says nothing of layer 2; raise"):
        train(toy.parsed(tables, {"run.steps": 4, "objective": {"name": "minilm2", "heads": 4}}))


def test_pruning_waits_for_the_first_measurement() -> None:
    """After a first update that was skipped, and of layers that did not run in a step."""
    model = toy.compress(toy.new_model(), "heads", heads=0.5, end=0.4, update_every=1)
    (pruning,) = prunings(model)
    for step in range(8):
        pruning.on_step_start(StepState(step, 10, 0))
        assert (sum(int(mask.keep.sum()) for mask in pruning.masks) == 8) == (step == 7)
        for number, mask in enumerate(pruning.masks):
            mask.measured += torch.nan if step < 5 else float(number < 2 or step == 6) * torch.rand(4)
        pruning.on_step_end()


@pytest.mark.parametrize("objective", ["kd", "lad"])
def test_a_run_ends_with_the_share_of_heads_and_units(objective: str, world: World, tmp_path: Path) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher, compression=[HALF])
    result = train(toy.parsed(tables, {"run.steps": 4, "objective": {"name": objective}}))
    export = result.folder / "export"
    plain = loading.load_model(str(export), "classification", require_head=True)
    thin = compact.load_compact(export)
    torch.testing.assert_close(toy.logits(thin), toy.logits(plain), rtol=1e-5, atol=1e-5)
    outputs = [layer.get_submodule("attention.output.dense") for layer in encoder_layers(thin)]
    widths = [module.in_features for module in outputs if isinstance(module, nn.Linear)]
    assert sum(widths) == 2 * 32 // 2
    stored = json.loads((result.folder / "results.json").read_text())["student"]
    assert stored["stored"] < stored["parameters"]
    assert "zero rows" in (export / "README.md").read_text()


def test_a_resumed_student_measures_on() -> None:
    model, again = (toy.compress(toy.new_model(), "heads", heads=0.5, update_every=2) for _ in range(2))
    toy.logits(model).square().sum().backward()
    (pruning,), (resumed,) = prunings(model), prunings(again)
    pruning.on_step_end()
    pruning.last_step = 0
    again.load_state_dict(model.state_dict())
    for running in (pruning, resumed):
        running.on_step_start(StepState(5, 10, 0))
    assert resumed.last_step == 5
    assert [x.keep.tolist() for x in resumed.masks] == [x.keep.tolist() for x in pruning.masks]
    assert sum(int(mask.keep.sum()) for mask in resumed.masks) == 8
