"""Malformed and hostile folders of models, tokenizers and token shards."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_damage import Bomb
from conftest import World
from malformed_inputs import Case, assert_one_line, complaint
from safetensors.torch import load_file, save_file

from lad_dist.models import loading

Edit = Callable[[Path], None]


def broken(name: str, edit: Edit, expected: str, command: str = "distill", key: str = "teacher.path") -> Case:
    """A copy of the teacher, changed."""

    def make(here: Path, world: World) -> None:
        shutil.copytree(world.teacher, here / "model")
        edit(here / "model")

    return Case(name, command, expected, changes={key: "{here}/model"}, make=make)


def student(name: str, edit: Edit, expected: str) -> Case:
    return broken(name, edit, expected, key="student.path")


def shards(name: str, edit: Edit, expected: str, command: str = "pretrain") -> Case:
    """A copy of the corpus, changed, for a pre-training or for verify."""

    def make(here: Path, world: World) -> None:
        shutil.copytree(world.corpus, here / "shards")
        edit(here / "shards")

    if command == "verify":
        return Case(name, command, expected, make=make, words=("{here}/shards",))
    return Case(name, command, expected, changes={"data.shards": "{here}/shards"}, make=make)


def verified(name: str, edit: Edit, expected: str) -> Case:
    return shards(name, edit, expected, "verify")


def without(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names] and None  # type: ignore[func-returns-value]


def put(name: str, content: bytes | str) -> Edit:
    return lambda folder: (
        (folder / name).write_bytes(  # type: ignore[return-value]
            content.encode() if isinstance(content, str) else content
        )
        and None
    )


def cut(name: str, size: int) -> Edit:
    return lambda folder: os.truncate(folder / name, size)


def setting(file: str, **values: Any) -> Edit:
    """A JSON file with values at a/b/c set, or taken away by None."""

    def edit(folder: Path) -> None:
        tables = json.loads((folder / file).read_text())
        for place, value in values.items():
            *outer, last = place.split("__")
            table = tables
            for key in outer:
                table = table[int(key) if key.isdigit() else key]
            if value is None:
                del table[last]
            else:
                table[last] = value
        (folder / file).write_text(json.dumps(tables))

    return edit


def config(**values: Any) -> Edit:
    return setting("config.json", **values)


def pickled(make: Callable[[Path, Path], None]) -> Edit:
    """The weights as a pickle that `make` writes: (file, canary)."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "pytorch_model.bin", folder.parent / "canary")

    return edit


def zipped_pickle(file: Path, canary: Path) -> None:
    torch.save({"a": Bomb(canary)}, file)


def bare_pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(canary)))


def zip_with_a_way_out(file: Path, canary: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../canary", "out")
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(canary)))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def one_narrower(weights: dict[str, torch.Tensor]) -> None:
    name = next(key for key in weights if key.endswith("layer.1.intermediate.dense.weight"))
    weights[name] = weights[name][:, :-1].contiguous()


def one_label_more(weights: dict[str, torch.Tensor]) -> None:
    weights["classifier.bias"] = weights["classifier.bias"].new_zeros(3)


def without_a_layer(weights: dict[str, torch.Tensor]) -> None:
    for name in [key for key in weights if ".layer.3." in key]:
        del weights[name]


def object_offsets(folder: Path) -> None:
    """Offsets as a pickle of objects, their sum in the manifest."""
    file = next(folder.rglob("train-*.offsets.npy"))
    array = np.empty(1, dtype=object)
    array[0] = Bomb(folder.parent / "canary")
    np.save(file, array, allow_pickle=True)
    _vouch(folder, "offsets", file)


def large_ids(folder: Path) -> None:
    file = next(folder.rglob("train-*.bin"))
    np.full(file.stat().st_size // 2, 60_000, dtype=np.uint16).tofile(file)
    _vouch(folder, "", file)


def _vouch(folder: Path, prefix: str, file: Path) -> None:
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["sources"][0]["splits"]["train"]["shards"][0]
    shard[f"{prefix}_sha256".lstrip("_")] = hashlib.sha256(file.read_bytes()).hexdigest()
    if prefix:
        shard["offsets_bytes"] = file.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flipped(folder: Path) -> None:
    file = next(folder.rglob("train-*.bin"))
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)


SHARD = "sources__0__splits__train__shards__0__"
BIN = "books/train-00000.bin"
NO_MODEL = "cannot read a model"
NO_TOKENIZER = "no tokenizer, neither a folder of one nor a hub name"

MODELS = [
    broken("no-config", without("config.json"), NO_MODEL),
    broken("config-empty", put("config.json", ""), NO_MODEL),
    broken("config-cut", cut("config.json", 100), NO_MODEL),
    broken("config-list", put("config.json", "[]"), NO_MODEL),
    broken("config-binary", put("config.json", b"\xff\xfe\x00"), NO_MODEL),
    broken("config-deep", put("config.json", "[" * 100_000), NO_MODEL),
    broken("config-no-family", config(model_type=None), NO_MODEL),
    broken("config-unknown-family", config(model_type="brt"), NO_MODEL),
    broken("config-decoder", config(model_type="gpt2"), "the family gpt2 is not supported"),
    broken("config-text", config(hidden_size="big"), NO_MODEL),
    broken("config-zero", config(num_attention_heads=0), "num_attention_heads = 0; copy the folder again"),
    broken("config-negative", config(hidden_size=-32), "hidden_size = -32; copy the folder again"),
    broken("config-null", config(num_hidden_layers="4"), NO_MODEL),
    broken("config-code", config(model_type="own", auto_map={"AutoConfig": "evil.Own"}), NO_MODEL),
    broken("config-labels", config(id2label={"0": "no"}), NO_MODEL),
    broken("no-weights", without("model.safetensors"), "no weights, neither model.safetensors nor"),
    broken("weights-empty", put("model.safetensors", b""), "model.safetensors: cannot read weights"),
    broken("weights-cut", cut("model.safetensors", 20_000), "model.safetensors: cannot read weights"),
    broken("weights-header", put("model.safetensors", b"\xff" * 64), "model.safetensors: cannot read weights"),
    broken(
        "weights-long-header", put("model.safetensors", (10**9).to_bytes(8, "little") + b"{}"), "cannot read weights"
    ),
    broken(
        "weights-text",
        put("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "cannot read weights",
    ),
    broken("pickle-zipped", pickled(zipped_pickle), "pytorch_model.bin: cannot read weights"),
    broken("pickle-bare", pickled(bare_pickle), "pytorch_model.bin: cannot read weights"),
    broken("pickle-way-out", pickled(zip_with_a_way_out), "pytorch_model.bin: cannot read weights"),
    broken("pickle-empty", pickled(lambda file, _: file.write_bytes(b"")), "pytorch_model.bin: cannot read weights"),  # type: ignore[arg-type,return-value]
    broken("small-vocabulary", config(vocab_size=50), "tokenizer has"),
    student("student-no-weights", without("model.safetensors"), "no weights, neither"),
    student("student-cut", cut("model.safetensors", 20_000), "cannot read weights"),
    student("student-pickle", pickled(zipped_pickle), "pytorch_model.bin: cannot read weights"),
    student("no-tokenizer", without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    student("tokenizer-template", setting("tokenizer.json", post_processor=None), "no special token before a text"),
    student("tokenizer-empty", put("tokenizer.json", ""), NO_TOKENIZER),
    student("tokenizer-cut", cut("tokenizer.json", 500), NO_TOKENIZER),
    student("tokenizer-list", put("tokenizer.json", "[]"), NO_TOKENIZER),
    student("tokenizer-other", put("tokenizer.json", '{"model": {"type": "Neural"}}'), NO_TOKENIZER),
    student("tokenizer-deep", put("tokenizer.json", "[" * 100_000), NO_TOKENIZER),
    broken("evaluated-no-weights", without("model.safetensors"), "no weights, neither", "evaluate", "model.path"),
    broken("evaluated-pickle", pickled(zipped_pickle), "cannot read weights", "evaluate", "model.path"),
    broken("evaluated-vocabulary", config(vocab_size=50), "tokenizer has", "evaluate", "model.path"),
    broken("labels-gap", config(id2label={"0": "no", "2": "yes"}), "id2label in config.json is {0: no, 2: yes}"),
    broken("labels-twice", config(id2label={"0": "no", "1": "no"}), "id2label in config.json is {0: no, 1: no}"),
    broken("labels-several", config(problem_type="multi_label_classification"), "several labels at once, the task"),
    broken("evaluated-labels", config(id2label={"0": "x", "1": "y"}), "labels are x, y", "evaluate", "model.path"),
]  # fmt: skip
# What only the weights themselves show.
READ = [
    student("lacks-a-layer", weights(without_a_layer), "weights, as bert.encoder.layer.3."),
    student("another-shape", weights(one_narrower), "has another shape than config.json says"),
    student("another-head", weights(one_label_more), "classifier.bias has another shape than config.json says"),
    student("fewer-layers", config(num_hidden_layers=3), "weights have no place in the model of config.json, as "),
    student("more-layers", config(num_hidden_layers=5), "weights, as bert.encoder.layer.4."),
    broken("teacher-lacks-a-layer", weights(without_a_layer), "weights, as bert.encoder.layer.3."),
    broken("teacher-other-shape", weights(one_narrower), "model: "),
]
SHARDS = [
    shards("no-manifest", without("manifest.json"), "holds no token shards; write them with lad-dist prepare"),
    shards("manifest-empty", put("manifest.json", ""), "manifest.json: damaged"),
    shards("manifest-cut", cut("manifest.json", 300), "manifest.json: damaged"),
    shards("manifest-binary", put("manifest.json", b"\xff\x00"), "manifest.json: damaged"),
    shards("manifest-list", put("manifest.json", "[]"), "not format 2 of token shards"),
    shards("manifest-deep", put("manifest.json", "[" * 100_000), "manifest.json: damaged"),
    shards("manifest-future", setting("manifest.json", format=3), "format 3 is of a later lad_dist; update it"),
    shards("manifest-past", setting("manifest.json", format=1), "not format 2 of token shards; prepare the corpus"),
    shards("no-sources", setting("manifest.json", sources=[]), "damaged (sources: "),
    shards("no-splits", setting("manifest.json", sources__0__splits=None), "damaged (sources.0.splits: "),
    shards("objects", setting("manifest.json", dtype="object"), "damaged (dtype: "),
    shards("no-type", setting("manifest.json", dtype="int7"), "damaged (dtype: "),
    shards("negative", setting("manifest.json", **{SHARD + "length": -1}), "length: input should be greater"),
    shards("outside", setting("manifest.json", **{SHARD + "file": "../../x.bin"}), "file: string should match"),
    shards("weightless", setting("manifest.json", sources__0__weight=0.0), "damaged (sources.0.weight: "),
    shards("no-shard", without(BIN), "train-00000.bin: missing; copy the folder again"),
    shards("shard-cut", cut(BIN, 100), "train-00000.bin: 100 bytes, not"),
    shards("no-offsets", without("books/train-00000.offsets.npy"), "offsets.npy: missing"),
    verified("flipped", flipped, "damaged, not the sha256 of the manifest"),
    verified("too-large-ids", large_ids, "holds id 60000, the vocabulary has"),
    verified("pickled-offsets", object_offsets, "offsets.npy: damaged"),
    verified("one-too-many", put("books/train-00001.bin", b"12"), "train-00001.bin: the manifest does not name it"),
    verified("cut", cut(BIN, 100), "train-00000.bin: 100 bytes, not"),
    Case("verify-two", "verify", "verify: unrecognized arguments: b", words=("a", "b")),
]


@pytest.mark.parametrize("case", [*MODELS, *SHARDS], ids=lambda case: case.name)
@pytest.mark.usefixtures("no_weights")
def test_it_ends_in_one_line(case: Case, world: World, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    assert_one_line(complaint(case, tmp_path, world, monkeypatch, capfd), case.expected)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_weights_of_another_model(case: Case, world: World, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:

    from lad_dist.config.errors import UserError

    assert case.make is not None
    case.make(tmp_path, world)
    labels = ("no", "yes")
    with pytest.raises(UserError, match=case.expected):
        loading.load_model(
            str(tmp_path / "model"), "classification", labels=labels, require_head="teacher" in case.name
        )
