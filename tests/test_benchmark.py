"""The benchmark of a step: its arithmetic by hand, its parts no more than the whole."""

from pathlib import Path

import pytest
import toy
from conftest import World
from launching import ROOT, launch

from lad_dist import models
from lad_dist.benchmarks import step
from lad_dist.config import TaskConfig, parse


def test_flops_by_hand() -> None:
    config = models.architecture_config(toy.SIZES, 50)
    batch = toy.batch([5, 3])
    layer = 2 * 8 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 32 * (25 + 9)
    assert models.flops(config, "none", batch) == 4 * layer
    assert models.flops(config, "mlm", batch) == 4 * layer + 2 * 2 * 32 * (32 + 50)


def test_padding_is_no_arithmetic() -> None:
    config = models.architecture_config(toy.SIZES, 50)
    assert models.flops(config, "mlm", toy.batch([5, 3], pad_to=9)) == models.flops(config, "mlm", toy.batch([5, 3]))


def test_a_step_is_taken_apart(world: World, tmp_path: Path) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)
    tables["deepspeed"] = {"zero_optimization": {"stage": 1}}
    figures = step.measure(parse(TaskConfig, tables, "toy"), steps=8)
    assert set(figures.phases) == {"data", "teacher", "forward", "backward", "optimizer"}
    assert all(value > 0 for value in figures.phases.values())
    assert 0.5 * figures.seconds < sum(figures.phases.values()) <= figures.seconds
    assert 0 < figures.communication <= figures.phases["backward"] + figures.phases["optimizer"]
    assert 16 * 3 <= figures.tokens <= 16 * 32
    assert 0 < figures.flops / figures.seconds < figures.peak
    assert not list(tmp_path.iterdir())


def test_the_script_prints_a_table(world: World, tmp_path: Path) -> None:
    files = [f"data.{key}={path}" for key, path in world.files.items()]
    words = [
        f"teacher.path={world.teacher}",
        f"student.path={world.pretrained}",
        "student.depth=2",
        "data.max_length=32",
    ]
    config = tmp_path / "config.toml"
    config.write_text((ROOT / "configs/task/lad.toml").read_text().replace('task = "rte"\n', ""))
    done = launch([ROOT / "launch/benchmark.py", "step", config, *files, *words])
    assert done.returncode == 0, done.stderr
    assert "share of peak" in done.stdout
    wrong = launch([ROOT / "launch/benchmark.py", "stp", config])
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(word: str) -> None:
    done = launch([ROOT / "launch/benchmark.py", word])
    assert done.returncode == 0
    assert "usage" in done.stdout
