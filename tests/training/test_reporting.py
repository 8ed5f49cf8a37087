"""What a run says of itself before its first step, and how long it will take."""

import signal
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from toy_runs import lad

from lad_dist.training import reporting
from lad_dist.training.train import RunStatus, train


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == reporting.__name__]


def test_a_run_says_what_it_is(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long, short = " ".join(["ba"] * 20), "ba"
    (tmp_path / "train.csv").write_text("text,label\n" + f"{long},yes\n" * 16 + f"{short},no\n" * 48)
    config = lad(world, tmp_path, {"run.steps": 2, "data.max_length": 8, "data.train": str(tmp_path / "train.csv")})
    with caplog.at_level("INFO"):
        train(config)
    data, models, steps, teacher = messages(caplog)
    assert data == "toy: 64 training examples, 25.00% of them cut at 8 tokens; 24 to evaluate on"
    assert "layers x 32; teacher " in models
    assert f"2 steps of {config.data.micro_batches_per_step} micro-batches on cpu, 1 process, fp32" in steps
    assert "step 0/2  teacher accuracy " in teacher


def test_texts_that_fit_are_not_called_cut(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(lad(world, tmp_path, {"run.steps": 1, "data.max_length": 64}))
    assert messages(caplog)[0].endswith(": 64 training examples; 24 to evaluate on")


def test_a_corpus_says_how_much_text_it_is(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    with caplog.at_level("INFO"):
        train(toy.parsed(tables, {"run.steps": 1}))
    assert f"tokens of books, in windows of {tables['data']['max_length']}" in messages(caplog)[0]


def test_a_resumed_run_says_where_it_goes_on(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = lad(world, tmp_path, {"run.steps": 4, "run.log_every": 1})

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            signal.raise_signal(signal.SIGUSR1)

    assert train(config, stop).status is RunStatus.STOPPED
    with caplog.at_level("INFO"):
        assert train(config).status is RunStatus.COMPLETED
    assert "toy: resumed from step 2 of 4" in messages(caplog)


def test_the_first_steps_say_how_long_a_run_takes(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter((0.0, 10.0))
    monkeypatch.setattr(reporting, "monotonic", lambda: next(seconds))
    with caplog.at_level("INFO"):
        train(lad(world, tmp_path, {"run.steps": 8}))
    assert messages(caplog)[-1].endswith(": about 0:00:04 to go at 2 s a step, without evaluation")
