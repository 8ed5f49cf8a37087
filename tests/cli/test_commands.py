"""The commands: help, usage, shipped configs, and real launches by both launchers."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import complete_runs
import pytest
import tomli_w
import toy
from conftest import World
from launching import BIN, ROOT, curves, environment, launch, run_command

from lad_dist.cli.command import ConfigCommand
from lad_dist.cli.main import COMMANDS
from lad_dist.compression.registry import COMPRESSIONS
from lad_dist.config.describe import describe_keys
from lad_dist.config.errors import UserError
from lad_dist.config.load import keyword_parameters, load_config, read_toml
from lad_dist.config.schema import TaskConfig, TrainConfig
from lad_dist.config.shipped import config_file, shipped_configs
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import vocabulary_size
from lad_dist.objectives.registry import OBJECTIVES

SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
CONFIG_COMMANDS = [name for name, command in COMMANDS.items() if isinstance(command, ConfigCommand)]
SCREEN = 40  # lines


def test_the_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--help") == 0
    listed = re.findall(r"^  ([\w-]+) {2,}\w", capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    assert run_command() == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_shows_the_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(name, "--help") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"usage: lad-dist {name}" in captured.out
    assert len(captured.out.splitlines()) <= SCREEN


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_a_narrow_terminal(
    name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_command(*([name] if name else []), "--help")
    blocks = capsys.readouterr().out.split("\n\n")
    lines = [line for block in blocks if not block.startswith(("usage:", "example:")) for line in block.splitlines()]
    assert max(map(len, lines)) <= 80
    trains = isinstance(command := COMMANDS.get(name or ""), ConfigCommand) and issubclass(command.schema, TrainConfig)
    assert ("arguments of each method" in "".join(blocks)) == trains


@pytest.mark.parametrize("name", CONFIG_COMMANDS)
def test_common_keys_are_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    assert isinstance(command, ConfigCommand)
    keys = [key for key, *_ in describe_keys(command.schema)]
    assert [key for key in command.common_keys if key not in keys] == []
    run_command(name, "--help")
    shown = capsys.readouterr().out
    assert all(f"  {key} (" in shown for key in command.common_keys)


@pytest.mark.parametrize("name", CONFIG_COMMANDS)
def test_help_all_names_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(name, "--help", "all") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    command = COMMANDS[name]
    assert isinstance(command, ConfigCommand)
    for key, *_ in describe_keys(command.schema):
        assert any(line.startswith(f"{key} (") for line in lines), key
    if issubclass(command.schema, TrainConfig):
        for kind, choices in (("objective", OBJECTIVES), ("compression", COMPRESSIONS)):
            for method, function in choices.items():
                assert f'with {kind}.name = "{method}":' in lines
                keys = [f"{kind}.{key} (" for key in keyword_parameters(function)]
                assert all(any(line.startswith(key) for line in lines) for key in keys)


@pytest.mark.parametrize("name", CONFIG_COMMANDS)
def test_without_a_config_the_usage_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(name) == 2
    assert f"usage: lad-dist {name}" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_starts_the_command(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    name = next(name for name in COMMANDS if f"usage: lad-dist {name} " in shown)
    assert f"`lad-dist {name}`" in script.read_text().splitlines()[0]


@pytest.mark.parametrize(
    "arguments",
    [["distill", "--help"], ["distill", "configs:task/lad.toml", "data.tsk=rte"], ["configs"], ["distil"], ["env"]],
    ids=["help", "misspelt key", "configs", "misspelt command", "env"],
)
def test_what_needs_no_model_answers_before_libraries_are_imported(arguments: list[str]) -> None:
    absent = {
        "transformers",
        "deepspeed",
        "sklearn",
        "pandas",
        "matplotlib",
        *(["torch"] if arguments != ["env"] else []),
    }
    script = (
        "import sys\nfrom lad_dist.cli.main import main\ntry:\n    main()\nfinally:\n"
        f"    assert not {absent} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment(), text=True, capture_output=True)
    assert "Traceback" not in done.stderr
    assert done.stdout or done.stderr.startswith("error: ")


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("distil", "x.toml") == 2
    assert capsys.readouterr().err == 'error: command "distil" is unknown: did you mean "distill"?\n'


def test_a_forgotten_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("distill", "data.task=rte") == 2
    assert capsys.readouterr().err == (
        "error: data.task=rte: the first argument is a config; `lad-dist configs` lists those that are shipped\n"
    )


def test_shipped_configs_are_those_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((ROOT / "configs").rglob("*.toml"))
    assert list(shipped_configs()) == [f"configs:{file.relative_to(ROOT / 'configs')}" for file in files]
    assert read_toml("configs:task/lad.toml") == read_toml(ROOT / "configs" / "task" / "lad.toml")
    assert run_command("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)
    assert run_command("configs", "configs:task/lad.toml") == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "task" / "lad.toml").read_text()


def test_an_unknown_shipped_config_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r'no such config is shipped; did you mean "configs:task/lad.toml"'):
        config_file("configs:task/lda.toml")


def test_a_key_is_unset_by_none() -> None:
    files = ["data.train=train.csv", "data.dev=dev.csv"]
    config = load_config(TaskConfig, "configs:task/lad.toml", ["data.task=none", *files])
    assert (config.data.task, config.data.train) == (None, "train.csv")
    named = load_config(TaskConfig, "configs:task/lad.toml", ['run.label="none"'])
    assert named.run.label == "none"


def test_a_key_that_is_not_set_cannot_be_unset() -> None:
    with pytest.raises(
        UserError, match=r'data\.tsk=none: configs:task/lad\.toml does not set this key; did you mean "task"'
    ):
        load_config(TaskConfig, "configs:task/lad.toml", ["data.tsk=none"])


def test_the_environment_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("env") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "torch", "deepspeed", "ray", "CPU", "GPU", "variables"} <= set(rows)


def test_a_wheel_holds_the_configs(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes into the source tree
    for folder in ("lad_dist", "configs"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    command = [str(BIN / "pip"), "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("lad_dist-*.whl"))) as wheel:
        names = set(wheel.namelist())
    configs = {name.replace("configs:", "lad_dist/configs/") for name in shipped_configs()}
    assert configs | {"lad_dist/py.typed", "lad_dist/cli/__main__.py"} <= names


def test_a_tokenizer_is_trained_once(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"kind": "text", "path": str(world.books)}
    tables = {"out": str(tmp_path / "words"), "kind": "unigram", "vocab_size": 100, "lowercase": True}
    (tmp_path / "tokenizer.toml").write_text(tomli_w.dumps(tables | {"source": [source]}))
    printed = []
    for _ in range(2):
        assert run_command("train-tokenizer", str(tmp_path / "tokenizer.toml")) == 0
        printed.append(capsys.readouterr())
    size = vocabulary_size(load_tokenizer(tmp_path / "words"))
    assert printed[0].out == printed[1].out == f"{tmp_path / 'words'}: {size} tokens\n"
    assert "words: trained on" in printed[0].err
    assert printed[1].err == f"{tmp_path / 'words'}: already trained by this request; nothing to do\n"


def test_a_report_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete_runs.run(tmp_path / "kd", "kd", "rte", 0, 0.5)
    complete_runs.run(tmp_path / "lad", "lad", "rte", 0, 0.6)
    assert run_command("report", str(tmp_path), "--baseline", "lad", "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "## Against lad" in printed
    assert printed == (tmp_path / "out" / "report.md").read_text()
    assert run_command("report") == 2
    assert (
        capsys.readouterr().err
        == "error: report: the following arguments are required: FOLDER; see lad-dist report --help\n"
    )


@pytest.fixture(scope="module")
def forked_losses(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of the run that the launchers start, in two ranks as other tests start them."""
    folder = tmp_path_factory.mktemp("forked")
    tables = toy.corpus_config(folder, world.corpus, world.pretrained, world.pretrained)
    tables["run"]["steps"] = 2
    return [row["loss"] for row in curves(folder, {"toy": tables}, processes=2)["toy"] if "loss" in row]


@pytest.mark.processes
@pytest.mark.parametrize("by", ["deepspeed", "torchrun"])
def test_a_launcher_starts_a_run_of_two_processes(
    by: str, forked_losses: list[float], world: World, tmp_path: Path
) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    tables["data"]["num_workers"] = 1
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tables))
    module = ["--module", "lad_dist.cli", "pretrain"]  # what a user without a clone starts
    program = module if by == "deepspeed" else [ROOT / "launch" / "pretrain_distill.py"]
    done = launch([*program, file, "run.steps=2"], by=by, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "toy" / "results.json").read_text())
    assert results["processes"] == 2
    assert results["steps"] == 2
    words = shlex.split(results["command"])  # as typed, and without what the launcher adds
    assert (words[0], words[-2:]) == (by, [str(file), "run.steps=2"])
    assert {"--num_gpus", "--nproc-per-node"} & set(words)
    everything = done.stdout + done.stderr
    for line in ("toy step 1/2", f"model in {tmp_path / 'toy' / 'export'}"):
        assert everything.count(line) == 1, everything
    assert "FutureWarning" not in everything  # of what DeepSpeed calls
    rows = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(forked_losses, rel=1e-6)
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
    """Also where the process that prints it is late: the launcher ends it once the other has left.

    A misspelt key takes no library to find; what is found later is in tests/robustness/test_malformed_inputs.py.
    """
    (tmp_path / "late.py").write_text(LATE)
    arguments = ["configs/pretrain/kd.toml", "data.shads=/nowhere", f"run.dir={tmp_path / 'runs'}"]
    command = [tmp_path / "late.py", ROOT / "launch" / "pretrain_distill.py", *arguments]
    done = launch(command, by="torchrun", processes=2)
    assert done.returncode != 0
    assert done.stderr.count('data.shads: no such key; did you mean "shards"?') == 1
    assert "Traceback" not in done.stderr.split("error: ")[0]
    assert not (tmp_path / "runs").exists()
