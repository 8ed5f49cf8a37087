"""Mask analysis: where the weights that pruning left stand, and whether their places matter.

Gao, Colombo and Wang (2021), "Adapting by Pruning", section 4. `lad-dist masks` calls `report`.

Where weights did not change, the export holds their masks as bits. For other weights the zeros of the compact form are
read; where a matrix is a product of two, these are the zeros of the factors.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lad_dist.compression import compact
from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import OF_TRAININGS, EvaluateConfig, EvaluateDataConfig
from lad_dist.config.load import parse_config
from lad_dist.config.load import read_toml as read_tables
from lad_dist.config.schema import TaskConfig, train_schema
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.models.families import layer_list_pattern, module_pattern
from lad_dist.models.loading import save_model
from lad_dist.runs.plots import draw_heatmap, save_files

KeepMasks = Mapping[str, NDArray[np.bool_]]  # by weight [O, I]: True where the weight stays

# Ends of matrix names in all families; the first that matches counts.
COMPONENTS = {
    "query": module_pattern("query", "position_query"),
    "key": module_pattern("key", "position_key"),
    "value": module_pattern("value"),
    "query, key, value": module_pattern("qkv"),
    "attention output": module_pattern("attention_output"),
    "FFN in": module_pattern("intermediate"),
    "FFN out": module_pattern("output"),
    "embeddings": r"embeddings?(\.\w+)?",
    "other": "",
}
LAYER = re.compile(rf"{layer_list_pattern()}(?P<index>\d+)\.")
ALL = "all"
Overlaps = Mapping[tuple[str, str], Mapping[str, "MaskOverlap"]]  # by pair of names, then by component
Table = tuple[str, list[str], list[list[Any]]]  # title, header, rows


@dataclass(frozen=True)
class RunMasks:
    """The masks of the pruned matrices of one run.

    Attributes:
        name: of the run, or of the folder.
        keep_masks: by weight.
        run: the folder with the config, if there is one.
        file: of masks as bits over a base; None where the weights under the masks are unknown.
    """

    name: str
    keep_masks: KeepMasks
    run: Path | None = None
    file: Path | None = None


def load_run_masks(path: str | Path) -> RunMasks:
    """Read the masks of a run folder, an export or a mask.safetensors.

    Raises:
        UserError: the path holds no masks and no pruned weights, or a file cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path / "export" if (path / "export").is_dir() else path
    run = folder.parent if (folder.parent / "config.toml").is_file() else None
    name = (run or folder).resolve().name
    file = path if path.is_file() else folder / compact.MASK_FILE
    if file.is_file():
        return RunMasks(name, _masks_of_bits(file), run, file)
    packed = folder / compact.COMPACT_FILE
    if packed.is_file():
        keep_masks = _masks_of_bits(packed) | _masks_of_zeros([packed])
    else:
        keep_masks = _masks_of_zeros(sorted(folder.glob("model*.safetensors")))
    if not keep_masks:
        raise UserError(f"{path}: holds no masks and no pruned weights; name a run with the compression prune")
    return RunMasks(name, keep_masks, run)


def _masks_of_bits(file: Path) -> dict[str, NDArray[np.bool_]]:
    return {name: mask.numpy() for name, mask in compact.read_masks(file).items() if mask.ndim == 2}


def _masks_of_zeros(files: Iterable[Path]) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of the matrices that are stored whole and have more zeros than a row has weights."""
    keep_masks = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    weight = file.get_tensor(name)
                    # One row of zeros is no pruning: the embedding of the padding token is zero in any model.
                    if weight.ndim == 2 and int((weight == 0).sum()) > weight.shape[1]:
                        keep_masks[name] = (weight != 0).numpy()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
    return keep_masks


def weight_group(weight: str) -> tuple[int, str]:
    """Return layer (from 1; 0 outside of the layers) and component of a matrix by its name.

    A factor belongs where its product does.
    """
    name = re.sub(r"(\.[01])?\.weight$", "", weight)
    layer = LAYER.search(name)
    component = next(c for c, ending in COMPONENTS.items() if re.search(f"{ending}$", name))
    return int(layer["index"]) + 1 if layer else 0, component


def sparsity(keep_masks: KeepMasks) -> pd.DataFrame:
    """Return the numbers of pruned and of all weights by layer and component."""
    rows = [(*weight_group(name), int((~mask).sum()), mask.size) for name, mask in keep_masks.items()]
    frame = pd.DataFrame(rows, columns=["layer", "component", "pruned", "weights"])
    frame["component"] = pd.Categorical(frame["component"], list(COMPONENTS))
    return frame.groupby(["layer", "component"], observed=True).sum()


class MaskOverlap(NamedTuple):
    """How far two masks keep the same weights.

    Attributes:
        jaccard: weights that stay in both over weights that stay in either.
        expected: mean of the Jaccard index, were both drawn at random with as many weights in each matrix.
        sd: standard deviation of it.
        deviations: difference of `jaccard` and chance in standard deviations; None where chance has no choice.
    """

    jaccard: float
    expected: float
    sd: float
    deviations: float | None


def overlap(first: KeepMasks, second: KeepMasks) -> MaskOverlap:
    """Return the overlap over the matrices that both masks have.

    In a matrix of n weights of which a and b stay, both keep a b / n by chance, with variance
    a b (n - a)(n - b) / (n² (n - 1)): the hypergeometric distribution. The sum over matrices is exact. Mean and sd of
    the Jaccard index, a smooth function of the sum, are to first order in 1/n.
    """
    both = total = 0
    mean = variance = 0.0
    for name in first.keys() & second.keys():
        n, a, b = first[name].size, int(first[name].sum()), int(second[name].sum())
        both += int((first[name] & second[name]).sum())
        total += a + b
        mean += a * b / n
        variance += a * b * (n - a) * (n - b) / (n * n * max(1, n - 1))
    if total == both:
        return MaskOverlap(1.0, 1.0, 0.0, None)  # no weight stays in either
    slope = total / (total - mean) ** 2
    deviations = (both - mean) / variance**0.5 if variance else None
    return MaskOverlap(both / (total - both), mean / (total - mean), slope * variance**0.5, deviations)


def shuffle_masks(keep_masks: KeepMasks, *key: int) -> dict[str, NDArray[np.bool_]]:
    """Permute the entries of each mask; the permutation is a function of the key and of the names."""
    return {
        name: np.random.default_rng([*key, number])
        .permutation(keep_masks[name].ravel())
        .reshape(keep_masks[name].shape)
        for number, name in enumerate(sorted(keep_masks))
    }


class ShuffleTest(NamedTuple):
    """The main metric on the dev set with the run's masks, and with shuffled ones."""

    metric: str
    value: float
    shuffled: list[float]


def shuffle_test(masks: RunMasks, times: int, base: str | None = None) -> ShuffleTest | None:
    """Evaluate the run with its masks and with as many shuffled ones.

    Args:
        masks: of one run.
        times: number of shuffles.
        base: path of the weights under the masks, if it is no longer the one that the export names.

    Returns:
        None without a dev set (a run on a corpus), or where the weights under the masks are unknown because they
        trained with their masks.

    Raises:
        UserError: the model or the data cannot be read.
    """
    if masks.file is None or masks.run is None:
        return None
    options = read_tables(masks.run / "config.toml")
    config = parse_config(train_schema(options), options, str(masks.run / "config.toml"))
    if not isinstance(config, TaskConfig):
        return None
    candidates = [masks.keep_masks, *(shuffle_masks(masks.keep_masks, number) for number in range(times))]
    scores = [_scores(masks, keep_masks, config, base) for keep_masks in candidates]
    metric = next(iter(scores[0]))
    value, *shuffled_values = (candidate_scores[metric] for candidate_scores in scores)
    return ShuffleTest(metric, value, shuffled_values)


def _scores(masks: RunMasks, keep_masks: KeepMasks, config: TaskConfig, base: str | None) -> dict[str, float]:
    assert masks.file is not None
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "export"
        shutil.copytree(masks.file.parent, folder, ignore=shutil.ignore_patterns("*.safetensors", "onnx*"))
        tensors = {name: torch.from_numpy(mask) for name, mask in keep_masks.items()}
        compact.replace_masks(masks.file, tensors, folder)
        save_model(compact.load_masked(folder, base), folder)
        data = EvaluateDataConfig.model_construct(**config.data.model_dump(exclude=OF_TRAININGS))
        scores = evaluate(EvaluateConfig.model_validate({"model": {"path": str(folder)}, "data": data}))["model"]
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _overlaps(a: RunMasks, b: RunMasks) -> dict[str, MaskOverlap]:
    shared = a.keep_masks.keys() & b.keep_masks.keys()
    mismatched = sorted(name for name in shared if a.keep_masks[name].shape != b.keep_masks[name].shape)
    if mismatched or not shared:
        reason = f"{mismatched[0]} has another shape" if mismatched else "no matrix is pruned in both"
        raise UserError(f"{a.name} and {b.name}: {reason}, so that their masks cannot be compared; leave one away")
    by_component = {c: {name for name in shared if weight_group(name)[1] == c} for c in COMPONENTS}
    return {
        component: overlap(a.keep_masks, {name: b.keep_masks[name] for name in names})
        for component, names in ({ALL: shared} | by_component).items()
        if names
    }


def report(
    paths: Sequence[str | Path], out: str | Path | None = None, shuffles: int = 0, base: str | None = None
) -> list[Table]:
    """Return tables of all masks; with `out` also write mask_analysis.json and mask_analysis.png to that folder.

    Raises:
        UserError: masks cannot be read or compared, or `out` cannot be written.
    """
    run_masks = [load_run_masks(path) for path in paths]
    names = [masks.name for masks in run_masks]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(f"{duplicate}: two of the folders have this name; rename one, or name it once")
    counts = pd.concat({masks.name: sparsity(masks.keep_masks) for masks in run_masks}, names=["name"])
    overlaps = {(a.name, b.name): _overlaps(a, b) for a, b in combinations(run_masks, 2)}
    shuffled = {masks.name: shuffle_test(masks, shuffles, base) for masks in run_masks} if shuffles else {}
    tests = {name: test for name, test in shuffled.items() if test is not None}
    if out is not None:
        text = json.dumps(_as_json(counts, overlaps, tests), indent=2) + "\n"
        save_files(Path(out), {"mask_analysis.json": text}, {"mask_analysis.png": _figure(counts, overlaps)})
    tables = [*_sparsity_tables(counts), _overlap_table(overlaps), _test_table(tests)]
    return [table for table in tables if table[2]]


def _shares(counts: pd.DataFrame, *by: str) -> pd.Series:
    """Return the share of the weights that is pruned, by these levels of the index."""
    sums = counts.groupby(level=list(by), sort=False, observed=True).sum()
    return sums["pruned"] / sums["weights"]


def _sparsity_tables(counts: pd.DataFrame) -> list[Table]:
    by_component = _shares(counts, "name", "component").unstack("component").sort_index(axis="columns")
    by_component.insert(0, ALL, _shares(counts, "name"))
    in_layers = counts.drop(0, level="layer", errors="ignore")
    by_layer = _shares(in_layers, "name", "layer").unstack("layer").sort_index(axis="columns")
    return [_table("pruned weights, by component", by_component), _table("pruned weights, by layer", by_layer)]


def _table(title: str, shares: pd.DataFrame) -> Table:
    rows = [["-" if x != x else x for x in row] for row in shares.itertuples(name=None)]  # NaN: nothing to prune
    return title, ["", *map(str, shares.columns)], rows


def _overlap_table(overlaps: Overlaps) -> Table:
    rows: list[list[Any]] = []
    for (a, b), by_component in overlaps.items():
        jaccard, expected, sd, deviations = by_component[ALL]
        rows.append([a, b, jaccard, expected, sd, "-" if deviations is None else deviations])
    header = ["", "", "Jaccard", "by chance", "sd", "in sd"]
    return "weights that stay in both, of those that stay in either", header, rows


def _test_table(tests: Mapping[str, ShuffleTest]) -> Table:
    rows: list[list[Any]] = []
    for name, test in tests.items():
        mean = float(np.mean(test.shuffled))
        spread = float(np.std(test.shuffled, ddof=1)) if len(test.shuffled) > 1 else "-"
        rows.append([name, test.metric, test.value, mean, spread, test.value - mean])
    return "masks shuffled within each matrix", ["", "metric", "masks", "shuffled", "sd", "drop"], rows


def _as_json(counts: pd.DataFrame, overlaps: Overlaps, tests: Mapping[str, ShuffleTest]) -> dict[str, Any]:
    return {
        "sparsity": {
            name: group.droplevel("name").reset_index().to_dict("records") for name, group in counts.groupby("name")
        },
        "overlap": [
            {"of": list(pair), "component": component, **value._asdict()}
            for pair, by_component in overlaps.items()
            for component, value in by_component.items()
        ],
        "shuffled": {name: test._asdict() for name, test in tests.items()},
    }


def _figure(counts: pd.DataFrame, overlaps: Overlaps) -> Figure:
    """Draw what each run pruned, layers upwards, and for each pair the Jaccard index over that of chance."""
    names = list(counts.index.unique("name"))
    panels = len(names) + bool(overlaps)
    plot = Figure(figsize=(0.5 + 3.4 * panels, 4), layout="constrained")
    axes = plot.subplots(1, panels, squeeze=False)[0]
    for panel, name in zip(axes, names, strict=False):
        shares = _shares(counts.loc[name], "layer", "component").unstack("component")
        draw_heatmap(panel, f"{name}: share of pruned weights", shares.sort_index().sort_index(axis="columns"))
        panel.set_ylabel("layer")
    if overlaps:
        ratios = pd.DataFrame(np.nan, index=names, columns=names)
        for (a, b), by_component in overlaps.items():
            whole = by_component[ALL]
            ratios.loc[b, a] = whole.jaccard / whole.expected if whole.expected else np.nan
        draw_heatmap(axes[-1], "overlap, times that of chance", ratios, maximum=2.0)
    for panel in axes:
        panel.tick_params(axis="x", rotation=45)
    return plot
