"""The benchmarks: phases add up to no more than the step; the three ways to prepare data read the same text."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import ROOT, run_command

from lad_dist.benchmarks import data, step
from lad_dist.benchmarks.measured_speed import read_measured_speed
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TaskConfig
from lad_dist.data.shards.reader import Shards, read_manifest


def test_a_step_is_taken_apart(world: World, tmp_path: Path) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    tables["deepspeed"] = {"zero_optimization": {"stage": 1}}
    figures = step.measure(parse_config(TaskConfig, tables, "toy"), steps=8)
    assert set(figures.phases) == {"data", "teacher", "forward", "backward", "optimizer"}
    assert all(value > 0 for value in figures.phases.values())
    assert 0.5 * figures.seconds < sum(figures.phases.values()) <= figures.seconds
    assert 0 < figures.communication <= figures.phases["backward"] + figures.phases["optimizer"]
    assert 16 * 3 <= figures.tokens <= 16 * 32
    assert 0 < figures.flops / figures.seconds < figures.peak
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_table(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"data.{key}={path}" for key, path in world.files.items()]
    overrides = [
        f"teacher.path={world.teacher}",
        f"student.path={world.pretrained}",
        "student.num_hidden_layers=2",
        "data.max_length=32",
        "data.micro_batch_size=4",
        f"run.dir={tmp_path / 'runs'}",
    ]
    config = tmp_path / "config.toml"
    config.write_text((ROOT / "configs/task/lad.toml").read_text().replace('task = "rte"\n', ""))
    assert run_command("benchmark", "step", str(config), *files, *overrides) == 0
    assert "share of peak" in capsys.readouterr().out
    speed = read_measured_speed(tmp_path / "runs" / "benchmark.json")
    assert (speed.device, speed.precision, speed.processes) == ("cpu", "bfloat16", 1)
    assert 0 < speed.flops_per_process < speed.peak_flops_per_second
    assert run_command("plan", str(config), *files, *overrides) == 0
    assert "as measured by lad-dist benchmark step" in capsys.readouterr().out
    assert run_command("benchmark", "stp", str(config)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def no_clock() -> Any:
    return contextlib.nullcontext()


@pytest.fixture
def books(world: World) -> PrepareConfig:
    source = {"kind": "text", "path": str(world.books)}
    return PrepareConfig.model_validate({"out": "nowhere", "tokenizer": str(world.tokenizer), "source": [source]})


def test_a_sample_is_cut_repeated_and_never_the_same_twice(
    books: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.jsonl"
    size = data._write_sample(books, file, 3)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(texts) == len(set(texts)) == 3 * 40
    assert sum(map(len, texts)) == size
    monkeypatch.setattr(data, "SAMPLE_CHARACTERS", len(texts[0]) + 1)
    data._write_sample(books, file, 1)
    assert file.read_text().count("\n") == 2


def test_all_three_read_the_whole_sample(books: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "texts.jsonl"
    data._write_sample(books, file, 1)
    encoded: list[str] = []
    monkeypatch.setattr(data, "_encode", lambda tokenizer, texts: encoded.extend(texts))
    data._tokenize(no_clock, books, file, 1)
    assert encoded == [json.loads(line)["text"] for line in file.read_text().splitlines()]
    data._prepare(no_clock, books, file, 2, tmp_path / "shards")
    (source,) = read_manifest(tmp_path / "shards")["sources"]
    assert source["documents_read"] == len(encoded) == 40
    blocks = data._blocks({"input_ids": [[1, 2, 3], [4, 5], [6, 7]]}, length=3)
    assert blocks == {"input_ids": [[1, 2, 3], [4, 5, 6]]}
    data._map(no_clock, books, file, 1, tmp_path / "cache")
    sequences, tokens, filled = data._load(no_clock, tmp_path / "shards", 32)
    assert filled > 0.9
    assert sequences > 0
    assert tokens == pytest.approx(filled * data.MICRO_BATCH_TOKENS * (data.BATCHES - 1))
    assert Shards(tmp_path / "shards").streams[0].length > 1000


def test_a_process_reports_what_it_took() -> None:
    measurement = data._run(_double, 21)
    assert measurement.value == 42
    assert measurement.seconds >= 0.05
    assert measurement.megabytes > 1


def _double(clock: Any, number: int) -> int:
    import time

    time.sleep(0.2)
    with clock():
        time.sleep(0.05)
    return 2 * number
