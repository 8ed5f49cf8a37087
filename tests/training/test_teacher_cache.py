"""A teacher's answers: what is kept is what it says, and keeping it changes nothing that is learnt."""

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
from lad_dist.models.frozen import FrozenModel
from lad_dist.training import teacher_cache
from lad_dist.training.teacher_cache import TeacherCache
from lad_dist.training.train import train

CPU = torch.device("cpu")
NEEDS = OutputSpec(logits=True, hidden=(0, 2, 4), qkv=(4,))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "BLOCK", 24)
    monkeypatch.setattr(teacher_cache, "BATCH", 5)


def feed(world: World, **words: Any) -> TaskDataset:
    data = TaskDataConfig(**world.files, max_length=32, micro_batch_size=7, **words)
    return TaskDataset(data, load_task(data), load_tokenizer(str(world.tokenizer)), seed=3)


def frozen(world: World) -> FrozenModel:
    return FrozenModel(str(world.teacher), "classification", device=CPU, labels=toy.LABELS)


def kept(folder: Path, ask: teacher_cache.AskTeacher, data: TaskDataset, needs: OutputSpec = NEEDS) -> TeacherCache:
    return TeacherCache(folder, ask, {"weights": "toy"}, data.train, needs, CPU, size=0)


def nobody(batch: Batch, needs: OutputSpec) -> ModelOutputs:
    raise AssertionError("it was asked")


def tensors(trace: ModelOutputs) -> list[torch.Tensor]:
    assert trace.logits is not None
    return [trace.logits, *trace.hidden.values(), *(x for qkv in trace.qkv.values() for x in qkv)]


@pytest.mark.parametrize("words", [{}, {"pad_to": 40}], ids=["flat", "padded"])
@pytest.mark.usefixtures("small_blocks")
def test_what_is_kept_is_what_the_teacher_says(words: dict[str, Any], world: World, tmp_path: Path) -> None:
    teacher, data = frozen(world), feed(world, **words)
    found = kept(tmp_path, teacher, data)
    for step in range(12):  # more than an epoch: examples of all blocks, in any order
        seen, said = found(data.numbers(step, 0)), teacher(data.batch(step, 0), NEEDS)
        assert (seen.hidden.keys(), seen.qkv.keys()) == (said.hidden.keys(), said.qkv.keys())
        for x, y in zip(tensors(seen), tensors(said), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_a_teacher_is_asked_once_and_only_for_what_is_missing(world: World, tmp_path: Path) -> None:
    teacher, data, asked = frozen(world), feed(world), list[int]()

    def ask(batch: Batch, needs: OutputSpec) -> ModelOutputs:
        asked.append(len(batch.lengths))
        return teacher(batch, needs)

    first = kept(tmp_path, ask, data)
    assert sum(asked) == data.train.count
    again = kept(tmp_path, nobody, data)
    fewer = kept(tmp_path, nobody, data, OutputSpec(hidden=(2,)))
    numbers = np.array([3, 60, 3, 25])
    for x, y in zip(tensors(first(numbers)), tensors(again(numbers)), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(fewer(numbers).hidden[2], first(numbers).hidden[2])
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.suffix == ".safetensors"}
    kept(tmp_path, ask, data, OutputSpec(hidden=(2, 3)))
    after = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path in before}
    assert after == before
    assert len(list(first.folder.glob("hidden-3.*"))) == 3


@pytest.mark.usefixtures("small_blocks")
def test_other_data_or_another_teacher_have_other_answers(world: World, tmp_path: Path) -> None:
    teacher = frozen(world)
    folders = {kept(tmp_path, teacher, feed(world, **words)).folder for words in ({}, {"pad_to": 40})}
    other = TeacherCache(tmp_path, teacher, {"weights": "other"}, feed(world).train, NEEDS, CPU, size=0)
    assert len(folders | {other.folder}) == 3


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", [b"", b"\xff" * 100])
def test_a_damaged_file_is_asked_for_again(
    damage: bytes, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = frozen(world), feed(world)
    whole = kept(tmp_path, teacher, data)
    everything = np.arange(data.train.count)
    expected = [x.clone() for x in tensors(whole(everything))]
    file = whole.folder / "hidden-2.00001.safetensors"
    del whole
    file.unlink()
    file.write_bytes(damage)
    found = kept(tmp_path, teacher, data)(everything)
    assert "hidden-2.00001.safetensors: damaged" in capsys.readouterr().err
    assert all(torch.equal(x, y) for x, y in zip(tensors(found), expected, strict=True))


def test_a_run_with_found_answers_is_one_that_had_to_ask(world: World, tmp_path: Path) -> None:
    """Bit for bit; and one that keeps them for itself leaves nothing behind."""
    rows: dict[str, list[dict[str, Any]]] = {"own": [], "asked": [], "found": []}
    changes = {"own": {}, "asked": {"teacher.cache": str(tmp_path / "shared")}}
    changes["found"] = changes["asked"]
    folders = {name: train(lad(world, tmp_path / name, changes[name]), rows[name].append).folder for name in rows}
    assert curve(rows["own"]) == curve(rows["asked"]) == curve(rows["found"])
    assert len({digest(folder / "export") for folder in folders.values()}) == 1
    assert not (folders["own"] / "teacher_cache").exists()
    assert len(list((tmp_path / "shared").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "kept_ones"),
    [
        ({"run.steps": 3}, False),  # no example is read twice
        ({"run.steps": 3, "teacher.cache": "shared"}, True),
        ({"teacher.cache": "shared", "teacher.cache_gb": 1e-6}, False),
        ({"teacher.cache": "shared", "teacher.cache_gb": 1e-2}, True),
    ],
)
def test_answers_are_kept_where_it_pays(
    changes: dict[str, Any],
    kept_ones: bool,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, made = tmp_path / "shared", list[TeacherCache]()

    def make(*words: Any) -> TeacherCache:
        made.append(TeacherCache(*words))
        return made[-1]

    monkeypatch.setattr("lad_dist.training.train.TeacherCache", make)
    changes = {key: str(shared) if value == "shared" else value for key, value in changes.items()}
    train(lad(world, tmp_path, changes))
    assert [found.folder.parent for found in made] == [shared] * kept_ones
    refused = changes.get("teacher.cache_gb") == 1e-6
    assert ("asked anew at each step; its answers would take" in capsys.readouterr().err) == refused


def test_a_run_that_asks_at_each_step_learns_nearly_the_same(world: World, tmp_path: Path) -> None:
    rows: dict[float, list[dict[str, Any]]] = {0.0: [], 20.0: []}
    for size, seen in rows.items():
        train(lad(world, tmp_path / str(size), {"teacher.cache_gb": size}), seen.append)
    anew, once = ([row["loss"] for row in seen if "loss" in row] for seen in rows.values())
    assert anew == pytest.approx(once, rel=1e-4)


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
    with pytest.raises(UserError, match="cannot keep the teacher's answers there"):
        train(lad(world, tmp_path))
