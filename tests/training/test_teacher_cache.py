"""The teacher cache returns the teacher's outputs, and changes nothing that is learnt."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from conftest import World
from toy_runs import curve, digest, lad

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.data.datasets import TaskDataset
from lad_dist.data.tasks.task import load_task
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.distributed import processes
from lad_dist.models.frozen import FrozenModel
from lad_dist.training import teacher_cache
from lad_dist.training.teacher_cache import TeacherCache
from lad_dist.training.train import train

OUTPUT_SPEC = OutputSpec(logits=True, hidden=(0, 2, 4), qkv=(4,))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "BLOCK_SIZE", 24)
    monkeypatch.setattr(teacher_cache, "BATCH_SIZE", 5)


def toy_dataset(world: World, **options: Any) -> TaskDataset:
    data = TaskDataConfig(**world.files, max_length=32, micro_batch_size=7, **options)
    return TaskDataset(data, load_task(data), load_tokenizer(str(world.tokenizer)), seed=3)


def frozen(world: World) -> FrozenModel:
    return FrozenModel(str(world.teacher), "classification", device=processes.device(), labels=toy.LABELS)


class ToyTeacher:
    """A teacher under another identity, which counts the sequences of its batches."""

    def __init__(self, teacher: FrozenModel | None, identity: str = "toy") -> None:
        self.teacher, self.identity = teacher, {"weights": identity}
        self.count = 0

    def __call__(self, batch: Batch, output_spec: OutputSpec) -> ModelOutputs:
        assert self.teacher is not None, "the teacher ran"
        self.count += len(batch.lengths)
        return self.teacher(batch, output_spec)


def cached(folder: Path, teacher: ToyTeacher, data: TaskDataset, output_spec: OutputSpec = OUTPUT_SPEC) -> TeacherCache:
    return TeacherCache(folder=folder, teacher=teacher, examples=data.train, output_spec=output_spec, size=0)  # type: ignore[arg-type]


def tensors(outputs: ModelOutputs) -> list[torch.Tensor]:
    assert outputs.logits is not None
    return [outputs.logits, *outputs.hidden.values(), *(x for qkv in outputs.qkv.values() for x in qkv)]


@pytest.mark.parametrize("options", [{}, {"pad_to": 40}], ids=["flat", "padded"])
@pytest.mark.usefixtures("small_blocks")
def test_the_cache_returns_what_the_teacher_computes(options: dict[str, Any], world: World, tmp_path: Path) -> None:
    teacher, data = frozen(world), toy_dataset(world, **options)
    cache = cached(tmp_path, ToyTeacher(teacher), data)
    for step in range(12):  # more than an epoch: examples of all blocks, in any order
        actual, expected = cache(data.example_ids(step, 0)), teacher(data.batch(step, 0), OUTPUT_SPEC)
        assert (actual.hidden.keys(), actual.qkv.keys()) == (expected.hidden.keys(), expected.qkv.keys())
        for x, y in zip(tensors(actual), tensors(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_a_teacher_runs_once_and_only_for_what_is_missing(world: World, tmp_path: Path) -> None:
    teacher, no_teacher, data = ToyTeacher(frozen(world)), ToyTeacher(None), toy_dataset(world)
    first = cached(tmp_path, teacher, data)
    assert teacher.count == data.train.count
    again = cached(tmp_path, no_teacher, data)
    fewer = cached(tmp_path, no_teacher, data, OutputSpec(hidden=(2,)))
    numbers = np.array([3, 60, 3, 25])
    for x, y in zip(tensors(first(numbers)), tensors(again(numbers)), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(fewer(numbers).hidden[2], first(numbers).hidden[2])
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.suffix == ".safetensors"}
    cached(tmp_path, teacher, data, OutputSpec(hidden=(2, 3)))
    after = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path in before}
    assert after == before
    assert len(list(first.folder.glob("hidden-3.*"))) == 3


@pytest.mark.usefixtures("small_blocks")
def test_other_data_or_another_teacher_have_another_cache(world: World, tmp_path: Path) -> None:
    teacher = ToyTeacher(frozen(world))
    folders = {cached(tmp_path, teacher, toy_dataset(world, **options)).folder for options in ({}, {"pad_to": 40})}
    other = cached(tmp_path, ToyTeacher(teacher.teacher, "other"), toy_dataset(world))
    assert len(folders | {other.folder}) == 3


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", [b"", b"\xff" * 100])
def test_a_damaged_file_is_computed_again(
    damage: bytes, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = ToyTeacher(frozen(world)), toy_dataset(world)
    whole = cached(tmp_path, teacher, data)
    everything = np.arange(data.train.count)
    expected = [x.clone() for x in tensors(whole(everything))]
    file = whole.folder / "hidden-2.00001.safetensors"
    del whole
    file.unlink()
    file.write_bytes(damage)
    actual = cached(tmp_path, teacher, data)(everything)
    assert "hidden-2.00001.safetensors: damaged" in capsys.readouterr().err
    assert all(torch.equal(x, y) for x, y in zip(tensors(actual), expected, strict=True))


def test_a_run_with_a_filled_cache_equals_one_that_fills_it(world: World, tmp_path: Path) -> None:
    """Bit for bit; and a run with a cache of its own leaves nothing behind."""
    rows: dict[str, list[dict[str, Any]]] = {"own": [], "first": [], "second": []}
    changes = {"own": {}, "first": {"teacher.cache": str(tmp_path / "shared")}}
    changes["second"] = changes["first"]
    folders = {name: train(lad(world, tmp_path / name, changes[name]), rows[name].append).folder for name in rows}
    assert curve(rows["own"]) == curve(rows["first"]) == curve(rows["second"])
    assert len({digest(folder / "export") for folder in folders.values()}) == 1
    assert not (folders["own"] / "teacher_cache").exists()
    assert len(list((tmp_path / "shared").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"run.steps": 3}, False),  # no example is read twice
        ({"run.steps": 3, "teacher.cache": "shared"}, True),
        ({"teacher.cache": "shared", "teacher.cache_gb": 1e-6}, False),
        ({"teacher.cache": "shared", "teacher.cache_gb": 1e-2}, True),
    ],
)
def test_a_cache_is_used_where_it_pays(
    changes: dict[str, Any],
    used: bool,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, caches = tmp_path / "shared", list[TeacherCache]()

    def build(**arguments: Any) -> TeacherCache:
        caches.append(TeacherCache(**arguments))
        return caches[-1]

    monkeypatch.setattr("lad_dist.training.teacher.TeacherCache", build)
    changes = {key: str(shared) if value == "shared" else value for key, value in changes.items()}
    train(lad(world, tmp_path, changes))
    assert [cache.folder.parent for cache in caches] == [shared] * used
    refused = changes.get("teacher.cache_gb") == 1e-6
    assert ("the teacher runs at each step, as a cache would take" in capsys.readouterr().err) == refused


def test_a_run_without_a_cache_learns_nearly_the_same(world: World, tmp_path: Path) -> None:
    rows: dict[float, list[dict[str, Any]]] = {0.0: [], 20.0: []}
    for size, size_rows in rows.items():
        train(lad(world, tmp_path / str(size), {"teacher.cache_gb": size}), size_rows.append)
    uncached, cached_once = ([row["loss"] for row in size_rows if "loss" in row] for size_rows in rows.values())
    assert uncached == pytest.approx(cached_once, rel=1e-4)


def test_a_disk_without_room_is_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, usage = tmp_path / "full", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: usage._replace(free=10) if Path(place).is_relative_to(cache) else usage
    )
    with pytest.raises(UserError, match=r"take 0\.0 GB, 0\.0 GB are free; set teacher\.cache to a folder on another"):
        train(lad(world, tmp_path, {"teacher.cache": str(cache)}))


def test_a_file_where_the_folder_should_be_is_one_line(world: World, tmp_path: Path) -> None:
    folder = lad(world, tmp_path).run.folder
    folder.mkdir()
    (folder / "teacher_cache").write_text("")
    with pytest.raises(UserError, match="cannot store the teacher's outputs in this folder"):
        train(lad(world, tmp_path))
