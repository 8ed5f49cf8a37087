"""Which student a run exports, and when training ends early."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import toy
import training_worker
from conftest import World
from launching import run_ranks
from safetensors.torch import load_file
from torch import nn
from toy_runs import curve, digest, lad, metrics_file, stopped_at
from world_sizes import zero

from lad_dist.cli.commands.train import run_training
from lad_dist.compression.compressed_module import CompressedModule, compressed_modules
from lad_dist.compression.theseus import TheseusBlock, replacement_probability
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.step_state import StepState
from lad_dist.data.shards.reader import Stream
from lad_dist.runs.run_folder import Run
from lad_dist.training.best_model import BestModel
from lad_dist.training.distiller import Distiller
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.train import train
from lad_dist.training.trainer import Trainer

BEST = {"run.steps": 8, "run.eval_every": 2, "run.best_metric": "accuracy", "data.micro_batches_per_step": 2,
        "student.dropout": 0.1}  # fmt: skip
EARLY = {2: 0.5, 4: 0.1, 6: 0.1, 8: 0.9}  # with a patience of 2, training ends after step 6
LATE = {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4}


def script(patch: pytest.MonkeyPatch, accuracy: Mapping[int, float]) -> None:
    """Let evaluations give this accuracy, by the number of steps done."""
    on_step_start, evaluate, done = Distiller.on_step_start, Trainer.evaluate, [0]

    def watched(distiller: Distiller, state: StepState) -> None:
        done[0] = state.step + 1
        on_step_start(distiller, state)

    patch.setattr(Distiller, "on_step_start", watched)
    patch.setattr(Trainer, "evaluate", lambda trainer: evaluate(trainer) | {"accuracy": accuracy[done[0]]})


@pytest.mark.parametrize(
    ("metric", "values", "best", "step", "ends"),
    [
        ("accuracy", [0.1, 0.5, 0.5, 0.4, 0.6], [1, 2, 5], 5, None),  # of equal ones the first
        ("accuracy", [0.5, 0.1, 0.5, 0.2, 0.9], [1], 1, 4),
        ("accuracy", [0.5, 0.1, 0.2, 0.6, 0.1, 0.1, 0.1], [1, 4], 4, 7),
        ("loss", [2.0, 1.0, 3.0, 0.5], [1, 2, 4], 4, None),
        ("loss", [math.nan, math.nan, math.nan, math.inf, 1.0, math.nan, -math.inf, 2.0], [5], 5, 8),
        ("pearson", [None, -0.5, None, -0.25], [2, 4], 4, None),
        (None, [1.0, 2.0], [], 0, None),
    ],
)
def test_the_best_evaluation_and_the_end_of_patience(
    metric: str | None, values: list[float | None], best: list[int], step: int, ends: int | None
) -> None:
    """Also where the state goes through a checkpoint after each evaluation."""
    model, improved = BestModel(metric, patience=3), []
    for number, value in enumerate(values, start=1):
        if model.update(number, {} if value is None or metric is None else {metric: value, "other": 7.0}):
            improved.append(number)
        assert model.last_step(99) == (number if number == ends else 99)
        assert model.ends_training == (number == ends), number
        if number == ends:
            break
        model, before = BestModel(metric, patience=3, _last=number), model
        model.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (improved, model.step) == (best, step)


def twin(config: TrainConfig, step: int) -> dict[str, torch.Tensor]:
    """Return the state of a run that stopped after the step."""
    folder = stopped_at(config, step).folder / "checkpoints" / f"step-{step:09d}" / "state"
    return torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]


def test_the_best_student_is_that_of_a_run_stopped_at_that_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(lad(world, tmp_path / "plain", BEST | {"run.best_metric": None}))
    expected = twin(lad(world, tmp_path / "twin", BEST | {"run.best_metric": None}), 4)
    script(monkeypatch, LATE)
    result = train(lad(world, tmp_path / "best", BEST))
    assert (result.results["steps"], result.results["exported_step"]) == (8, 4)
    assert result.results["selection"] == "best dev accuracy at step 4 of 8"
    exported = load_file(result.export_dir / "model.safetensors")
    assert all(torch.equal(weight, expected[f"student.{name}"]) for name, weight in exported.items())
    assert digest(result.export_dir) != digest(plain.export_dir)
    # What it scores is what it was scored on the way: the accuracy alone is scripted.
    row = next(row for row in metrics_file(result.folder) if row["step"] == 4 and "dev/loss" in row)
    assert result.results["metrics"]["loss"] == row["dev/loss"]
    assert "step 4: best dev accuracy at step 4 of 8." in (result.export_dir / "README.md").read_text()
    # All that is trained is as without a choice.
    losses = [[row["loss"] for row in metrics_file(each.folder) if "loss" in row] for each in (plain, result)]
    assert losses[0] == losses[1]
    script(monkeypatch, {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.6})
    last = train(lad(world, tmp_path / "last", BEST))
    assert last.results["exported_step"] == 8
    assert digest(last.export_dir) == digest(plain.export_dir)


def die_at(step: int) -> Callable[[dict[str, Any]], None]:
    def report(row: dict[str, Any]) -> None:
        if row["step"] == step and "loss" in row:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_run_that_is_killed_and_resumed_chooses_as_one_that_is_not(
    save_every: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between evaluations, stopped at one and after one, and killed when patience has run out."""
    script(monkeypatch, EARLY)
    changes = BEST | {"run.patience": 2, "run.save_every": save_every}
    straight = train(lad(world, tmp_path / "straight", changes))
    assert (straight.results["steps"], straight.results["exported_step"]) == (6, 2)
    text = "best dev accuracy at step 2 of 8; stopped early at step 6, after 2 evaluations without improvement"
    assert straight.results["selection"] == text
    assert [row["step"] for row in metrics_file(straight.folder) if "dev/loss" in row] == [2, 4, 6]
    assert metrics_file(straight.folder)[-1]["step"] == 6
    config = lad(world, tmp_path / "resumed", changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, die_at(4))
    assert stopped_at(config, 4).results is None
    assert stopped_at(config, 5).results is None
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *_: die_at(0)({"step": 0, "loss": 0.0}))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = train(config)
    for name in ("steps", "exported_step", "selection", "metrics"):
        assert resumed.results[name] == straight.results[name]
    assert digest(resumed.export_dir) == digest(straight.export_dir)
    assert curve(metrics_file(resumed.folder)) == curve(metrics_file(straight.folder))


def test_a_run_that_goes_back_chooses_among_what_it_goes_on_from(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 6 and 7 are spoilt: the run goes back to step 4, and the evaluation of step 6 counts no more."""
    script(monkeypatch, {2: 0.3, 4: 0.1, 6: 0.9, 10: 0.2, 12: 0.1})
    on_step_start, forward, now = Distiller.on_step_start, Distiller.forward, [0]

    def watched(distiller: Distiller, state: StepState) -> None:
        now[0] = state.step
        on_step_start(distiller, state)

    def spoilt(distiller: Distiller, *inputs: Any) -> Any:
        loss, terms = forward(distiller, *inputs)
        return (loss * math.inf if distiller.training and now[0] in (6, 7) else loss), terms

    monkeypatch.setattr(Distiller, "on_step_start", watched)
    monkeypatch.setattr(Distiller, "forward", spoilt)
    result = train(lad(world, tmp_path, BEST | {"run.steps": 12, "run.save_every": 2, "run.max_skips": 2}))
    assert result.results["skipped_updates"] == 4
    assert result.results["selection"] == "best dev accuracy at step 2 of 12"


def test_a_pruned_student_is_chosen_once_the_last_weights_have_gone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last go before the fifth step: evaluations after two and after four show other models."""
    prune = {"name": "prune", "sparsity": 0.5, "end": 0.5, "update_every": 1}
    changes = BEST | {"compression": [prune], "run.patience": 1}
    expected = twin(lad(world, tmp_path / "twin", BEST | {"run.best_metric": None, "compression": [prune]}), 6)
    script(monkeypatch, {2: 0.9, 4: 0.8, 6: 0.3, 8: 0.2})
    result = train(lad(world, tmp_path / "best", changes))
    assert (result.results["steps"], result.results["exported_step"]) == (8, 6)
    exported, pruned = load_file(result.export_dir / "model.safetensors"), 0
    for name in (name for name in exported if f"student.{name.removesuffix('weight')}mask.keep" in expected):
        module = f"student.{name.removesuffix('.weight')}"
        keep = expected[f"{module}.mask.keep"]
        assert torch.equal(exported[name], expected[f"{module}.inner.weight"] * keep)
        pruned += int((~keep).sum())
    assert pruned
    with pytest.raises(UserError, match="form after each of the 3 evaluations before step 8, so that none can be the"):
        train(lad(world, tmp_path / "never", BEST | {"compression": [prune | {"end": 1.0}]}))
    assert not (tmp_path / "never" / "toy" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("compression", "final"),
    [
        ({"name": "prune", "sparsity": 0.5, "end": 0.5, "criterion": "movement"}, 50),
        ({"name": "ladabert", "reduction": 2.0, "embedding": 3.0, "svd": 1.5, "begin": 0.2, "end": 0.3}, 30),
        ({"name": "heads", "heads": 0.5, "end": 1.0}, 99),
        ({"name": "low_rank", "keep": 0.5}, 0),
    ],
)
def test_when_a_compression_is_in_the_final_form(compression: dict[str, Any], final: int) -> None:
    model = toy.compress(toy.new_model(), **compression)
    assert final_steps(compressed_modules(model)) == [*range(final, 100)]


def test_a_student_of_theseus_is_final_once_all_layers_train_together() -> None:
    probability = partial(replacement_probability, start=0.2, end=0.7, curriculum="linear")
    assert final_steps([TheseusBlock([nn.Identity()], nn.Identity(), probability, 1)]) == [*range(70, 100)]


def final_steps(modules: Sequence[CompressedModule]) -> list[int]:
    return [step for step in range(100) if all(module.is_final(StepState(step, 100, 0)) for module in modules)]


def scripted_worker(out: Path, paths: Sequence[Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        script(patch, EARLY)
        training_worker.train_all(out, paths)


@pytest.mark.processes
def test_two_processes_choose_as_one(world: World, tmp_path: Path) -> None:
    """Under ZeRO 1 the weights are those of one process, to the bit; under ZeRO 3 each loads a share of the best."""
    paths = []
    for stage in (1, 3):
        tables = lad(world, tmp_path / "two", BEST | {"run.patience": 2, "run.name": f"zero{stage}"}).model_dump(
            exclude_none=True
        )
        paths.append(tmp_path / f"zero{stage}.toml")
        paths[-1].write_text(tomli_w.dumps(tables | {"deepspeed": {"zero_optimization": zero(stage)}}))
    run_ranks(scripted_worker, tmp_path / "rows", paths, folder=tmp_path / "ranks", processes=2)
    with pytest.MonkeyPatch.context() as patch:
        script(patch, EARLY)
        one = train(lad(world, tmp_path / "one", BEST | {"run.patience": 2, "deepspeed.zero_optimization.stage": 1}))
    for stage in (1, 3):
        results = json.loads((tmp_path / "two" / f"zero{stage}" / "results.json").read_text())
        assert (results["selection"], results["exported_step"]) == (one.results["selection"], 2)
        assert results["metrics"]["loss"] == pytest.approx(one.results["metrics"]["loss"], rel=1e-4)
    assert digest(tmp_path / "two" / "zero1" / "export") == digest(one.export_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.eval_every": 0}, "best_metric chooses among evaluations; set eval_every above 0"),
        ({"run.best_metric": None, "run.patience": 1}, "patience waits for a better best_metric; set best_metric"),
        (
            {"run.best_metric": "acuracy"},
            'run.best_metric: train has no "acuracy", it has accuracy, f1_macro, matthews',
        ),
        ({"run.best_metric": "parameters"}, 'run.best_metric: train has no "parameters"'),
        (
            {"run.best_metric": "label_loyalty", "teacher": None, "objective": {"name": "supervised"}},
            'has no "label_loyalty", it has accuracy, f1_macro, matthews, loss',
        ),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_what_cannot_be_chosen_by_is_refused(
    changes: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        resolve_run(lad(world, tmp_path, BEST | changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pre_training_exports_the_smallest_held_out_loss(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    changes = {"run.steps": 6, "run.eval_every": 1, "run.best_metric": "loss", "run.patience": 2}
    changes |= {"optim.lr": 0.3, "optim.warmup": 0.0}  # much too high
    config = toy.parsed(tables, changes)
    result = train(config)
    losses = {row["step"]: row["dev/loss"] for row in metrics_file(result.folder) if "dev/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert (result.results["exported_step"], max(losses)) == (best, result.results["steps"])
    assert best < max(losses)
    assert result.results["metrics"]["loss"] == losses[best]
    assert result.results["selection"].startswith(f"best held-out loss at step {best} of 6")
    assert run_training(config) == 0  # it is complete: only the closing table is printed
    assert f"exported: {result.results['selection']}\n" in capsys.readouterr().out


@pytest.mark.usefixtures("no_weights")
def test_a_pre_training_is_chosen_by_the_held_out_loss(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    changes = {"run.eval_every": 2, "run.best_metric": "loss"}
    resolve_run(toy.parsed(tables, changes))
    with pytest.raises(UserError, match='toy has no "mlm", it has loss; choose from loss'):
        resolve_run(toy.parsed(tables, changes | {"run.best_metric": "mlm"}))
    read = Stream.__init__

    def without_held_out(stream: Stream, folder: Path, source: dict[str, Any], split: str, dtype: Any) -> None:
        read(stream, folder, source, split, dtype)
        stream.length *= split == "train"

    monkeypatch.setattr(Stream, "__init__", without_held_out)
    with pytest.raises(UserError, match=r"run\.best_metric: .*corpus has no held-out text; prepare the corpus with"):
        resolve_run(toy.parsed(tables, changes))
