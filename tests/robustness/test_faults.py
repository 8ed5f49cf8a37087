"""What befalls a run, by its only entry: spoilt updates, other data, broken devices, full disks, a wish to stop."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import exit_code
from torch import Tensor

from lad_dist.checkpointing import async_save
from lad_dist.checkpointing.store import CheckpointStore
from lad_dist.config.errors import EXIT_RUN_AGAIN, Fault, UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.step_state import StepState
from lad_dist.distributed import processes, replica_check
from lad_dist.runs.run_folder import NoProgress
from lad_dist.training.distiller import Distiller
from lad_dist.training.train import train

Row = dict[str, Any]


@pytest.fixture
def make(world: World, tmp_path: Path) -> Callable[..., TrainConfig]:
    def config(changes: Row | None = None, name: str = "runs") -> TrainConfig:
        tables = toy.task_config(tmp_path / name, world.files, world.teacher, world.pretrained)
        return toy.parsed(tables, {"data.micro_batches_per_step": 1, **(changes or {})})

    return config


def steps_of(rows: list[Row]) -> list[int]:
    return [row["step"] for row in rows if "loss" in row]


def weights(config: TrainConfig) -> bytes:
    return (config.run.folder / "export" / "model.safetensors").read_bytes()


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of these steps infinite."""
    on_step_start, forward = Distiller.on_step_start, Distiller.forward
    now: list[int] = []

    def watched(self: Distiller, state: StepState) -> None:
        now[:] = [state.step]
        on_step_start(self, state)

    def poisoned(self: Distiller, batch: Any, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = forward(self, batch, target)
        return (loss * math.inf if self.training and now[0] in steps else loss), terms

    monkeypatch.setattr(Distiller, "on_step_start", watched)
    monkeypatch.setattr(Distiller, "forward", poisoned)


def test_a_spoilt_update_is_skipped_and_reported(
    make: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {3})
    config, rows = make(), list[Row]()
    result = train(config, rows.append)
    assert all(math.isfinite(value) for name, value in result.results["metrics"].items() if name != "loss")
    assert result.results["skipped_updates"] == 1
    assert "8 steps (1 without an update" in (result.export_dir / "README.md").read_text()
    assert steps_of(rows) == list(range(1, 9))
    assert [math.isinf(row["loss"]) for row in rows if "loss" in row] == [step == 4 for step in range(1, 9)]
    assert "the update of step 3 was skipped: loss inf" in capsys.readouterr().err
    skipped = json.loads((config.run.folder / "skipped_steps.json").read_text())
    assert skipped["skipped_steps"] == []
    assert [(row["step"], len(row["samples"])) for row in skipped["skipped"]] == [(3, 1)]
    assert len(skipped["skipped"][0]["samples"][0]) == 4


def test_skips_in_a_row_go_back_to_a_checkpoint_and_leave_their_steps_out(
    make: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 6 and 7 are spoilt: they and the two before them are left out, whatever had been saved since."""
    poison(monkeypatch, {6, 7})
    changes = {"run.steps": 12, "run.save_every": 2, "run.keep": 5, "run.max_skips": 2}
    config, rows = make(changes), list[Row]()
    assert train(config, rows.append).results["skipped_updates"] == 4
    assert "going back to step-000000004" in capsys.readouterr().err
    assert steps_of(rows) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    written = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(written) == [1, 2, 3, 4, 9, 10, 11, 12]
    assert json.loads((config.run.folder / "skipped_steps.json").read_text())["skipped_steps"] == [4, 5, 6, 7]
    assert not (config.run.folder / "crashes.json").exists()


def test_without_a_checkpoint_it_goes_back_to_the_beginning(
    make: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as a run that had left these steps out from the start."""
    poison(monkeypatch, {4, 5})
    config = make({"run.max_skips": 2})
    assert train(config).results is not None
    other = make(name="other")
    (other.run.folder).mkdir(parents=True)
    (other.run.folder / "skipped_steps.json").write_text('{"skipped_steps": [2, 3, 4, 5], "skipped": []}')
    train(other)
    assert weights(config) == weights(other)


@pytest.mark.parametrize(
    ("steps", "message"), [(100, "update after update was skipped"), (8, "all 8 updates were skipped; skipped_steps")]
)
def test_a_run_that_only_skips_ends_with_what_is_wrong(
    steps: int,
    message: str,
    make: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, set(range(100)))
    config = make({"run.steps": steps, "run.max_skips": 1, "run.log_every": 100})

    def work() -> int:
        train(config)
        return 0

    assert exit_code(work) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert json.loads((config.run.folder / "crashes.json").read_text())["crashes"] == 1


def stop_at(step: int, how: Callable[[], None]) -> Callable[[Row], None]:
    def report(row: Row) -> None:
        if row["step"] == step:
            how()

    return report


def test_the_file_stop_ends_a_run_which_then_goes_on(make: Callable[..., TrainConfig]) -> None:
    config, straight = make({"run.steps": 4}), make({"run.steps": 4}, "other")
    stop = config.run.folder / "STOP"
    result = train(config, stop_at(1, stop.touch))
    assert result.results is None
    assert not stop.exists()
    train(straight)
    train(config)
    assert weights(config) == weights(straight)


def test_a_disk_that_takes_no_checkpoint_ends_the_run_after_three(
    make: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(async_save, "write", full)
    rows: list[Row] = []
    config = make({"run.steps": 30, "run.save_every": 2})
    with pytest.raises(Fault, match="No space left on device") as caught:
        train(config, rows.append)
    assert caught.value.code == EXIT_RUN_AGAIN
    assert 3 <= len(rows) < 30
    for _ in range(2):
        with pytest.raises(Fault):
            train(config)
    with pytest.raises(NoProgress, match="died 3 times in a row at the beginning"):
        train(config)
    monkeypatch.undo()
    (config.run.folder / "crashes.json").unlink()
    assert train(config).results is not None


@pytest.mark.parametrize("change", ["text", "label"])
def test_other_data_are_refused_when_a_run_is_taken_up(change: str, world: World, tmp_path: Path) -> None:
    files = toy.task_files(tmp_path / "files")
    config = toy.parsed(toy.task_config(tmp_path, files, world.teacher, world.pretrained), {"run.steps": 4})
    train(config, stop_at(1, processes._request_stop))
    lines = Path(files["train"]).read_text().splitlines()
    text, label = lines[5].split(",")
    lines[5] = f"{text} de,{label}" if change == "text" else f"{text},{'no' if label == 'yes' else 'yes'}"
    Path(files["train"]).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="the data or the tokenizer changed since it was saved"):
        train(config)


def test_weights_that_differ_end_the_run_before_they_are_saved(
    make: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lad_dist.training.resumption.divergent_ranks", lambda _: [1])
    monkeypatch.setattr("lad_dist.training.resumption._has_replicas", lambda _: True)
    config = make({"run.save_every": 3})
    with pytest.raises(Fault, match="after step 2 the weights of rank 1 are not those of the others"):
        train(config)
    assert CheckpointStore(config.run.folder / "checkpoints").newest() is None
    assert replica_check.divergent_ranks([]) == []
