"""The scripts: help, usage, and real launches by both launchers."""

import json
from pathlib import Path

import complete_runs
import pytest
import tomli_w
import toy
from conftest import World
from launching import ROOT, launch, run_script

from lad_dist.compression.registry import COMPRESSIONS
from lad_dist.config.corpus_schema import PrepareConfig, TokenizerConfig
from lad_dist.config.describe import describe_keys
from lad_dist.config.load import keyword_parameters
from lad_dist.config.schema import ConfigTable, EvaluateConfig, PretrainConfig, SearchConfig, TaskConfig, TrainConfig
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import vocabulary_size
from lad_dist.objectives.registry import OBJECTIVES

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.py"))
SCHEMAS: dict[str, type[ConfigTable]] = {
    "train_tokenizer.py": TokenizerConfig,
    "prepare_corpus.py": PrepareConfig,
    "pretrain_distill.py": PretrainConfig,
    "finetune_teacher.py": TaskConfig,
    "task_distill.py": TaskConfig,
    "evaluate.py": EvaluateConfig,
    "tune.py": SearchConfig,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_usage(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(script, "--help") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    usage = captured.out.partition("usage:")[2].partition("example:")[0]
    assert f"python launch/{script} " in usage
    assert f"example: python launch/{script}" in captured.out or f"example: deepspeed launch/{script}" in captured.out


@pytest.mark.parametrize("script", SCHEMAS)
def test_help_names_every_key(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(script, "-h") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for key, *_ in describe_keys(SCHEMAS[script]):
        assert any(line.startswith(f"{key} (") for line in lines), key
    if issubclass(SCHEMAS[script], TrainConfig):
        for kind, choices in (("objective", OBJECTIVES), ("compression", COMPRESSIONS)):
            for name, function in choices.items():
                assert f'With {kind}.name = "{name}":' in lines
                keys = [f"{kind}.{key} (" for key in keyword_parameters(function)]
                assert all(any(line.startswith(key) for line in lines) for key in keys)


@pytest.mark.parametrize("script", SCHEMAS)
def test_without_arguments_the_usage_is_printed(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(script) == 2
    assert "usage: python launch/" in capsys.readouterr().out


def test_a_tokenizer_is_trained_once(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"kind": "text", "path": str(world.books)}
    tables = {"out": str(tmp_path / "words"), "kind": "unigram", "vocab_size": 100, "lowercase": True}
    (tmp_path / "tokenizer.toml").write_text(tomli_w.dumps(tables | {"source": [source]}))
    printed = []
    for _ in range(2):
        assert run_script("train_tokenizer.py", str(tmp_path / "tokenizer.toml")) == 0
        printed.append(capsys.readouterr())
    size = vocabulary_size(load_tokenizer(tmp_path / "words"))
    assert printed[0].out == printed[1].out == f"{tmp_path / 'words'}: {size} tokens\n"
    assert "words: trained on" in printed[0].err
    assert printed[1].err == f"{tmp_path / 'words'}: already trained by this request; nothing to do\n"


def test_a_report_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete_runs.run(tmp_path / "kd", "kd", "rte", 0, 0.5)
    complete_runs.run(tmp_path / "lad", "lad", "rte", 0, 0.6)
    assert run_script("report.py", str(tmp_path), "--baseline", "lad", "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "## Against lad" in printed
    assert printed == (tmp_path / "out" / "report.md").read_text()
    assert run_script("report.py") == 2
    assert capsys.readouterr().err == "error: report: the following arguments are required: FOLDER; see --help\n"


@pytest.mark.processes
@pytest.mark.parametrize("by", ["deepspeed", "torchrun"])
def test_a_launcher_starts_a_run_of_two_processes(by: str, world: World, tmp_path: Path) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tables))
    done = launch([ROOT / "launch" / "pretrain_distill.py", file, "run.steps=2"], by=by, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "toy" / "results.json").read_text())
    assert results["processes"] == 2
    assert results["steps"] == 2
    everything = done.stdout + done.stderr
    for line in ("toy step 1/2", f"model in {tmp_path / 'toy' / 'export'}"):
        assert everything.count(line) == 1, everything
    rows = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert (tmp_path / "toy" / "export" / "model.safetensors").is_file()


LATE = """
import os, runpy, sys, time
time.sleep(3 * (os.environ["RANK"] == "0"))
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    sys.stderr.flush()
    os._exit(ended.code)  # at once
"""


@pytest.mark.processes
def test_a_mistake_is_printed_once_by_two_processes(tmp_path: Path) -> None:
    """Also where the process that prints it is late: the launcher ends it once the other has left."""
    (tmp_path / "late.py").write_text(LATE)
    arguments = ["configs/pretrain/kd.toml", "data.shards=/nowhere", f"run.dir={tmp_path / 'runs'}"]
    command = [tmp_path / "late.py", ROOT / "launch" / "pretrain_distill.py", *arguments]
    done = launch(command, by="torchrun", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: /nowhere: holds no token shards") == 1
    assert "Traceback" not in done.stderr.split("error: /nowhere")[0]
    assert not (tmp_path / "runs").exists()
