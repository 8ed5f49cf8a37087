"""Every file in configs/ is read by its schema, and every training config takes a step once its places exist."""

import math
from pathlib import Path
from typing import Any

import pytest
import toy
from config_schemas import schema_of
from conftest import World
from launching import ROOT
from toy_heads import LABELS, MAKE_FILES

from lad_dist.cli.main import COMMANDS
from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.config.load import apply_overrides, parse_config, parse_override, read_toml
from lad_dist.config.schema import PretrainConfig, TaskConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.search.space import parse_space
from lad_dist.search.trials import TrialBuilder, grid_trials
from lad_dist.training import run_spec
from lad_dist.training.train import train

FILES = sorted((ROOT / "configs").rglob("*.toml"))


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT / "configs")) for file in files]


TRAINING = [file for file in FILES if "run" in read_toml(file)]
SEARCHES = [file for file in FILES if "search" in read_toml(file)]


def test_every_kind_of_config_is_shipped() -> None:
    assert {schema_of(read_toml(file)) for file in FILES} == {
        PretrainConfig, TaskConfig, TokenizerConfig, PrepareConfig, SearchConfig, EvaluateConfig
    }  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_a_schema_reads_the_file(file: Path) -> None:
    parse_config(schema_of(read_toml(file)), read_toml(file), str(file))


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_the_first_line_is_the_command_that_runs_the_file(file: Path) -> None:
    program, *arguments = file.read_text().splitlines()[0].removeprefix("# ").partition("   (")[0].split()
    script, path, *overrides = arguments
    assert (program, script in COMMANDS) == ("lad-dist", True) or (ROOT / script).is_file()
    assert ROOT / path == file
    assert all("=" in word for word in overrides)


AUTHORS_SETTINGS = {  # as the headers say
    "task/lad_paper": "objective.hidden=1000 objective.soft=0.5 objective.hard=0.5 objective.temperature=10 "
    "optim.lr=7e-4 optim.objective_lr=3e-5 run.epochs=10 data.pad_to=128 deepspeed.bf16.enabled=false",
    "task/theseus": "optim.lr=2e-5 optim.warmup=0 optim.weight_decay=0",
    "task/tinybert": "run.epochs=20 optim.lr=5e-5 optim.warmup=0 optim.schedule=constant",
    "task/tinybert_prediction": "run.epochs=3 optim.lr=3e-5 objective.temperature=1 objective.hard=0",
    "task/pkd": "run.epochs=4 optim.lr=1e-5 objective.temperature=10 objective.hidden=500 student.layers=first",
    "task/emd": "run.epochs=10 optim.lr=2e-5 objective.hidden=0.01 objective.attention=0.01",
    "task/alp": "objective.hidden=0.2 objective.soft=0.7 objective.hard=0.1 objective.temperature=20",
    "task/mgskd": "objective.token=1 objective.span=1 objective.sample=4 objective.heads=64 objective.lower=2 "
    "objective.vertices=20 objective.neighbours=20",
    "pretrain/distilbert": "objective.soft=5 objective.hard=2 objective.cosine=1 objective.temperature=2 "
    "objective.soft_tokens=all",
    "pretrain/minilm2": "objective.heads=48",
}


@pytest.mark.parametrize("name", AUTHORS_SETTINGS)
def test_a_config_has_the_settings_of_the_authors(name: str) -> None:
    tables = read_toml(ROOT / "configs" / f"{name}.toml")
    assert apply_overrides(tables, map(parse_override, AUTHORS_SETTINGS[name].split())) == tables


def toy_places(tables: dict[str, Any], world: World, work: Path) -> dict[str, Any]:
    """What a toy machine has to change in a training config: places and sizes."""
    pretraining = "shards" in tables["data"]
    changes: dict[str, Any] = {"run.dir": str(work), "run.steps": 2, "run.epochs": None, "run.eval_every": 0}
    changes |= {"data.micro_batches_per_step": 2, "data.num_workers": 0}
    if "teacher" in tables:
        changes["teacher.path"] = str(world.pretrained if pretraining else world.teacher)
        changes["teacher.baseline_check"] = pretraining  # it has learnt nothing
    if "path" in tables["student"]:
        changes["student.path"] = str(world.pretrained)
    else:
        changes["student.architecture"] = {**tables["student"]["architecture"], **toy.SIZES}
    if any(named["name"] == "theseus" for named in tables.get("compression", ())):
        changes["student.path"] = str(world.teacher)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    changes |= {f"student.{key}": size for key, size in sizes.items() if tables["student"].get(key)}
    if isinstance(tables["student"].get("layers"), list):
        changes["student.layers"] = [1, 3]
    if pretraining:
        changes |= {"data.shards": str(world.corpus), "data.micro_batch_tokens": 128}
    else:
        kind = tables["data"].get("kind", "classification")
        files = MAKE_FILES[kind](work / "data") if kind in MAKE_FILES else world.files
        changes |= {"data.task": None, "data.path": None, "data.doc_stride": None}
        changes |= {f"data.{name}": path for name, path in files.items()}
        changes["data.micro_batch_size"] = 2
        if "teacher" in tables and kind in MAKE_FILES:
            changes["teacher.path"] = str(toy.model(work / "fine-tuned", world.tokenizer, kind, LABELS[kind]))
    if "pad_to" in tables["data"]:
        changes["data.pad_to"] = 32
    if tables["objective"].get("heads"):
        changes["objective.heads"] = 8
    return changes | _toy_budgets(tables) | {"data.max_length": 32}


def _toy_budgets(tables: dict[str, Any]) -> dict[str, Any]:
    """Lower the reductions: more of a toy model cannot be compressed."""
    listed = enumerate(tables.get("compression", []))
    return {f"compression.{number}.reduction": 3.0 for number, options in listed if "reduction" in options}


@pytest.mark.parametrize("file", TRAINING, ids=ids(TRAINING))
def test_a_training_config_takes_two_steps(file: Path, world: World, tmp_path: Path) -> None:
    tables = read_toml(file)
    rows: list[dict[str, Any]] = []
    result = train(toy.parsed(tables, toy_places(tables, world, tmp_path)), rows.append)
    assert result.results is not None
    assert result.results["steps"] == 2
    assert [row["step"] for row in rows if "loss" in row] == [2]


@pytest.mark.parametrize("file", SEARCHES, ids=ids(SEARCHES))
def test_a_search_draws_trials_that_the_base_config_can_run(
    file: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no clone
    config = parse_config(SearchConfig, read_toml(file), str(file))
    if config.grid:
        trials = grid_trials(config)
        assert len(trials) == math.prod(map(len, config.grid.values()))
        assert trials[0].sample.keys() == config.grid.keys()
        trials = list(
            {str(trial.sample.get("method", trial.sample.get("variant"))): trial for trial in trials}.values()
        )
    else:
        space = parse_space(config.space, config.stages)
        builder = TrialBuilder(config)
        trials = [builder.build("trial", corner.choices, corner.changes.items()) for corner in space.corners()]
    for trial in trials:
        tables = trial.config.model_dump(exclude_none=True)
        assert config.grid or tables["run"]["eval_every"] > 0
        spec = run_spec.resolve_run(toy.parsed(tables, toy_places(tables, world, tmp_path)))
        assert spec.task is not None
