"""Where pruned weights stood: counts by hand, overlaps against chance, masks that are shuffled and evaluated."""

import itertools
import json
import math
import re
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
from launching import run_command
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from lad_dist.compression import compact
from lad_dist.config.errors import UserError
from lad_dist.evaluation import mask_analysis
from lad_dist.evaluation.mask_analysis import (
    RunMasks,
    load_run_masks,
    overlap,
    report,
    shuffle_masks,
    shuffle_test,
    sparsity,
    weight_group,
)
from lad_dist.models import loading
from lad_dist.training.train import train

PRUNE: dict[str, Any] = {"name": "prune", "sparsity": 0.75, "end": 0.0}
ADAPT = PRUNE | {"criterion": "adapting"}


def mask(*rows: str) -> NDArray[np.bool_]:
    """Build a mask from rows of 1 for weights that stay and 0 for pruned ones."""
    return np.array([[letter == "1" for letter in row] for row in rows])


QUERY, KEY = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.1.attention.self.key.weight"
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def counts(keep_masks: Any) -> dict[Any, tuple[int, int]]:
    """Return pruned and all weights by layer and component."""
    return {key: (pruned, total) for key, pruned, total in sparsity(keep_masks).itertuples(name=None)}


def test_sparsity_by_layer_and_component() -> None:
    keep_masks = {QUERY: mask("1100", "0000"), KEY: mask("11", "01"), EMBEDDINGS: mask("1111")}
    assert counts(keep_masks) == {(1, "query"): (6, 8), (2, "key"): (1, 4), (0, "embeddings"): (0, 4)}


@pytest.mark.parametrize("family", toy_families.SIZES)
def test_every_matrix_belongs_to_a_component(family: str) -> None:
    """In every family; no matrix of a layer is left over."""
    architecture = toy_families.architecture(family, pad_token_id=1)
    model = loading.create_model(architecture, "classification", vocab_size=300, labels=toy.LABELS)
    groups: dict[Any, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            groups.setdefault(weight_group(f"{name}.weight"), []).append(module.weight.numel())
    layers = 1 if family == "albert" else 4
    assert {layer for layer, _ in groups} == {0, *range(1, layers + 1)}
    components = {"attention output", "FFN in", "FFN out"}
    components |= {"query, key, value"} if family == "modernbert" else {"query", "key", "value"}
    for layer in range(1, layers + 1):
        assert {component for group_layer, component in groups if group_layer == layer} == components
    assert max(groups[0, "embeddings"]) == 300 * (16 if family in ("albert", "electra") else 32)


def test_overlap_by_hand() -> None:
    """Of 8 weights 4 and 4 stay, 2 of them in both: 2 of 6; by chance 2, so no deviation.

    A second matrix that only one mask has changes nothing.
    """
    one, other = {QUERY: mask("11110000"), KEY: mask("10")}, {QUERY: mask("11001100")}
    result = overlap(one, other)
    assert result.jaccard == pytest.approx(2 / 6)
    assert result.expected == pytest.approx(2 / 6)
    assert result.deviations == 0
    variance = 4 * 4 * 4 * 4 / (64 * 7)
    assert result.sd == pytest.approx(8 / 36 * math.sqrt(variance))
    same = overlap(one, one)
    assert same.jaccard == 1
    assert same.deviations == pytest.approx((5 - 2.5) / math.sqrt(variance + 1 / 4))


def test_overlap_where_chance_has_no_choice() -> None:
    assert overlap({QUERY: mask("11")}, {QUERY: mask("11")}) == (1.0, 1.0, 0.0, None)
    assert overlap({QUERY: mask("00")}, {QUERY: mask("00")}) == (1.0, 1.0, 0.0, None)
    assert overlap({QUERY: mask("00")}, {QUERY: mask("11")}) == (0.0, 0.0, 0.0, None)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=2))
def test_chance_is_what_all_masks_of_these_sizes_are(sizes: list[tuple[int, int, int]]) -> None:
    """Mean and variance of the shared weights, over all pairs of masks that keep as many: by enumeration."""
    sizes = [(n, min(a, n), min(b, n)) for n, a, b in sizes]
    shared = [0]
    for n, a, b in sizes:
        first = set(range(a))  # by symmetry the places of one mask may be any
        counts = [len(first & set(second)) for second in itertools.combinations(range(n), b)]
        shared = [left + right for left in shared for right in counts]
    first = {str(i): mask("1" * a + "0" * (n - a)) for i, (n, a, _) in enumerate(sizes)}
    second = {str(i): mask("1" * b + "0" * (n - b)) for i, (n, _, b) in enumerate(sizes)}
    result, total = overlap(first, second), sum(a + b for _, a, b in sizes)
    both = sum(min(a, b) for _, a, b in sizes)
    if np.var(shared) == 0:
        assert result.deviations is None
        return
    assert result.deviations == pytest.approx((both - np.mean(shared)) / np.std(shared))
    assert result.expected == pytest.approx(np.mean(shared) / (total - np.mean(shared)))
    assert result.sd == pytest.approx(total / (total - np.mean(shared)) ** 2 * np.std(shared))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.integers(0, 9))
def test_shuffling_preserves_the_counts_of_each_matrix(rows: int, columns: int, seed: int, key: int) -> None:
    random = np.random.default_rng(seed)
    keep_masks = {name: random.random((rows, columns)) < 0.5 for name in (QUERY, KEY)}
    shuffled = shuffle_masks(keep_masks, key)
    reordered = shuffle_masks(dict(reversed(keep_masks.items())), key)
    for name, value in keep_masks.items():
        assert shuffled[name].shape == value.shape
        assert shuffled[name].sum() == value.sum()
        assert np.array_equal(shuffled[name], reordered[name])


def test_shuffling_moves_the_weights() -> None:
    keep_masks = {QUERY: np.arange(400).reshape(20, 20) < 200, KEY: np.arange(400).reshape(20, 20) < 200}
    one, other = shuffle_masks(keep_masks, 0), shuffle_masks(keep_masks, 1)
    assert not np.array_equal(one[QUERY], one[KEY])
    assert not np.array_equal(one[QUERY], other[QUERY])
    assert abs(overlap(keep_masks, one).deviations or 0) < 5


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train runs of two methods.

    One chooses among weights that do not change; the weights of the other train, once as factors.
    """
    work, folders = tmp_path_factory.mktemp("runs"), {}
    pairs = {"name": "low_rank", "keep": 0.5}
    for name, compressions in (("adapting", [ADAPT]), ("magnitude", [PRUNE]), ("factors", [pairs, PRUNE])):
        options = toy.task_config(work, world.files, world.teacher, world.teacher, compression=compressions)
        folders[name] = train(toy.parsed(options, {"run.name": name, "run.steps": 2})).folder
    return folders


def test_masks_of_a_run(runs: dict[str, Path]) -> None:
    """As bits, or as zeros of the exported weights: an export with both has the same masks twice."""
    masks = load_run_masks(runs["adapting"])
    assert masks.name == "adapting"
    for place in (runs["adapting"] / "export", runs["adapting"] / "export" / "mask.safetensors"):
        assert load_run_masks(place).keep_masks.keys() == masks.keep_masks.keys()
        assert load_run_masks(place).name == "adapting"
    weights = load_file(runs["adapting"] / "export" / "model.safetensors")
    for name, keep_masks in masks.keep_masks.items():
        assert torch.equal(weights[name] != 0, torch.from_numpy(keep_masks))
    trained = load_run_masks(runs["magnitude"])
    assert trained.keep_masks.keys() == masks.keep_masks.keys()
    for run_masks in (masks, trained):
        table = sparsity(run_masks.keep_masks)
        assert table["pruned"].sum() == pytest.approx(0.75 * table["weights"].sum(), abs=len(table))
    zeros = load_file(runs["magnitude"] / "export" / "model.safetensors")
    assert all(
        torch.equal(zeros[name] != 0, torch.from_numpy(keep_masks)) for name, keep_masks in trained.keep_masks.items()
    )


def test_zeros_of_factors_are_counted_and_not_those_of_their_products(runs: dict[str, Path]) -> None:
    table = sparsity(load_run_masks(runs["factors"]).keep_masks)
    assert table.index.equals(sparsity(load_run_masks(runs["magnitude"]).keep_masks).index)
    assert set(table["weights"]) == {8 * (32 + 32), 10 * (32 + 64)}  # both factors, ranks 8 and 10
    assert table["pruned"].sum() == pytest.approx(0.75 * table["weights"].sum(), abs=24)


def test_hardly_pruned_matrices_count_too(tmp_path: Path) -> None:
    """The compact form keeps them whole, as their bits would take more than their zeros do."""
    values: dict[str, torch.Tensor] = {}
    for name, zeros in ((QUERY, 2000), (KEY, 100)):
        weight = torch.ones(64, 64)
        weight.view(-1)[:zeros] = 0
        values |= dict(compact._pack_weight(name, weight))
    assert KEY in values
    compact.CompactExport(values, {}, "", {QUERY: [64, 64]}, "float32").save(tmp_path, None, None)
    assert counts(load_run_masks(tmp_path).keep_masks) == {(1, "query"): (2000, 4096), (2, "key"): (100, 4096)}


def test_the_shuffle_test(runs: dict[str, Path]) -> None:
    """Masks that are not shuffled score as the run did; weights that trained with their masks have no test."""
    test = shuffle_test(load_run_masks(runs["adapting"]), 2)
    results = json.loads((runs["adapting"] / "results.json").read_text())
    assert test is not None
    assert test.metric == "accuracy"
    assert test.value == results["metrics"]["accuracy"]
    assert len(test.shuffled) == 2
    assert shuffle_test(load_run_masks(runs["magnitude"]), 2) is None


def test_shuffled_masks_are_what_is_evaluated(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run whose config has keys that evaluations refuse."""
    evaluated = []
    read, of_trainings = (
        mask_analysis.read_tables,
        {"test": "t.csv", "class_weights": "balanced", "unlabelled": "u.txt"},
    )

    def tables_of_the_run(file: Path) -> dict[str, Any]:
        tables = read(file)
        return {**tables, "data": {**tables["data"], **of_trainings}}

    def record(config: Any) -> dict[str, Any]:
        evaluated.append(load_file(Path(config.model.path) / "model.safetensors"))
        return {"model": {"path": "", "parameters": 0, "accuracy": 0.5}}

    monkeypatch.setattr(mask_analysis, "evaluate", record)
    monkeypatch.setattr(mask_analysis, "read_tables", tables_of_the_run)
    masks = load_run_masks(runs["adapting"])
    shuffle_test(masks, 1)
    for weights, keep_masks in zip(evaluated, (masks.keep_masks, shuffle_masks(masks.keep_masks, 0)), strict=True):
        assert all(torch.equal(weights[name] != 0, torch.from_numpy(mask)) for name, mask in keep_masks.items())


def test_the_script(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(runs["adapting"]), str(runs["magnitude"]), "--out", str(tmp_path / "out"), "--shuffles", "1"]
    assert run_command("masks", *arguments) == 0
    printed = capsys.readouterr().out
    for title in ("by component", "by layer", "stay in both", "shuffled within"):
        assert title in printed
    analysis = json.loads((tmp_path / "out" / "mask_analysis.json").read_text())
    assert set(analysis) == {"sparsity", "overlap", "shuffled"}
    masks = load_run_masks(runs["adapting"])
    assert {
        (row["layer"], row["component"]): (row["pruned"], row["weights"]) for row in analysis["sparsity"]["adapting"]
    } == counts(masks.keep_masks)
    (whole,) = (row for row in analysis["overlap"] if row["component"] == "all")
    assert whole["jaccard"] == overlap(masks.keep_masks, load_run_masks(runs["magnitude"]).keep_masks).jaccard
    assert re.search(rf"{whole['jaccard']:.4g}", printed)
    assert (tmp_path / "out" / "mask_analysis.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_one_mask(runs: dict[str, Path]) -> None:
    titles = [title for title, _, _ in report([runs["magnitude"]])]
    assert titles == ["pruned weights, by component", "pruned weights, by layer"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["{teacher}"], "{teacher}: holds no masks and no pruned weights; name a run with the compression prune"),
        (["{nowhere}"], "{nowhere}: holds no masks"),
        (["{adapting}", "{adapting}/export"], "adapting: two of the folders have this name"),
        (["{adapting}", "{other}"], "adapting and other: no matrix is pruned in both"),
        (["{adapting}", "{small}"], "adapting and small: bert.encoder.layer.0.attention.self.query.weight has another"),
        (["{other}/model.safetensors"], "{other}/model.safetensors: holds no masks; name a mask.safetensors"),
        (["{teacher}/model.safetensors"], "{teacher}/model.safetensors: cannot be read"),
        (["{broken}"], "{broken}/model.safetensors: cannot be read"),
    ],
)
def test_what_cannot_be_compared(
    paths: list[str], message: str, runs: dict[str, Path], world: World, tmp_path: Path
) -> None:
    for name, weight, width in (("other", "other.weight", 4), ("small", QUERY, 4)):
        (tmp_path / name).mkdir()
        save_file({weight: torch.eye(width)}, tmp_path / name / "model.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    folders = {**runs, "teacher": world.teacher, **{n: tmp_path / n for n in ("nowhere", "other", "small", "broken")}}
    with pytest.raises(UserError) as caught:
        report([path.format_map(folders) for path in paths])
    assert message.format_map(folders) in str(caught.value)


def test_a_mask_file_without_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    """Without a run there is no dev set."""
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "mask.safetensors"
    file.write_bytes((runs["adapting"] / "export" / "mask.safetensors").read_bytes())
    masks = load_run_masks(file)
    assert masks.name == "alone"
    assert shuffle_test(masks, 1) is None
    assert isinstance(masks, RunMasks)
