"""LadaBERT's budget: what is asked for is what is left, in counts and in a trained student's weights."""

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
from lad_dist.compression.ladabert import (
    TOLERANCE,
    Factors,
    WeightCounts,
    count_weights,
    ladabert,
    remaining_weights,
    required_sparsity,
    solve_factors,
)
from lad_dist.compression.low_rank import LowRank, LowRankEmbedding, linear_maps
from lad_dist.compression.options import LAYER_MODULES
from lad_dist.compression.pruning.module import GlobalPruning
from lad_dist.config.errors import UserError
from lad_dist.config.load import read_toml, validate_arguments
from lad_dist.core.step_state import StepState
from lad_dist.models import loading
from lad_dist.models.dims import count_parameters
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training import run_spec
from lad_dist.training.train import train

NAMES = ("embedding", "svd", "weight")
COUNTS = WeightCounts(words=600, maps=2400, rest=100)
FACTOR = st.floats(1.0, 6.0)


def made(architecture: dict[str, Any], vocabulary: int = 300) -> PreTrainedModel:
    torch.manual_seed(0)
    return loading.create_model(architecture, "classification", vocabulary=vocabulary, labels=toy.LABELS)


def cut(model: PreTrainedModel, **options: Any) -> dict[str, float]:
    """What the surgery tells, with which all of its weights go at once."""
    told: dict[str, float] = {}
    options = {"begin": 0.0, "end": 0.0, **options}
    ladabert(model, report=told.update, **validate_arguments("surgery ladabert", ladabert, options))
    for part in compressed_module.compressed_modules(model):
        part.on_step_start(StepState(0, 10, seed=0))
    return told


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
        given = {**factors._asdict(), name: None}
        assert solve_factors(COUNTS, 3100 / 600, **given) == pytest.approx(factors)
    assert solve_factors(COUNTS, None, *factors) == factors


def test_sparsity_by_hand() -> None:
    """After SVD: of 300 + 800 + 100 weights 700 are asked for, so 500 of 800 go, whatever 4 would have taken."""
    after = WeightCounts(words=300, maps=800, rest=100)
    assert required_sparsity(after, 700, 4.0) == 500 / 800
    assert required_sparsity(after, 700, None) == 500 / 800
    assert required_sparsity(after, 602, 4.0) == 0.75  # 600 is within 0.5 % of it
    assert required_sparsity(after, None, 4.0) == 0.75
    with pytest.raises(UserError, match="350 weights cannot be met"):
        required_sparsity(after, 350, None)


@settings(max_examples=60)
@given(FACTOR, FACTOR, FACTOR, st.sampled_from(NAMES))
def test_solving_finds_what_was_left_out(embedding: float, svd: float, weight: float, missing: str) -> None:
    factors = Factors(embedding, svd, weight)
    reduction = COUNTS.total / remaining_weights(COUNTS, factors)
    assume(reduction >= 1)
    given = {**factors._asdict(), missing: None}
    try:
        solved = solve_factors(COUNTS, reduction, **given)
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
        model = made({**toy.SIZES, **sizes}, vocabulary)
    before = count_parameters(model)
    given = dict(zip([name for name in NAMES if name != missing], factors, strict=True))
    try:
        ladabert(model, **validate_arguments("", ladabert, {"reduction": reduction, **given}))
    except UserError:
        return
    prunings = [part for part in compressed_module.compressed_modules(model) if isinstance(part, GlobalPruning)]
    gone = sum(round(part.schedule.sparsity * _size(part)) for part in prunings)
    left = count_parameters(model) - gone
    assert before / left == pytest.approx(reduction, rel=TOLERANCE)


def _size(part: GlobalPruning) -> int:
    return sum(masked.origin.numel() for masked in part.masked.values())


@pytest.mark.parametrize("missing", [*NAMES, None])
def test_what_is_told_is_what_is_left(missing: str | None) -> None:
    model = made(toy.SIZES)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)  # no zeros but those of pruning
    before = count_parameters(model)
    options: dict[str, Any] = {"embedding": 2.0, "svd": 1.5, "weight": 2.0}
    if missing:
        options = {"reduction": 2.5} | {name: factor for name, factor in options.items() if name != missing}
    told = cut(model, **options)
    assert before / nonzero(model) == pytest.approx(told["budget/achieved/reduction"])
    assert told["budget/achieved/reduction"] == pytest.approx(
        told["budget/requested/reduction"], rel=0.005 if missing else 0.1
    )
    assert {name: told[f"budget/requested/{name}"] for name in options} == options
    for name in NAMES:
        assert told[f"budget/achieved/{name}"] == pytest.approx(told[f"budget/requested/{name}"], rel=0.2)


def test_ones_leave_a_model_as_it_is() -> None:
    model = made(toy.SIZES)
    told = cut(model, embedding=1.0, svd=1.0, weight=1.0)
    assert not compressed_module.compressed_modules(model)
    assert set(told.values()) == {1.0}


def test_each_factor_has_its_part() -> None:
    """Pruning lies on both factors of each map of low rank, ranked together, and on no embeddings or head."""
    model = made(toy.SIZES)
    cut(model, embedding=2.0, svd=2.0, weight=4.0)
    found = compressed_module.compressed_modules(model)
    assert sum(isinstance(part, LowRank) for part in found) == 4 * 6
    assert sum(isinstance(part, LowRankEmbedding) for part in found) == 1
    (pruning,) = [part for part in found if isinstance(part, GlobalPruning)]
    assert len(pruning.masked) == 2 * 4 * 6
    assert {name.rpartition(".")[2] for name in pruning.masked} == {"inner", "outer"}
    assert pruning.sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("modules", ["query$", r"\.dense$", "embeddings|layer"])
def test_it_holds_for_any_choice_of_maps(modules: str) -> None:
    """Products lie deeper than the maps that they stand for; what is pruned stays these maps."""
    model = made(toy.SIZES)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    before = count_parameters(model)
    told = cut(model, embedding=2.0, svd=2.0, weight=2.0, modules=modules)
    assert before / nonzero(model) == pytest.approx(told["budget/achieved/reduction"])
    (pruning,) = [part for part in compressed_module.compressed_modules(model) if isinstance(part, GlobalPruning)]
    assert not [name for name in pruning.masked if "embedding" in name]


def test_pruning_alone_is_on_the_maps() -> None:
    model = made(toy.SIZES)
    told = cut(model, reduction=1.5, embedding=1.0, svd=1.0)
    assert not [
        part for part in compressed_module.compressed_modules(model) if isinstance(part, LowRank | LowRankEmbedding)
    ]
    assert told["budget/achieved/reduction"] == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize(("number", "millions"), [(1, 44), (2, 22), (3, 15), (4, 11)])
def test_the_papers_sizes(number: int, millions: int) -> None:
    """Of BERT-base, by the configs; the factors that their first lines say."""
    file = ROOT / f"configs/task/ladabert-{number}.toml"
    (options,) = read_toml(file)["compression"]
    options.pop("name")
    with torch.device("meta"):
        model = made({"model_type": "bert"}, 30522)
    counts = count_weights(model, linear_maps(model, LAYER_MODULES, ""))
    factors = solve_factors(counts, **{"weight": None, **options})
    assert f"solved for: {factors.weight:.2f} where" in file.read_text()
    assert round(counts.total / options["reduction"] / 1e6) == millions
    ladabert(model, **validate_arguments("", ladabert, options))
    (pruning,) = [part for part in compressed_module.compressed_modules(model) if isinstance(part, GlobalPruning)]
    left = count_parameters(model) - round(pruning.schedule.sparsity * _size(pruning))
    assert left * options["reduction"] == pytest.approx(counts.total, rel=1e-6)


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
    with pytest.raises(UserError, match=f"surgery ladabert: .*{message}"):
        run_spec.resolve_run(toy.parsed(tables, {"objective": {"name": "kd"}, "compression": [listed]}))


def test_a_run_trains_under_its_budget_and_says_so(world: World, tmp_path: Path) -> None:
    """From the teacher, with the four losses; the export has the zeros, and the trained student's function."""
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher)
    listed = {"name": "ladabert", "reduction": 2.0, "embedding": 2.0, "svd": 1.5, "activation_aware": True, "update_every": 2}
    objective = {"name": "tinybert", "soft": 1.0}
    config = toy.parsed(tables, {"student.num_hidden_layers": 4, "objective": objective, "compression": [listed]})
    rows: list[dict[str, Any]] = []
    results = train(config, rows.append).results
    assert results is not None
    found = {name: value for name, value in rows[0].items() if name.startswith(("budget/", "initial_error/"))}
    assert found.items() <= results["student"].items()
    assert found["budget/achieved/reduction"] == pytest.approx(2.0, rel=0.005)
    assert found["budget/requested/weight"] == pytest.approx(found["budget/achieved/weight"], rel=0.2)
    assert {"embedding", "hidden", "attention", "soft"} < rows[1].keys()
    assert rows[-2]["loss"] < rows[1]["loss"]
    before = count_parameters(loading.load_model(str(world.teacher), "classification", labels=toy.LABELS))
    assert before / results["student"]["nonzero"] == pytest.approx(2.0, rel=0.01)
