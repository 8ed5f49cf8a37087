"""Topology: where the weights that pruning left stand, and whether their places matter (Gao, Colombo and Wang, 2021,
section 4).

    read(place)             the masks of a run, an export or a mask file
    sparsity(masks)         share of the weights that went, by layer and component
    overlap(one, other)     Jaccard index of two, beside what chance would give
    shuffled(masks, …)      the same number of weights in each matrix, elsewhere
    shuffle_test(masks, …)  the dev set's metric with masks as they are, and shuffled
    report(places, …)       all of it as tables, and with `out` mask_analysis.json and mask_analysis.png: launch/topology.py

Where weights did not change, masks lie in the export as bits; of others the zeros of its compact form are read, which
are those of the factors where a matrix is a product of two.
"""

import io
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
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lad_dist.compression import compact
from lad_dist.config.errors import UserError
from lad_dist.config.load import parse_config
from lad_dist.config.load import read_toml as read_tables
from lad_dist.config.schema import EvaluateConfig, ModelPathConfig, TaskConfig, train_schema
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.models.loading import save_model
from lad_dist.utils.atomic_io import write_text

KeepMasks = Mapping[str, NDArray[np.bool_]]  # by weight [O, I]: True where it stays
Group = tuple[int | None, str]  # a layer from 1, or none, and a component

# How names of matrices end, in the families' various words; the first that fits.
COMPONENTS = {
    "query": r"\.(query|(pos_)?query_proj|q_lin|q)",
    "key": r"\.(key|(pos_)?key_proj|k_lin|k)",
    "value": r"\.(value|value_proj|v_lin|v)",
    "query, key, value": r"\.Wqkv",
    "attention output": r"(attention\.output\.dense|attention\.dense|\.out_lin|\.attn\.o|\.attn\.Wo)",
    "FFN in": r"\.(intermediate\.dense|lin1|ffn|mlp\.Wi)",
    "FFN out": r"\.(output\.dense|lin2|ffn_output|mlp\.Wo)",
    "embeddings": r"embeddings?(\.\w+)?",
    "other": "",
}
LAYER = re.compile(r"(?:^|\.)(?:layers?|albert_layer_groups)\.(\d+)\.")
ALL = "all"
Table = tuple[str, list[str], list[list[Any]]]  # title, header, rows


@dataclass(frozen=True)
class RunMasks:
    """Of the matrices that were pruned. `run`: the folder with the config, where there is one; `file`: of bits over a
    base, where the weights under them are known."""

    name: str
    kept: KeepMasks
    run: Path | None = None
    file: Path | None = None


def read(place: str | Path) -> RunMasks:
    """Of a run folder, an export or its mask.safetensors. Raises UserError."""
    path = Path(place)
    folder = path.parent if path.is_file() else path / "export" if (path / "export").is_dir() else path
    run = folder.parent if (folder.parent / "config.toml").is_file() else None
    name = (run or folder).resolve().name
    file = path if path.is_file() else folder / compact.MASK_FILE
    if file.is_file():
        return RunMasks(name, _bits(file), run, file)
    packed = folder / compact.COMPACT_FILE
    kept = _bits(packed) | _zeros([packed]) if packed.is_file() else _zeros(sorted(folder.glob("model*.safetensors")))
    if not kept:
        raise UserError(f"{place}: holds no masks, and no weights that were pruned; name a run of the surgery prune")
    return RunMasks(name, kept, run)


def _bits(file: Path) -> dict[str, NDArray[np.bool_]]:
    return {name: mask.numpy() for name, mask in compact.read_masks(file).items() if mask.ndim == 2}


def _zeros(files: Iterable[Path]) -> dict[str, NDArray[np.bool_]]:
    """Of matrices that lie there whole and have more zeros than a row: the embedding of padding is one in any model."""
    found = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    weight = file.get_tensor(name)
                    if weight.ndim == 2 and int((weight == 0).sum()) > weight.shape[1]:
                        found[name] = (weight != 0).numpy()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
    return found


def group(weight: str) -> Group:
    """Where a matrix stands, by its name; of a pair of factors, where their product does."""
    name = re.sub(r"(\.[01])?\.weight$", "", weight)
    found = LAYER.search(name)
    component = next(c for c, ending in COMPONENTS.items() if re.search(f"{ending}$", name))
    return int(found.group(1)) + 1 if found else None, component


def sparsity(kept: KeepMasks) -> dict[Group, tuple[int, int]]:
    """By layer and component: weights that went, and all."""
    found: dict[Group, tuple[int, int]] = {}
    for name, mask in kept.items():
        gone, count = found.get(group(name), (0, 0))
        found[group(name)] = gone + int(mask.size - mask.sum()), count + mask.size
    return found


class MaskOverlap(NamedTuple):
    """`jaccard`: weights that stay in both over weights that stay in either. `expected`, `sd`: of it, where both are
    drawn at random with as many in each matrix. `deviations`: how many standard deviations lie between, None where
    chance has no choice."""

    jaccard: float
    expected: float
    sd: float
    deviations: float | None


def overlap(one: KeepMasks, other: KeepMasks) -> MaskOverlap:
    """Over the matrices that both have. In a matrix of n weights of which a and b stay, both keep a b / n by chance,
    with variance a b (n - a)(n - b) / (n² (n - 1)): the hypergeometric distribution. The sum over matrices is exact; of
    the Jaccard index, a smooth function of it, mean and sd are to first order in 1/n."""
    both = total = 0
    mean = variance = 0.0
    for name in one.keys() & other.keys():
        n, a, b = one[name].size, int(one[name].sum()), int(other[name].sum())
        both += int((one[name] & other[name]).sum())
        total += a + b
        mean += a * b / n
        variance += a * b * (n - a) * (n - b) / (n * n * max(1, n - 1))
    if total == both:
        return MaskOverlap(1.0, 1.0, 0.0, None)  # nothing stays in any
    slope = total / (total - mean) ** 2
    deviations = (both - mean) / variance**0.5 if variance else None
    return MaskOverlap(both / (total - both), mean / (total - mean), slope * variance**0.5, deviations)


def shuffled(kept: KeepMasks, *key: int) -> dict[str, NDArray[np.bool_]]:
    """Each mask with its entries permuted: a function of the key and of the names."""
    return {
        name: np.random.default_rng([*key, number]).permutation(kept[name].ravel()).reshape(kept[name].shape)
        for number, name in enumerate(sorted(kept))
    }


class ShuffleTest(NamedTuple):
    """The main metric on the dev set: of the masks, and of shuffled ones."""

    metric: str
    value: float
    shuffled: list[float]


def shuffle_test(masks: RunMasks, times: int, base: str | None = None) -> ShuffleTest | None:
    """None where the weights under the masks are not known, or there is no dev set: of weights that trained with their
    masks, and of runs on a corpus. `base`: where the weights lie now. Raises UserError."""
    if masks.file is None or masks.run is None:
        return None
    tables = read_tables(masks.run / "config.toml")
    config = parse_config(train_schema(tables), tables, str(masks.run / "config.toml"))
    if not isinstance(config, TaskConfig):
        return None
    found = [
        _scores(masks, kept, config, base) for kept in (masks.kept, *(shuffled(masks.kept, n) for n in range(times)))
    ]
    metric = next(iter(found[0]))
    value, *others = (scores[metric] for scores in found)
    return ShuffleTest(metric, value, others)


def _scores(masks: RunMasks, kept: KeepMasks, config: TaskConfig, base: str | None) -> dict[str, float]:
    assert masks.file is not None
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "export"
        shutil.copytree(masks.file.parent, folder, ignore=shutil.ignore_patterns("*.safetensors", "onnx*"))
        compact.replace_masks(masks.file, {name: torch.from_numpy(mask) for name, mask in kept.items()}, folder)
        save_model(compact.load_masked(folder, base), folder)
        words = EvaluateConfig(model=ModelPathConfig(path=str(folder)), teacher=None, data=config.data, out=None)
        scores = evaluate(words)["model"]
    return {name: value for name, value in scores.items() if name not in ("path", "parameters")}


@dataclass(frozen=True)
class MaskAnalysis:
    """What is known of several masks. `overlaps`: of each pair, by component and of all."""

    masks: Sequence[RunMasks]
    overlaps: Mapping[tuple[str, str], Mapping[str, MaskOverlap]]
    tests: Mapping[str, ShuffleTest]


def analyze(places: Sequence[str | Path], shuffles: int = 0, base: str | None = None) -> MaskAnalysis:
    """Of the masks at these places. Raises UserError where they cannot be read or are of different models."""
    found = [read(place) for place in places]
    names = [masks.name for masks in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: two of the folders are called that; rename one, or name it once")
    pairs = {(a.name, b.name): _overlaps(a, b) for a, b in combinations(found, 2)}
    tested = {masks.name: shuffle_test(masks, shuffles, base) for masks in found} if shuffles else {}
    return MaskAnalysis(found, pairs, {name: test for name, test in tested.items() if test is not None})


def _overlaps(a: RunMasks, b: RunMasks) -> dict[str, MaskOverlap]:
    shared = a.kept.keys() & b.kept.keys()
    wrong = sorted(name for name in shared if a.kept[name].shape != b.kept[name].shape)
    if wrong or not shared:
        why = f"{wrong[0]} has another shape" if wrong else "no matrix is pruned in both"
        raise UserError(f"{a.name} and {b.name}: {why}, so that their masks cannot be compared; leave one away")
    names = {ALL: shared} | {c: {name for name in shared if group(name)[1] == c} for c in COMPONENTS}
    return {c: overlap(a.kept, {name: b.kept[name] for name in some}) for c, some in names.items() if some}


def report(
    places: Sequence[str | Path], out: str | Path | None = None, shuffles: int = 0, base: str | None = None
) -> list[Table]:
    """Tables of all masks; with `out` also mask_analysis.json and mask_analysis.png there. Raises UserError."""
    found = analyze(places, shuffles, base)
    if out is not None:
        _write(found, Path(out))
    tables = [_component_table(found), _layer_table(found), _overlap_table(found), _test_table(found)]
    return [table for table in tables if table[2]]


def _component_table(found: MaskAnalysis) -> Table:
    counts = {masks.name: sparsity(masks.kept) for masks in found.masks}
    used = {component for each in counts.values() for _, component in each}
    columns = [component for component in COMPONENTS if component in used]
    rows = [
        [name, _share(each.values()), *(_share(n for (_, of), n in each.items() if of == c) for c in columns)]
        for name, each in counts.items()
    ]
    return "weights that went, by component", ["", ALL, *columns], rows


def _layer_table(found: MaskAnalysis) -> Table:
    counts = {masks.name: sparsity(masks.kept) for masks in found.masks}
    layers = sorted({layer for each in counts.values() for layer, _ in each if layer is not None})
    rows = [
        [name, *(_share(n for (of, _), n in each.items() if of == layer) for layer in layers)]
        for name, each in counts.items()
    ]
    return "weights that went, by layer", ["", *map(str, layers)], rows if layers else []


def _share(counts: Iterable[tuple[int, int]]) -> float | str:
    """Of weights that went, where there are any."""
    gone, every = np.sum([(0, 0), *counts], axis=0).tolist()
    return gone / every if every else "-"


def _overlap_table(found: MaskAnalysis) -> Table:
    rows = [
        [a, b, each[ALL].jaccard, each[ALL].expected, each[ALL].sd, _or_none(each[ALL].deviations)]
        for (a, b), each in found.overlaps.items()
    ]
    return (
        "weights that stay in both, of those that stay in either",
        ["", "", "Jaccard", "by chance", "sd", "in sd"],
        rows,
    )


def _or_none(value: float | None) -> float | str:
    return "-" if value is None else value


def _test_table(found: MaskAnalysis) -> Table:
    rows: list[list[Any]] = []
    for name, test in found.tests.items():
        mean = float(np.mean(test.shuffled))
        spread = float(np.std(test.shuffled, ddof=1)) if len(test.shuffled) > 1 else "-"
        rows.append([name, test.metric, test.value, mean, spread, test.value - mean])
    return "masks shuffled within each matrix", ["", "metric", "masks", "shuffled", "sd", "drop"], rows


def _write(found: MaskAnalysis, out: Path) -> None:
    picture = io.BytesIO()
    figure(found).savefig(picture, dpi=120)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "mask_analysis.json", json.dumps(as_json(found), indent=2) + "\n")
        (out / "mask_analysis.png").write_bytes(picture.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give --out another folder") from None


def as_json(found: MaskAnalysis) -> dict[str, Any]:
    """For other programs."""
    return {
        "sparsity": {
            masks.name: [
                {"layer": layer, "component": component, "gone": gone, "weights": count}
                for (layer, component), (gone, count) in sparsity(masks.kept).items()
            ]
            for masks in found.masks
        },
        "overlap": [
            {"of": list(pair), "component": component, **value._asdict()}
            for pair, each in found.overlaps.items()
            for component, value in each.items()
        ],
        "shuffled": {name: test._asdict() for name, test in found.tests.items()},
    }


def figure(found: MaskAnalysis) -> Figure:
    """Of each run what went, layers upwards; and of each pair the Jaccard index over that of chance."""
    names, panels = [masks.name for masks in found.masks], len(found.masks) + bool(found.overlaps)
    drawn = Figure(figsize=(0.5 + 3.4 * panels, 4), layout="constrained")
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    for panel, masks in zip(axes, found.masks, strict=False):
        _sparsity_panel(panel, masks)
    if found.overlaps:
        times = np.full((len(names), len(names)), np.nan)
        for (a, b), each in found.overlaps.items():
            row, column = sorted((names.index(a), names.index(b)), reverse=True)
            times[row, column] = each[ALL].jaccard / each[ALL].expected if each[ALL].expected else np.nan
        _heat(axes[-1], "overlap, times that of chance", times, names, names, 2.0, "{:.2f}")
    return drawn


def _sparsity_panel(axes: Any, masks: RunMasks) -> None:
    counts = sparsity(masks.kept)
    layers = sorted({layer or 0 for layer, _ in counts})
    components = [c for c in COMPONENTS if any(c == component for _, component in counts)]
    shares = np.full((len(layers), len(components)), np.nan)
    for (layer, component), (gone, count) in counts.items():
        shares[layers.index(layer or 0), components.index(component)] = gone / count
    rows = ["-" if layer == 0 else str(layer) for layer in layers]
    _heat(axes, f"{masks.name}: weights that went", shares, rows, components, 1.0, "{:.2f}")


def _heat(
    axes: Any, title: str, values: NDArray[np.floating], rows: list[str], columns: list[str], most: float, form: str
) -> None:
    axes.imshow(values, cmap="Blues", vmin=0, vmax=most, origin="lower", aspect="auto")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize="small", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize="small", parse_math=False)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > 0.6 * most else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize="small")
