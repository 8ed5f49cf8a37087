"""Masks take away what their criterion says, exactly as many, along their schedule; merging keeps the function."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lad_dist.compression import compressed_module
from lad_dist.compression.pruning.criteria import CRITERIA, Adapting, AdaptingPaper, Iterative, Magnitude, Movement
from lad_dist.compression.pruning.module import GlobalPruning, largest
from lad_dist.compression.pruning.schedule import Pattern, Schedule
from lad_dist.config.errors import UserError
from lad_dist.core.step_state import StepState
from lad_dist.models import loading
from lad_dist.models.dims import encoder_layers
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.train import train


def pruned(**options: Any) -> tuple[PreTrainedModel, GlobalPruning]:
    model = toy.compress(toy.new_model(), "prune", **options)
    return model, pruning_of(model)


def pruning_of(model: PreTrainedModel) -> GlobalPruning:
    (pruning,) = (m for m in compressed_module.compressed_modules(model) if isinstance(m, GlobalPruning))
    return pruning


def run_steps(model: PreTrainedModel, pruning: GlobalPruning, steps: int) -> None:
    """Train so many steps towards nothing in particular."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        pruning.on_step_start(StepState(step, steps, 0))
        optimizer.zero_grad()
        toy.logits(model).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5), ("1:4", 0.5), ("8x2", 0.7)])
def test_it_reaches_the_sparsity_and_merges_into_the_same_function(
    criterion: str, pattern: str, sparsity: float
) -> None:
    model, pruning = pruned(sparsity=sparsity, criterion=criterion, pattern=pattern, update_every=3)
    assert torch.equal(toy.logits(model), toy.logits(toy.new_model()))  # nothing has gone yet
    run_steps(model, pruning, 20)
    assert pruning.sparsity == pytest.approx(sparsity, abs=0.005)
    expected = toy.logits(model)
    zeros = sum(int((module.origin[~module.mask.keep] != 0).sum()) for module in pruning.masked.values())
    assert zeros > 0  # a mask hides weights, it does not change them
    merged = compressed_module.merge_all(model)
    assert torch.equal(toy.logits(merged), expected)
    assert set(merged.state_dict()) == set(toy.new_model().state_dict())
    assert not compressed_module.compressed_modules(merged)
    layers = [m.weight for m in encoder_layers(model).modules() if isinstance(m, nn.Linear)]
    assert 1 - sum(int(w.count_nonzero()) for w in layers) / sum(w.numel() for w in layers) >= pruning.sparsity


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0, 0.99))
def test_exactly_so_many_go_and_the_least_important_first(values: list[int], sparsity: float) -> None:
    """With equals among them."""
    importance = torch.tensor(values, dtype=torch.float)
    stay, threshold = largest(importance, sparsity)
    gone = round(sparsity * len(values))
    assert int((~stay).sum()) == gone
    if 0 < gone < len(values):
        assert importance[~stay].max() == threshold
        assert importance[stay].min() >= threshold


def test_one_ranking_for_all_weights() -> None:
    """The naive twin: sort every weight by its size."""
    _, pruning = pruned(sparsity=0.6)
    importance = torch.cat([module.origin.detach().abs().flatten() for module in pruning.masked.values()])
    limit = importance.sort().values[round(0.6 * len(importance)) - 1]
    pruning.tighten(0.6)
    for module in pruning.masked.values():
        assert torch.equal(module.mask.keep, module.origin.detach().abs() > limit)
    shares = {module.mask.keep.float().mean().item() for module in pruning.masked.values()}
    assert len(shares) > 3  # not one share for each matrix


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4x2"])
def test_patterns(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    _, pruning = pruned(sparsity=0.5, pattern=pattern)
    for sparsity in (0.2, 0.5):
        pruning.tighten(sparsity)
        assert pruning.sparsity == pytest.approx(sparsity, abs=0.002)
        for module in pruning.masked.values():
            keep = module.mask.keep
            if parsed.group:
                assert (keep.unflatten(1, (-1, parsed.group)).sum(-1) >= parsed.keep).all()
            else:
                blocks = keep.unflatten(0, (-1, 4)).unflatten(2, (-1, 2)).transpose(1, 2).flatten(2)
                assert (blocks.all(-1) | ~blocks.any(-1)).all()
    if pattern == "2:4":  # of each four, the two largest
        for module in pruning.masked.values():
            groups = module.origin.detach().abs().unflatten(1, (-1, 4))
            twin = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.argsort(-1)[..., 2:], True)
            assert torch.equal(module.mask.keep, twin.flatten(1))


@given(st.integers(2, 400), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.floats(0.01, 0.99), st.integers(1, 50))
def test_the_schedule_rises_to_the_end(
    steps: int, ends: tuple[float, float], sparsity: float, update_every: int
) -> None:
    schedule = Schedule(sparsity, 0.0, min(ends), max(ends), update_every)
    sparsities = [schedule.sparsity_at(step, steps) for step in range(steps)]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == sparsity
    first, last = schedule.span(steps)
    assert all(x == 0 for x in sparsities[:first])
    assert all(x == sparsity for x in sparsities[last:])


def test_the_schedule_by_hand() -> None:
    """Half way a cubic has done 7 / 8 of it."""
    schedule = Schedule(0.8, 0.2, 0.1, 0.5, 1)
    assert schedule.sparsity_at(9, 100) == 0
    assert schedule.sparsity_at(10, 100) == pytest.approx(0.2)
    assert schedule.sparsity_at(30, 100) == pytest.approx(0.8 - 0.6 / 8)
    assert schedule.sparsity_at(50, 100) == 0.8


def test_scores_learn_by_the_published_gradients() -> None:
    """Of a gate m: movement ∂L/∂m, adapting ∂L/∂m · t σ'(t (θ - c)), with ∂L/∂m = ∂L/∂(w m) · w, also where m is 0."""
    weight = torch.randn(4, 6)
    upstream = torch.randn(4, 6)
    for kind in (Movement, Adapting):
        torch.manual_seed(1)
        mask = kind(weight)
        mask.keep.copy_(torch.rand(4, 6) > 0.5)
        mask.set_threshold(torch.tensor(0.3))
        (mask(weight) * upstream).sum().backward()
        expected = upstream * weight
        if kind is Adapting:
            gate = (mask.scores.detach().view(4, 6) - 0.3).double().requires_grad_()
            (slope,) = torch.autograd.grad(torch.sigmoid(gate).sum(), gate)
            expected = expected * slope.float()
        assert mask.scores.grad is not None
        torch.testing.assert_close(mask.scores.grad.view(4, 6), expected)


def test_scores_start_at_magnitudes_or_from_noise_as_published() -> None:
    weight = torch.randn(200, 300)
    assert torch.equal(Adapting(weight).importance(weight), Magnitude(weight).importance(weight))
    noise = AdaptingPaper(weight).importance(weight)
    assert noise.std().item() == pytest.approx(0.001, rel=0.05)


def test_movement_counts_what_training_would_move_away_from_nothing() -> None:
    mask, weight = Movement(torch.ones(1, 2)), torch.tensor([[1.0, 1.0]])
    loss = (mask(weight) * torch.tensor([[-1.0, 1.0]])).sum()  # wants the first larger and the second smaller
    loss.backward()
    assert mask.scores.grad is not None
    with torch.no_grad():
        mask.scores -= 0.1 * mask.scores.grad
    first, second = mask.importance(weight)[0].tolist()
    assert first > second


@pytest.mark.parametrize("recover", [True, False])
def test_connections_come_back_where_they_may(recover: bool) -> None:
    _, pruning = pruned(sparsity=0.5, criterion="adapting", recover=recover)
    pruning.tighten(0.5)
    before = [module.mask.keep.clone() for module in pruning.masked.values()]
    for module in pruning.masked.values():
        module.mask.scores.data.neg_()
    pruning.tighten(0.5)
    returned = sum(
        int((module.mask.keep & ~old).sum()) for module, old in zip(pruning.masked.values(), before, strict=True)
    )
    assert (returned > 0) is recover
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("criterion", ["adapting", "iterative"])
def test_the_base_stays_as_it_was(criterion: str) -> None:
    """Bit for bit, also where a copy of it was trained; the head has learnt."""
    model, pruning = pruned(sparsity=0.5, criterion=criterion, modules=r"(embeddings|layer)\.")
    run_steps(model, pruning, 10)
    original = dict(toy.new_model().named_parameters())
    merged = dict(compressed_module.merge_all(model).named_parameters())
    moved = {
        name
        for name, weight in original.items()
        if not torch.equal(merged[name][merged[name] != 0], weight[merged[name] != 0])
    }
    assert moved == {name for name in original if name.startswith(("classifier.", "bert.pooler."))}
    for name, module in pruning.masked.items():
        assert torch.equal(module.origin, original[f"{name}.weight"])


def test_iterative_trains_a_copy_until_the_last_weights_have_gone() -> None:
    model, pruning = pruned(sparsity=0.5, criterion="iterative", update_every=1)
    first = next(iter(pruning.masked.values()))
    mask = first.mask
    assert isinstance(mask, Iterative)
    starts = mask.trained.detach().clone()
    pruning.on_step_start(StepState(0, 10, 0))
    toy.logits(model).sum().backward()
    assert mask.trained.grad is not None
    assert mask.trained.grad.abs().sum() > 0
    with torch.no_grad():
        mask.trained += 1.0
    assert torch.equal(mask(first.origin), (starts + 1.0).view_as(mask.keep) * mask.keep)
    pruning.on_step_start(StepState(5, 10, 0))
    assert torch.equal(mask(first.origin), starts.view_as(mask.keep) * mask.keep)


def test_scores_learn_before_the_first_weights_go() -> None:
    model, pruning = pruned(sparsity=0.5, criterion="adapting", update_every=20)
    pruning.on_step_start(StepState(0, 1000, 0))
    assert pruning.sparsity == 0
    toy.logits(model).square().sum().backward()
    for module in pruning.masked.values():
        (scores,) = module.mask.parameters()
        assert scores.grad is not None
        assert scores.grad.abs().sum() > 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_steps_that_are_left_out_change_no_sparsity(criterion: str) -> None:
    """Those at which the last weights were to go as well, and after a resumption in between."""
    model, pruning = pruned(sparsity=0.5, criterion=criterion, end=0.6, update_every=1)
    for step in (0, 1, 2):
        pruning.on_step_start(StepState(step, 10, 0))
    assert pruning.sparsity < 0.5
    again, resumed = pruned(sparsity=0.5, criterion=criterion, end=0.6, update_every=1)
    again.load_state_dict(model.state_dict())
    for running in (pruning, resumed):
        running.on_step_start(StepState(9, 10, 0))
        assert running.sparsity == pytest.approx(0.5, abs=1e-4)
    assert all(mask.rewound for mask in pruning.modules() if isinstance(mask, Iterative))


def test_a_weight_that_the_head_shares_is_refused() -> None:
    torch.manual_seed(0)
    model = loading.create_model({"model_type": "bert", **toy.SIZES}, "mlm", vocab_size=90)
    with pytest.raises(UserError, match="word_embeddings shares the weight of another module; leave it out of"):
        toy.compress(model, "prune", sparsity=0.5, modules="word_embeddings")


def test_only_weights_that_train_are_pruned() -> None:
    model = toy.new_model()
    encoder_layers(model)[0].requires_grad_(False)
    toy.compress(model, "prune", sparsity=0.5)
    assert not any(".layer.0." in name for name in pruning_of(model).masked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "compression prune: sparsity: input should be less than 1"),
        ({}, "compression prune: sparsity: missing"),
        ({"sparsity": 0.5, "criterion": "size"}, "compression prune: criterion: "),
        ({"sparsity": 0.5, "begin": 0.5, "end": 0.2}, "compression prune: begin = 0.5 is later than end = 0.2"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "compression prune: pattern: must be"),
        ({"sparsity": 0.5, "modules": "("}, "compression prune: modules: not a regular expression"),
        (
            {"sparsity": 0.5, "modules": "nowhere"},
            "compression prune: no linear map's or embedding's name matches 'nowhere'",
        ),
        ({"sparsity": 0.6, "pattern": "2:4"}, "compression prune: sparsity = 0.6, but 2:4 takes 0.5 away at most"),
        ({"sparsity": 0.2, "pattern": "2:5"}, "columns, which 5 does not divide"),
        ({"sparsity": 0.2, "pattern": "7x1"}, "no whole blocks of 7 x 1"),
        ({"sparsity": 0.2, "initial": 0.6}, "initial = 0.6 is more than sparsity = 0.2"),
        ({"sparsity": 0.5, "criterion": "movement", "end": 0.0}, "before the first step nothing has moved"),
        ({"sparsity": 0.5, "criterion": "movement", "initial": 0.1}, "before the first step nothing has moved"),
    ],
)
def test_mistakes_are_refused_before_any_weight_is_read(
    options: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    tables["compression"] = [{"name": "prune", **options}]
    with pytest.raises(UserError) as caught:
        resolve_run(toy.parsed(tables))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_pruned_is_not_pruned_again() -> None:
    with pytest.raises(UserError, match="is pruned already"):
        toy.compress(pruned(sparsity=0.5)[0], "prune", sparsity=0.5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_optimizer_forgets_what_is_gone(
    stage: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the step at which weights go, their moments are 0, those of the rest are not; and they stay 0."""
    from lad_dist.training import engine

    moments: list[tuple[Tensor, Tensor]] = []
    reset_optimizer_state = engine.reset_optimizer_state

    def watched(deepspeed_engine: Any, masks: Any) -> None:
        masks = list(masks)
        reset_optimizer_state(deepspeed_engine, masks)
        if masks and not moments:
            moments.extend(_moments_of(deepspeed_engine, *masks[0]))

    monkeypatch.setattr("lad_dist.training.trainer.reset_optimizer_state", watched)
    compressions = [{"name": "prune", "sparsity": 0.6, "begin": 0.5}]
    changes = {"run.steps": 4, "compression": compressions, "deepspeed": {"zero_optimization": {"stage": stage}}}
    train(toy.parsed(toy.task_config(tmp_path, world.files, world.teacher, world.pretrained), changes))
    assert moments
    for moment, keep in moments:
        assert (moment[~keep] == 0).all()
        assert (moment[keep] != 0).float().mean() > 0.9


def _moments_of(deepspeed_engine: Any, weight: nn.Parameter, keep: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the optimizer's moments of a weight, each with the mask, in one process."""
    if deepspeed_engine.zero_optimization_stage() == 0:
        state = deepspeed_engine.optimizer.state.get(weight, {})
        return [(state[key], keep) for key in ("exp_avg", "exp_avg_sq") if key in state]
    mapping = weight._hp_mapping  # type: ignore[attr-defined]
    return [(mapping.get_hp_fragment(key).view_as(keep), keep) for key in ("exp_avg", "exp_avg_sq")]


def test_masks_after_low_rank_are_on_the_factors() -> None:
    model = toy.compress(toy.new_model(), "low_rank", keep=0.5)
    toy.compress(model, "prune", sparsity=0.5)
    pruning = pruning_of(model)
    assert all(name.endswith((".inner", ".outer")) for name in pruning.masked)
    pruning.tighten(0.5)
    expected = toy.logits(model)
    compact = compressed_module.replace_all(copy.deepcopy(model), compressed_module.COMPACT)
    torch.testing.assert_close(toy.logits(compact), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(toy.logits(compressed_module.merge_all(model)), expected, rtol=1e-5, atol=1e-5)
