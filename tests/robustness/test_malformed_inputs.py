"""Malformed configs, sources, searches, reports and environments; run folders that are damaged or in the way."""

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from launching import ROOT, run_script, start_ranks
from malformed_inputs import Case, assert_one_line, complaint, jsonl, tables

from lad_dist.config.load import read_toml

COMMANDS = ("pretrain", "distill", "finetune", "evaluate", "prepare", "train-tokenizer")


def toml(name: str, content: bytes | str, expected: str, command: str = "distill") -> Case:
    return Case(name, command, expected, config=content.encode() if isinstance(content, str) else content)


def changed(name: str, expected: str, command: str = "distill", **changes: Any) -> Case:
    return Case(name, command, expected, changes={key.replace("__", "."): value for key, value in changes.items()})


def source(name: str, kind: str, file: str, content: bytes | str, expected: str, command: str = "prepare") -> Case:
    return Case(name, command, expected, {file: content}, {"source": [{"kind": kind, "path": "{here}/" + file}]})


def variable(name: str, expected: str, **variables: str) -> Case:
    return Case(name, "distill", expected, variables=variables)


def result(name: str, content: bytes | str, expected: str) -> Case:
    return Case(name, "report", expected, {"runs/a/results.json": content}, words=("{here}/runs",))


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
RUN = {
    "config": {
        "run": {"name": "a", "steps": 1}, "student": {"path": "b"}, "data": {"task": "rte"},
        "objective": {"name": "kd"}, "optim": {"lr": 1.0},
    },
    "metrics": {"accuracy": 0.5}, "student": {"parameters": 1, "forward_flops_per_token": 1.0}, "teacher": {},
    "steps": 1, "seconds": 1.0, "tokens_per_second": 1.0, "processes": 1, "device": "cpu",
}  # fmt: skip
ZERO = "deepspeed.zero_optimization"
CHUNKS = {".out.chunks/identity": "{", ".out.chunks/lock": "", ".out.chunks/0.json": ""}
CONFIGS = [
    *[toml(f"empty-{command}", "", "missing, and it has no default", command) for command in COMMANDS],
    toml("empty-tune", "", "search: missing", "tune"),
    toml("empty-benchmark", "", "missing, and it has no default", "benchmark"),
    toml("not-toml", "run = \n", "config.toml: not valid TOML: Invalid value (at line 1, column 7)"),
    toml("twice", "[run]\nname = 'a'\nname = 'b'\n", "Cannot overwrite a value (at line 3"),
    toml("table-twice", "[run]\n[data]\n[run]\n", "Cannot declare ('run',) twice (at line 3"),
    toml("json", '{"run": {}}', "config.toml: not valid TOML"),
    toml("yaml", "run:\n  name: a\n", "config.toml: not valid TOML"),
    toml("open-string", 'run.name = "a\n', "not valid TOML: Illegal character '\\n' (at line 1"),
    toml("binary", bytes(range(256)), "config.toml: not UTF-8 (at byte 128)"),
    toml("nul", b"a = 1\0", "config.toml: not valid TOML"),
    toml("utf16", "run.name = 'a'".encode("utf-16"), "config.toml: not UTF-8"),
    toml("latin1", "run.name = 'ä'".encode("latin-1"), "config.toml: not UTF-8 (at byte 12)"),
    toml("deep-list", f"a = {'[' * 3000}{']' * 3000}", "config.toml: not valid TOML"),
    toml("deep-table", f"[{'.'.join(['a'] * 2000)}]\n", "more than 16 tables deep"),
    toml("digits", f"a = {'7' * 5000}", "config.toml: not valid TOML"),
    toml("no-tables", "run = 1\nstudent = 2\ndata = 3\nobjective = 4\noptim = 5\n", "run: "),
    toml("list-for-table", "[[run]]\nname = 'a'\n", "run: "),
    toml("benchmark-data", "data = 1\n", "missing, and it has no default", "benchmark"),
    changed("number-for-text", "run.name: input should be a valid string, not 7", run__name=7),
    changed("text-for-number", "run.steps: input should be a valid integer, not 'ten'", run__steps="ten"),
    changed("float-for-number", "run.steps: input should be a valid integer, not 8.0", run__steps=8.0),
    changed("bool-for-number", "run.steps: input should be a valid integer, not True", run__steps=True),
    changed("nan", "optim.lr: input should be a finite number, not nan", optim__lr=float("nan")),
    changed("infinite", "optim.lr: input should be a finite number, not inf", optim__lr=float("inf")),
    changed("nan-objective", "objective: temperature: input should be a finite", objective__temperature=float("nan")),
    changed("negative", "optim.lr: input should be greater than 0, not -0.1", optim__lr=-0.1),
    changed("empty-name", "run.name: string should have at least 1 character", run__name=""),
    changed("nul-name", "run.name: 'a\\x00b' holds a character that no text can", run__name="a\0b"),
    changed("nul-path", "teacher.path: ", teacher__path="a\0b"),
    changed("long", "run.steps: input should be a valid integer, not 'aaaa", run__steps="a" * 10_000),
    changed("many", "student.layers", student__layers=["x"] * 1000),
    changed("null-list", "compression.0: ", compression=[1]),
    changed("list-of-lists", "compression: ", compression=7),
    changed("bool-stage", "zero_optimization.stage: must be 0, 1, 2 or 3", deepspeed__zero_optimization__stage=True),
    changed("deep-deepspeed", 'devic: no such key; did you mean "device"', **{f"{ZERO}.offload_param.devic": "cpu"}),
    changed("long-path", "teacher.cache = ", teacher__cache="/tmp/" + "a" * 300),
    Case("no-config", "report", "unrecognized arguments", words=("a", "--oout", "b")),
    Case("override-open", "distill", "not a TOML value", words=("student.layers=[1,",)),
    Case("override-nameless", "distill", "an override is written key.subkey=value", words=("=1",)),
    Case("override-inside", "distill", "run.name.x: name is not a table", words=("run.name.x=1",)),
    Case("override-deep", "distill", "tables deep", words=("a." * 500 + "a=1",)),
    Case("override-bytes", "distill", "run.name: 'a\\udcff' holds a character", words=("run.name=a\udcff",)),
]  # fmt: skip
DAMAGED = [
    Case("run-config-cut", "distill", "config.toml: damaged", {"runs/toy/config.toml": "[run"}),
    Case("run-config-binary", "distill", "config.toml: damaged", {"runs/toy/config.toml": b"\xff"}),
    Case("results-cut", "distill", "results.json: damaged", {"runs/toy/results.json": '{"a'}),
    Case("results-list", "distill", "results.json: damaged", {"runs/toy/results.json": "[]"}),
]
CASES = [
    source("text-latin1", "text", "a.txt", "ban\nbärt\n".encode("latin-1"), "a.txt:2: not UTF-8 (byte 0xe4)"),
    source("text-empty", "text", "a.txt", "", "a.txt: empty"),
    source("text-utf16", "text", "a.txt", "ban bart".encode("utf-16"), "a.txt:1: not UTF-8"),
    source("gzip-cut", "text", "a.txt.gz", gzip.compress(b"ban bart\n" * 1000)[:-12], "a.txt.gz: damaged, the rest"),
    source("gzip-none", "text", "a.txt.gz", b"ban bart\n", "a.txt.gz: damaged"),
    source("bzip-cut", "jsonl", "a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 99)[:-9], "a.jsonl.bz2: damaged"),
    source("zstd-none", "text", "a.txt.zst", b"ban bart\n", "a.txt.zst: damaged"),
    source("rows-cut", "jsonl", "a.jsonl", jsonl({"text": "ban"})[:-4], "a.jsonl:1: not valid JSON"),
    source("rows-null", "jsonl", "a.jsonl", jsonl({"text": None}), "a.jsonl:1: text is null, not text"),
    source("rows-twice", "jsonl", "a.jsonl", '{"text": "a", "text": "b"}\n', 'not valid JSON ("text" stands'),
    source("rows-deep", "jsonl", "a.jsonl", "[" * 100_000, "a.jsonl:1: not valid JSON"),
    source("articles", "wikiextractor", "wiki_00", "ban bart\n", "wiki_00:1: text outside <doc"),
    source("article-open", "wikiextractor", "wiki_00", "<doc id=1>\nban\n", "wiki_00:1: this <doc …> is not closed"),
    source("table-none", "parquet", "a.parquet", "ban", "a.parquet: damaged"),
    source("learn-latin1", "text", "a.txt", b"b\xe4rt\n", "a.txt:1: not UTF-8", "train-tokenizer"),
    source("learn-blank", "text", "a.txt", "\n\n", "no text in it to learn from", "train-tokenizer"),
    changed("vocabulary", "vocab_size = 3 is too small", "train-tokenizer", vocab_size=3),
    changed("learn-place", "/proc/out: cannot be written", "train-tokenizer", out="/proc/out"),
    changed("prepare-place", "/proc", "prepare", out="/proc/out"),
    Case("learn-occupied", "train-tokenizer", "exists and holds no tokenizer trained here", {"out/a": ""}),
    Case("learn-damaged", "train-tokenizer", "request.json: damaged", {"out/request.json": '{"a": '}),
    Case("learn-list", "train-tokenizer", "request.json: damaged", {"out/request.json": "[1]"}),
    Case("prepare-file", "prepare", "exists and holds no token shards", {"out": ""}),
    Case("prepare-manifest", "prepare", "manifest.json: damaged", {"out/manifest.json": "{"}),
    Case("prepare-chunks", "prepare", "identity: damaged", CHUNKS),
    Case("tune-base", "tune", "nowhere.toml: cannot read the config", changes={"stage.0.base": "/nowhere.toml"}),
    Case("tune-base-damaged", "tune", "b.toml: not valid TOML", {"b.toml": "["}, {"stage.0.base": "{here}/b.toml"}),
    changed("tune-law", "distribution", "tune", space={"task.optim.lr": {"normal": [0, 1]}}),
    changed("tune-range", "give [low, high] with low < high", "tune", space={"task.optim.lr": {"uniform": [2.0, 1.0]}}),
    changed("tune-nan", "with low < high", "tune", space={"task.optim.lr": {"uniform": [float("nan"), 1.0]}}),
    changed("tune-scalar", "space.task.optim.lr", "tune", space={"task.optim.lr": 1.0}),
    changed("tune-no-evaluations", "trials are compared at their evaluations", "tune", override={}),
    changed("tune-metric", 'search.metric: train has no "bleu"', "tune", **{"search.metric": "bleu"}),
    changed("tune-both", "give [grid] to compare", "tune", grid={"a": {"b": {"task.baes": "x"}}}),
    Case("tune-other", "tune", "search.toml: not valid TOML", {"runs/search/search.toml": "["}),
    Case("report-none", "report", "no complete run on a task below", {"runs/a": ""}, words=("{here}/runs",)),
    Case("report-file", "report", "runs: no such folder", {"runs": ""}, words=("{here}/runs",)),
    Case("report-words", "report", "the following arguments are required", words=()),
    result("results-empty", "", "results.json: damaged"),
    result("results-cut", json.dumps(RUN)[:-9], "results.json: damaged"),
    result("results-binary", b"\xff\x00", "results.json: damaged"),
    result("results-list", "[]", "results.json: damaged (not a JSON object)"),
    result("results-deep", "[" * 100_000, "results.json: damaged"),
    result("results-text", json.dumps({**RUN, "steps": "ten"}), "results.json: damaged (steps"),
    result("results-nan", json.dumps({**RUN, "metrics": {"accuracy": float("nan")}}), "the main metric is no number"),
    Case("quickstart-stage", "quickstart", 'stage "ladd" is unknown: did you mean "lad"?', words=("ladd.a=1",)),
    Case("quickstart-key", "quickstart", 'did you mean "hidden"?', words=("lad.objective.hiden=1",)),
    Case("quickstart-value", "quickstart", "run.steps: input should be", words=("alone.run.steps=ten",)),
    Case("quickstart-text", "quickstart", 'text: mots: no such key; did you mean "most"?', words=("text.mots=1",)),
    variable("rank-alone", "RANK is set and WORLD_SIZE is not", RANK="0"),
    variable("world-alone", "WORLD_SIZE is set and RANK is not", WORLD_SIZE="2"),
    variable("world-word", "WORLD_SIZE = 'two' is not a whole number", **{**LAUNCHED, "WORLD_SIZE": "two"}),
    variable("rank-word", "RANK = 'first' is not a whole number", **{**LAUNCHED, "RANK": "first"}),
    variable("rank-negative", "RANK = '-1' is not a whole number", **{**LAUNCHED, "RANK": "-1"}),
    variable("three", "cannot be shared out over 3 processes; 3 can", **{**LAUNCHED, "WORLD_SIZE": "3"}),
    variable("world-zero", "numbered from 0", **{**LAUNCHED, "WORLD_SIZE": "0"}),
    variable("local-rank", "LOCAL_RANK = 'x' is not a whole number", **{**LAUNCHED, "LOCAL_RANK": "x"}),
    variable("no-port", "MASTER_PORT is not set, and 2 processes need it", **{**LAUNCHED, "MASTER_PORT": ""}),
    variable("no-address", "MASTER_ADDR is not set, and 2 processes need it", **{**LAUNCHED, "MASTER_ADDR": ""}),
    variable("port-word", "MASTER_PORT = 'http' is not a whole number", **{**LAUNCHED, "MASTER_PORT": "http"}),
    variable("port-large", "MASTER_PORT = 99999 is not a port", **{**LAUNCHED, "MASTER_PORT": "99999"}),
    variable("tasks", "SLURM_STEP_NUM_TASKS = 'many' is not a whole number", SLURM_STEP_NUM_TASKS="many"),
    variable("procid", "numbered from 0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="7"),
    variable("threads", "OMP_NUM_THREADS = 'abc' is not a number of threads", OMP_NUM_THREADS="abc"),
    variable("no-threads", "OMP_NUM_THREADS = '0' is not a number of threads", OMP_NUM_THREADS="0"),
    variable("devices", "CUDA_VISIBLE_DEVICES = 'first': 'first' is not a device", CUDA_VISIBLE_DEVICES="first"),
    variable("devices-gap", "CUDA_VISIBLE_DEVICES = '0,,1': '' is not a device", CUDA_VISIBLE_DEVICES="0,,1"),
    variable("temporary", "TMPDIR = '/nowhere' is not a writable folder", TMPDIR="/nowhere"),
    changed("run-in-a-file", "README.md is no folder that can be written", run__dir="{root}/README.md"),
    changed("run-on-a-device", "/dev/null is no folder that can be written", run__dir="/dev/null/runs"),
    changed("result-in-a-file", "README.md is no folder", "evaluate", out="{root}/README.md/result.json"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*CONFIGS, *DAMAGED, *CASES], ids=lambda case: case.name)
@pytest.mark.usefixtures("no_weights")
def test_it_ends_in_one_line(case: Case, world: World, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    assert_one_line(complaint(case, tmp_path, world, monkeypatch, capfd), case.expected)


def test_a_mark_at_the_beginning_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("run.name = 'a'", encoding="utf-8-sig")
    assert read_toml(tmp_path / "config.toml") == {"run": {"name": "a"}}


@pytest.mark.processes
def test_two_processes_complain_once(world: World, tmp_path: Path) -> None:
    import tomli_w

    config = tables("distill", tmp_path, world)
    config["data"]["train"] = "/nowhere.csv"
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    script, words = ROOT / "launch" / "task_distill.py", (str(tmp_path / "config.toml"),)
    variables = {"MASTER_ADDR": LAUNCHED["MASTER_ADDR"]}
    ranks = start_ranks(_run_in, work, variables, script, words, folder=output, processes=2)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [2, 2]
    outputs = [path.read_text() for path in output.iterdir()]
    assert_one_line("".join(outputs), "/nowhere.csv: no such file")
    assert not list(work.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "work", "output"}


def _run_in(folder: Path, variables: dict[str, str], script: Path, words: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    run_script(script, *words)


@pytest.mark.processes
def test_a_port_that_is_taken(world: World, tmp_path: Path) -> None:
    import socket

    import tomli_w

    (tmp_path / "config.toml").write_text(tomli_w.dumps(tables("evaluate", tmp_path, world)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        script, words = ROOT / "launch" / "evaluate.py", (str(tmp_path / "config.toml"),)
        (rank,) = start_ranks(_run_in, tmp_path, variables, script, words, folder=tmp_path / "output", processes=1)
        rank.join(120)
    assert rank.exitcode == 2
    (output,) = (tmp_path / "output").iterdir()
    complaints = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1
    assert f"MASTER_PORT = {port}: the processes cannot meet at this address" in complaints[0]
