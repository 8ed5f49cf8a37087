"""LadaBERT's budget: the requested weights are those that remain, in counts and in a trained student."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from conftest import World
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from launching import ROOT

from lad_dist.compression import compressed_module
from lad_dist.compression.base import CompressionContext
from lad_dist.compression.ladabert import (
    TOLERANCE,
    Factors,
    WeightCounts,
    count_weights,
    remaining_weights,
    required_sparsity,
    solve_factors,
)
from lad_dist.compression.options import LAYER_MODULES
from lad_dist.compression.products import LowRankEmbedding, LowRankLinear, linear_maps
from lad_dist.compression.pruning.module import GlobalPruning
from lad_dist.config.errors import UserError
from lad_dist.config.load import read_toml
from lad_dist.core.step_state import StepState
from lad_dist.models import loading
from lad_dist.models.dims import count_parameters
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training import run_spec
from lad_dist.training.train import train

NAMES = ("embedding", "svd", "weight")
COUNTS = WeightCounts(word_embeddings=600, linear_maps=2400, rest=100)
FACTOR = st.floats(1.0, 6.0)


def cut(model: PreTrainedModel, **options: Any) -> dict[str, float]:
    """Return what the compression reports, whose pruned weights all go at once."""
    reported: dict[str, float] = {}
    options = {"begin": 0.0, "end": 0.0, **options}
    toy.compress(model, "ladabert", CompressionContext(report=reported.update), **options)
    for module in compressed_module.compressed_modules(model):
        module.on_step_start(StepState(0, 10, seed=0))
    return reported


def nonzero(model: PreTrainedModel) -> int:
    """Weights of the compact form that are not 0."""
    return sum(
        int(weight.count_nonzero()) for _, weight in compressed_module.iter_weights(model, compressed_module.COMPACT)
    )


def test_by_hand() -> None:
    """3100 = 600 / 2 + 2400 / (3 · 4) + 100 times 600 weights."""
    factors = Factors(2.0, 3.0, 4.0)
    assert remaining_weights(COUNTS, factors) == 600.0
    for name in NAMES:
        options = {**factors._asdict(), name: None}
        assert solve_factors(COUNTS, 3100 / 600, **options) == pytest.approx(factors)
    assert solve_factors(COUNTS, None, *factors) == factors


def test_sparsity_by_hand() -> None:
    """After SVD: of 300 + 800 + 100 weights 700 are asked for, so 500 of 800 go, whatever 4 would have taken."""
    after = WeightCounts(word_embeddings=300, linear_maps=800, rest=100)
    assert required_sparsity(after, 700, 4.0) == 500 / 800
    assert required_sparsity(after, 700, None) == 500 / 800
    assert required_sparsity(after, 602, 4.0) == 0.75  # 600 is within 0.5 % of it
    assert required_sparsity(after, None, 4.0) == 0.75
    with pytest.raises(UserError, match="350 weights cannot be met"):
        required_sparsity(after, 350, None)


@settings(max_examples=60)
@given(FACTOR, FACTOR, FACTOR, st.sampled_from(NAMES))
def test_solving_returns_the_missing_factor(embedding: float, svd: float, weight: float, missing: str) -> None:
    factors = Factors(embedding, svd, weight)
    reduction = COUNTS.total / remaining_weights(COUNTS, factors)
    assume(reduction >= 1)
    options = {**factors._asdict(), missing: None}
    try:
        solved = solve_factors(COUNTS, reduction, **options)
    except UserError:
        assert factors._asdict()[missing] == pytest.approx(1.0)  # a rounding below it
        return
    assert solved == pytest.approx(factors, rel=1e-6)


@settings(max_examples=40)
@given(
    st.integers(2, 12).map(lambda n: 8 * n),
    st.integers(1, 4),
    st.integers(100, 2000),
    st.sampled_from(NAMES),
    st.lists(FACTOR, min_size=2, max_size=2),
    st.floats(1.05, 12.0),
)
def test_a_budget_is_met(
    width: int, depth: int, vocabulary: int, missing: str, factors: list[float], reduction: float
) -> None:
    """Within 0.5 %, at sizes where a rank is many per cent, or refused."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    with torch.device("meta"):
        model = toy.new_model(vocab_size=vocabulary, **sizes)
    before = count_parameters(model)
    options = dict(zip([name for name in NAMES if name != missing], factors, strict=True))
    try:
        toy.compress(model, "ladabert", reduction=reduction, **options)
    except UserError:
        return
    modules = compressed_module.compressed_modules(model)
    prunings = [module for module in modules if isinstance(module, GlobalPruning)]
    gone = sum(round(pruning.schedule.sparsity * _size(pruning)) for pruning in prunings)
    remaining = count_parameters(model) - gone
    assert before / remaining == pytest.approx(reduction, rel=TOLERANCE)


def _size(pruning: GlobalPruning) -> int:
    return sum(masked.origin.numel() for masked in pruning.masked.values())


def pruning_of(model: PreTrainedModel) -> GlobalPruning:
    (pruning,) = (m for m in compressed_module.compressed_modules(model) if isinstance(m, GlobalPruning))
    return pruning


@pytest.mark.parametrize("missing", [*NAMES, None])
def test_the_report_is_what_remains(missing: str | None) -> None:
    model = toy.new_model(vocab_size=300)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)  # no zeros but those of pruning
    before = count_parameters(model)
    options: dict[str, Any] = {"embedding": 2.0, "svd": 1.5, "weight": 2.0}
    if missing:
        options = {"reduction": 2.5} | {name: factor for name, factor in options.items() if name != missing}
    reported = cut(model, **options)
    assert before / nonzero(model) == pytest.approx(reported["budget/achieved/reduction"])
    assert reported["budget/achieved/reduction"] == pytest.approx(
        reported["budget/requested/reduction"], rel=0.005 if missing else 0.1
    )
    assert {name: reported[f"budget/requested/{name}"] for name in options} == options
    for name in NAMES:
        assert reported[f"budget/achieved/{name}"] == pytest.approx(reported[f"budget/requested/{name}"], rel=0.2)


def test_ones_leave_a_model_as_it_is() -> None:
    model = toy.new_model(vocab_size=300)
    reported = cut(model, embedding=1.0, svd=1.0, weight=1.0)
    assert not compressed_module.compressed_modules(model)
    assert set(reported.values()) == {1.0}


def test_each_factor_compresses_other_modules() -> None:
    """Pruning lies on both factors of each map of low rank, ranked together, and on no embeddings or head."""
    model = toy.new_model(vocab_size=300)
    cut(model, embedding=2.0, svd=2.0, weight=4.0)
    modules = compressed_module.compressed_modules(model)
    assert sum(isinstance(module, LowRankLinear) for module in modules) == 4 * 6
    assert sum(isinstance(module, LowRankEmbedding) for module in modules) == 1
    pruning = pruning_of(model)
    assert len(pruning.masked) == 2 * 4 * 6
    assert {name.rpartition(".")[2] for name in pruning.masked} == {"inner", "outer"}
    assert pruning.sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("modules", ["query$", r"\.dense$", "embeddings|layer"])
def test_it_holds_for_any_choice_of_maps(modules: str) -> None:
    """Products lie deeper than the maps that they stand for; what is pruned stays these maps."""
    model = toy.new_model(vocab_size=300)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    before = count_parameters(model)
    reported = cut(model, embedding=2.0, svd=2.0, weight=2.0, modules=modules)
    assert before / nonzero(model) == pytest.approx(reported["budget/achieved/reduction"])
    pruning = pruning_of(model)
    assert not [name for name in pruning.masked if "embedding" in name]


def test_pruning_alone_is_on_the_maps() -> None:
    model = toy.new_model(vocab_size=300)
    reported = cut(model, reduction=1.5, embedding=1.0, svd=1.0)
    modules = compressed_module.compressed_modules(model)
    assert not [module for module in modules if isinstance(module, LowRankLinear | LowRankEmbedding)]
    assert reported["budget/achieved/reduction"] == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize(("number", "millions"), [(1, 44), (2, 22), (3, 15), (4, 11)])
def test_the_papers_sizes(number: int, millions: int) -> None:
    """Of BERT-base, by the configs; the factors that their first lines say."""
    file = ROOT / f"configs/task/ladabert-{number}.toml"
    (options,) = read_toml(file)["compression"]
    options.pop("name")
    with torch.device("meta"):
        model = loading.create_model({"model_type": "bert"}, "classification", vocab_size=30522, labels=toy.LABELS)
    counts = count_weights(model, linear_maps(model, LAYER_MODULES, ""))
    factors = solve_factors(counts, **{"weight": None, **options})
    assert f"solved for: {factors.weight:.2f} where" in file.read_text()
    assert round(counts.total / options["reduction"] / 1e6) == millions
    toy.compress(model, "ladabert", **options)
    pruning = pruning_of(model)
    remaining = count_parameters(model) - round(pruning.schedule.sparsity * _size(pruning))
    assert remaining * options["reduction"] == pytest.approx(counts.total, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give reduction and two of embedding, svd and weight, or these three alone"),
        ({"reduction": 2.0, "svd": 2.0}, "give reduction and two of"),
        ({"reduction": 2.0, "embedding": 2.0, "svd": 2.0, "weight": 2.0}, "give reduction and two of"),
        (
            {"reduction": 1.2, "svd": 4.0, "weight": 4.0},
            "reduction = 1.2, but with svd = 4 and weight = 4 no embedding can make it less than 2.82",
        ),
        (
            {"reduction": 50.0, "embedding": 2.0, "svd": 2.0},
            "reduction = 50, but with embedding = 2 and svd = 2 no weight can make it more than 4.17",
        ),
        ({"svd": 0.5}, "svd: input should be greater than or equal to 1"),
        ({"begin": 0.6, "embedding": 2.0, "svd": 2.0, "weight": 2.0}, "begin = 0.6 is later than end = 0.5"),
        ({"embedding": 2.0, "svd": 2.0, "weight": 2.0, "modules": "nowhere"}, "no linear map's name matches 'nowhere'"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str, world: World, tmp_path: Path, no_weights: None) -> None:
    """Before weights are read."""
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher)
    listed = {"name": "ladabert", **options}
    with pytest.raises(UserError, match=f"compression ladabert: .*{message}"):
        run_spec.resolve_run(toy.parsed(tables, {"objective": {"name": "kd"}, "compression": [listed]}))


def test_a_run_trains_under_a_budget_and_reports_both(world: World, tmp_path: Path) -> None:
    """From the teacher, with the four losses; the export has the zeros, and the trained student's function."""
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher)
    factors = {"reduction": 2.0, "embedding": 2.0, "svd": 1.5}
    listed = {"name": "ladabert", **factors, "activation_aware": True, "update_every": 2}
    objective = {"name": "tinybert", "soft": 1.0}
    config = toy.parsed(tables, {"student.num_hidden_layers": 4, "objective": objective, "compression": [listed]})
    rows: list[dict[str, Any]] = []
    results = train(config, rows.append).results
    logged = {name: value for name, value in rows[0].items() if name.startswith(("budget/", "initial_error/"))}
    assert logged.items() <= results["student"].items()
    assert logged["budget/achieved/reduction"] == pytest.approx(2.0, rel=0.005)
    assert logged["budget/requested/weight"] == pytest.approx(logged["budget/achieved/weight"], rel=0.2)
    assert {"embedding", "hidden", "attention", "soft"} < rows[1].keys()
    assert rows[-2]["loss"] < rows[1]["loss"]
    before = count_parameters(loading.load_model(str(world.teacher), "classification", labels=toy.LABELS))
    assert before / results["student"]["nonzero"] == pytest.approx(2.0, rel=0.01)
