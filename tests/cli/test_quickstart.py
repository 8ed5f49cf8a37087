"""All stages of the quickstart, at a size that takes seconds; the models learn nothing at it."""

import json
from pathlib import Path

import pytest

from lad_dist.cli.commands import quickstart
from lad_dist.config.errors import UserError

SMALL = """
text.most=300 text.train_each=8 text.few_each=4 text.dev_each=4 text.held_out=0.4
pretrain.run.steps=2 pretrain.student.architecture.hidden_size=32 pretrain.student.architecture.num_attention_heads=2
pretrain.student.architecture.intermediate_size=64
teacher.run.epochs=1.0 lad.run.epochs=1.0 alone.run.epochs=1.0 lad.run.log_every=1 alone.run.log_every=1
lad.teacher.baseline_check=false
""".split()


def test_all_stages_run_and_a_second_call_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = quickstart.changes_by_stage(SMALL)
    results = quickstart.run_all(tmp_path, changes)
    quickstart.show(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["lad"]["parameters"] == results["alone"]["parameters"] < results["teacher"]["parameters"]
    assert 0 <= results["lad"]["label_loyalty"] <= 1
    printed = capsys.readouterr().out
    assert "student by LAD" in printed
    alone = results["alone"]
    assert f"{alone['accuracy']:.3f} ± {alone['accuracy_error']:.3f}" in printed
    assert "speedup" in results["lad"]
    assert "speedup" not in alone
    lines = {name: len((tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "few")}
    assert lines["train"] == 2 * lines["few"]
    assert all((tmp_path / path).exists() for path in ("lad/export/model.safetensors", "lad/tensorboard"))
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {"accuracy.png", "lad-terms.png", "alone-terms.png", "lad-gates.png"}

    trained = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/export/model.safetensors")}
    assert len(trained) == 4
    again = quickstart.run_all(tmp_path, changes)
    assert again["lad"]["accuracy"] == results["lad"]["accuracy"]
    assert {file: file.stat().st_mtime_ns for file in trained} == trained


def test_an_unknown_stage_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match='did you mean "teacher"'):
        quickstart.changes_by_stage(["techer.run.epochs=1.0"])


def test_a_misspelt_key_of_a_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lad\.toml: optim\.l_r: no such key"):
        quickstart.stage_config(
            quickstart.TaskConfig, "lad", tmp_path, quickstart.changes_by_stage(["lad.optim.l_r=1.0"])
        )
