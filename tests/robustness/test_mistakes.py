"""A user's mistake: one line on stderr, exit code 2, no traceback, nothing left behind, before a weight is read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import toy
from conftest import World
from launching import ROOT, exit_code, launch

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.load import load_config
from lad_dist.config.schema import EvaluateConfig, PretrainConfig, TaskConfig
from lad_dist.data.shards.prepare import prepare
from lad_dist.data.tokenization.algorithms import train_wordpiece

TASK, CORPUS = "task", "corpus"


@dataclass(frozen=True)
class Places:
    """Where the things are that mistakes point to."""

    world: World
    other_words: Path  # a teacher with another vocabulary
    three: Path  # a teacher with three labels
    renamed: Path  # a teacher with two other labels
    bad_dev: Path  # its fourth line has a label that training does not have
    short_roberta: Path  # 34 positions, of which its family leaves 32


@pytest.fixture(scope="module")
def places(world: World, tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("mistakes")
    train_wordpiece((f"xx{n} yy{n}" for n in range(200)), 150, folder / "words")
    rows = [{"text": toy.sentence(n), "label": label} for n, label in enumerate(["no", "yes", "no", "yess"])]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    roberta = {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 34}
    return Places(
        world,
        toy.model(folder / "other", folder / "words", "classification", toy.LABELS),
        toy.model(folder / "three", world.tokenizer, "classification", ("a", "b", "c")),
        toy.model(folder / "renamed", world.tokenizer, "classification", ("left", "right")),
        folder / "bad.jsonl",
        toy.model(folder / "roberta", world.tokenizer, "mlm", **roberta),
    )


def tables_of(kind: str, places: Places, work: Path) -> dict[str, Any]:
    world = places.world
    if kind == TASK:
        return toy.task_config(work, world.files, world.teacher, world.pretrained)
    return toy.corpus_config(work, world.corpus, world.pretrained, world.pretrained)


def fill(value: Any, places: Places) -> Any:
    """`{three}` in a value stands for that place."""
    names = {"headless": places.world.headless, "teacher": places.world.teacher, **vars(places)}
    return value.format_map(names) if isinstance(value, str) else value


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    # names
    (TASK, {"objective.name": "ladd"}, 'objective.name "ladd" is unknown: did you mean "lad"?'),
    (TASK, {"objective.hiden": 1.0}, 'objective: hiden: no such key; did you mean "hidden"?'),
    (TASK, {"objective.hidden": -1.0}, "objective: hidden: input should be greater than or equal to 0"),
    (TASK, {"objective.temperature": 0.0}, "objective: temperature: input should be greater than 0"),
    (
        TASK,
        {"compression": [{"name": "lowrank", "keep": 0.5}]},
        'compression.name "lowrank" is unknown: did you mean "low_rank"?',
    ),
    (TASK, {"compression": [{"name": "low_rank"}]}, "compression low_rank: keep: missing"),
    (
        TASK,
        {"compression": [{"name": "low_rank", "keep": 2.0}]},
        "compression low_rank: keep: input should be less than",
    ),
    (TASK, {"data.train": None, "data.dev": None, "data.task": "rtee"}, 'task "rtee" is unknown: did you mean "rte"?'),
    (TASK, {"optim.lrr": 1.0}, 'optim.lrr: no such key; did you mean "lr"?'),
    (TASK, {"optims": {"lr": 1.0}}, 'optims: no such table; did you mean "optim"?'),
    # DeepSpeed
    (TASK, {"deepspeed.zero_optimisation": {}}, 'no such table; did you mean "zero_optimization"?'),
    (
        TASK,
        {"deepspeed.zero_optimization.stagee": 1},
        'deepspeed.zero_optimization.stagee: no such key; did you mean "stage"?',
    ),
    (TASK, {"deepspeed.zero_optimization.stage": 7}, "deepspeed.zero_optimization.stage: "),
    (TASK, {"deepspeed.zero_optimization.stage": "two"}, "deepspeed.zero_optimization.stage: "),
    (TASK, {"deepspeed.zero_optimization": 1}, "deepspeed.zero_optimization: "),
    (
        TASK,
        {"deepspeed.zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        'offload_optimizer.device: no checkpoint holds what is on "nvme"; use "cpu"',
    ),
    (TASK, {"deepspeed.bf16": True}, "deepspeed.bf16: "),
    (
        TASK,
        {"deepspeed.bf16.enable": True},
        'deepspeed.bf16.enable: no such key; did you mean "enabled"?',
    ),
    (TASK, {"deepspeed.bf16.enabled": True}, "needs deepspeed.zero_optimization.stage = 1 or more"),
    (TASK, {"deepspeed.gradient_clipping": "one"}, "deepspeed.gradient_clipping: "),
    (
        TASK,
        {"deepspeed.train_batch_size": 8},
        "deepspeed.train_batch_size: data.micro_batches_per_step",
    ),
    (TASK, {"deepspeed.optimizer": {"type": "Adam"}}, "deepspeed.optimizer: [optim] sets this"),
    # what is not there
    (TASK, {"data.train": "nowhere.csv"}, "nowhere.csv: no such file"),
    (TASK, {"data.dev": "nowhere.xls"}, 'nowhere.xls: file type ".xls" is unknown'),
    (TASK, {"teacher.path": "/nowhere"}, "/nowhere: cannot read a model"),
    (TASK, {"student.path": "/nowhere"}, "/nowhere: no "),
    (TASK, {"student.tokenizer": "/nowhere"}, "/nowhere: no tokenizer, neither a folder of one nor a hub name"),
    (CORPUS, {"data.shards": "/nowhere"}, "/nowhere: holds no token shards"),
    # what does not go together
    (TASK, {"teacher.path": "{other_words}"}, "the teacher's vocabulary"),
    (TASK, {"teacher.path": "{three}"}, "the head has 3 outputs (a, b, c), the task has 2 labels (no, yes)"),
    (TASK, {"teacher.path": "{renamed}"}, "the model's labels are left, right, the task's are no, yes"),
    (TASK, {"data.dev": "{bad_dev}"}, 'bad.jsonl:4: label "yess" is unknown: did you mean "yes"?'),
    (TASK, {"data.kind": "tagging", "data.train": "{bad_dev}"}, "bad.jsonl:1: tokens is None, not a list"),
    (TASK, {"data.kind": "question_answering"}, 'train.csv: file type ".csv" is unknown'),
    (TASK, {"teacher": None}, 'objective.name "lad" needs a teacher: set teacher.path'),
    (
        TASK,
        {"objective": {"name": "supervised"}},
        'objective.name "supervised" learns from no teacher: remove [teacher]',
    ),
    (TASK, {"objective": {"name": "mlm"}}, 'objective.name "mlm" does not run on a task'),
    (CORPUS, {"objective": {"name": "supervised"}}, 'objective.name "supervised" does not run on a corpus'),
    (CORPUS, {"teacher.path": "{headless}", "objective": {"name": "kd"}}, "the teacher has no head to learn from"),
    (CORPUS, {"teacher.path": "{teacher}", "objective": {"name": "kd"}}, "the teacher has no head to learn from"),
    (CORPUS, {"objective": {"name": "minilm2", "heads": 5}}, "objective.heads = 5 does not divide a width of 32"),
    (
        CORPUS,
        {"objective": {"name": "minilm2", "teacher_layer": 5}},
        "objective.teacher_layer = 5, but the model has 4",
    ),
    (CORPUS, {"objective": {"name": "minilm", "heads": 8}}, "objective: heads: no such key"),
    (TASK, {"objective": {"name": "kd", "cosine": 1.0}}, "objective: cosine: no such key"),
    (TASK, {"objective": {"name": "kd", "soft": 0.0, "hard": 0.0}}, "objective: all weights are 0"),
    (
        CORPUS,
        {"objective": {"name": "tinybert", "embedding": 0.0, "hidden": 0.0, "attention": 0.0}},
        "objective: all weights are 0",
    ),
    (TASK, {"objective": {"name": "emd", "hidden": 0.0, "attention": 0.0}}, "no layers are compared; take kd"),
    (TASK, {"objective": {"name": "pkd", "mapping": "even"}}, "objective: mapping: input should be 'skip' or 'last'"),
    (
        TASK,
        {"student.num_hidden_layers": 1, "objective": {"name": "pkd"}},
        "a student of one layer has no layer before the last",
    ),
    (
        TASK,
        {"student.num_hidden_layers": 5},
        "student.num_hidden_layers = 5, but the model it starts from has 4 layers",
    ),
    (TASK, {"student.num_hidden_layers": None, "student.layers": [1, 9]}, "student.layers: no layer 9; the model has"),
    (TASK, {"data.max_length": 65}, "data.max_length: 65 tokens, but"),
    (TASK, {"data.pad_to": 128}, "data.max_length: 128 tokens, but"),
    (
        CORPUS,
        {"student.path": "{short_roberta}", "data.max_length": 33, "data.micro_batch_tokens": 66},
        "data.max_length: 33 tokens, but",
    ),
    (CORPUS, {"data.micro_batch_tokens": 60}, "micro_batch_tokens = 60 is no multiple of max_length = 32; 64 is"),
    (CORPUS, {"data.source_weights": {"novels": 2.0}}, 'data.source_weights: no source "novels" in'),
    (CORPUS, {"data.source_weights": {"books": 0.0}}, "data.source_weights.books: input should be greater than 0"),
    (TASK, {"objective.norm": "sequence"}, "it normalises over whole sequences, so set data.pad_to"),
    (CORPUS, {"teacher.cache": "teacher_cache"}, "teacher.cache is for tasks"),
    (TASK, {"objective.gates": "constant"}, "set their value, as in objective.gate_init = 0.5"),
    (
        TASK,
        {"student.hidden_size": 16, "student.embeddings": "random"},
        "throws away what a narrower model is fitted to",
    ),
    (TASK, {"objective.detach_gates": True}, "nothing trains the gates; set objective.gates = "),
    (TASK, {"objective.gate_supervision": 1.0, "objective.gates": "frozen"}, 'gates = "frozen" learn nothing'),
    (CORPUS, {"objective.gate_supervision": 1.0}, "on a corpus the teacher makes no decision to predict"),
    (TASK, {"objective.gate_init": 1.0}, "only constant gates can have this value"),
    (
        TASK,
        {"student": {"architecture": toy.SIZES}},
        "student.tokenizer: a new model for a task needs a tokenizer; set it",
    ),
    # lengths
    (TASK, {"run.steps": None}, "run: give exactly one of steps and epochs"),
    (TASK, {"run.epochs": 1.0}, "run: give exactly one of steps and epochs"),
    # architectures
    (
        CORPUS,
        {"student": {"architecture": {"hidden_sise": 32}}},
        'bert has no such setting; did you mean "hidden_size"?',
    ),
    (
        CORPUS,
        {"student": {"architecture": {"model_type": "robreta"}}},
        'model_type "robreta" is unknown; did you mean "roberta"?',
    ),
    (
        CORPUS,
        {"student": {"architecture": {**toy.SIZES, "num_attention_heads": 5}}},
        "num_attention_heads = 5 does not divide hidden_size = 32",
    ),
    (CORPUS, {"student": {"architecture": {**toy.SIZES, "hidden_size": "big"}}}, "student.architecture: "),
    (
        CORPUS,
        {"student": {"architecture": {**toy.SIZES, "hidden_size": 16}}},
        "the student is 16 wide and the teacher 32",
    ),
    (CORPUS, {"student": {"architecture": {**toy.SIZES, "num_hidden_layers": 5}}}, "5 student layers, only 4 teacher"),
    *[
        (
            CORPUS,
            {"student": {"architecture": {**toy.SIZES, "num_attention_heads": 2}}, "objective": {"name": name}},
            f"objective.name = {name}: the student has 2 heads and the teacher 4",
        )
        for name in ("emd", "minilm", "tinybert")
    ],
]


def written(folder: Path, tables: dict[str, Any], changes: dict[str, Any]) -> Path:
    """A config file: the tables after changes {"a.b": value}, None taking a key away."""
    for dotted, value in changes.items():
        table: Any = tables
        *outer, key = dotted.split(".")
        for name in outer:
            table = table.setdefault(name, {})
        table[key] = value
        if value is None:
            del table[key]
    (folder / "mistake.toml").write_text(tomli_w.dumps(tables))
    return folder / "mistake.toml"


def assert_one_line(error: str, expected: str) -> None:
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert expected in error


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("kind", "changes", "expected"), MISTAKES)
def test_a_mistake_ends_in_one_line(
    kind: str, changes: dict[str, Any], expected: str, places: Places, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lad_dist.cli.commands import train_command

    work = tmp_path / "runs"
    filled = {key: fill(value, places) for key, value in changes.items()}
    path = written(tmp_path, tables_of(kind, places, work), filled)
    schema = TaskConfig if kind == TASK else PretrainConfig
    code = exit_code(lambda: train_command(load_config(schema, path)))
    seen = capfd.readouterr()
    assert code == 2
    assert seen.out == ""
    assert_one_line(seen.err, expected)
    assert not work.exists()


@pytest.mark.usefixtures("no_weights")
def test_micro_batches_are_shared_out_evenly(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lad_dist.cli.commands import train_command

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "::1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    path = written(tmp_path, tables_of(TASK, places, tmp_path / "runs"), {})
    assert exit_code(lambda: train_command(load_config(TaskConfig, path))) == 2
    assert_one_line(
        capfd.readouterr().err, "data.micro_batches_per_step = 4: cannot be shared out over 3 processes; 3 can"
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.path": "/nowhere"}, "/nowhere: cannot read a model"),
        ({"model.path": "{three}"}, "the head has 3 outputs"),
        ({"teacher.path": "{renamed}"}, "the model's labels are left, right"),
        ({"data.dev": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"data.max_length": 65}, "data.max_length: 65 tokens, but"),
        ({"teacher.path": "{other_words}"}, "this tokenizer does not know the text"),
        ({"models": {"path": "x"}}, 'models: no such table; did you mean "model"?'),
    ],
)
def test_mistakes_of_an_evaluation(
    changes: dict[str, Any], expected: str, places: Places, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lad_dist.cli.commands import evaluate_command

    data = {**places.world.files, "max_length": 32}
    model = {"path": str(places.world.teacher)}
    tables = {"model": model, "teacher": dict(model), "data": data, "out": str(tmp_path / "result.json")}
    path = written(tmp_path, tables, {key: fill(value, places) for key, value in changes.items()})
    assert exit_code(lambda: evaluate_command(load_config(EvaluateConfig, path))) == 2
    assert_one_line(capfd.readouterr().err, expected)
    assert not (tmp_path / "result.json").exists()


ROWS = {"kind": "jsonl", "path": "{rows}"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": [ROWS]}, 'rows.jsonl:2: no "text": did you mean "texts"?; mend or remove it, or set on_error'),
        ({"source": [{**ROWS, "path": "{empty}"}]}, "empty: no .jsonl files in it"),
        ({"source": [{**ROWS, "path": "/nowhere"}]}, "/nowhere: no such file or folder"),
        ({"source": [{**ROWS, "kind": "parquett"}]}, "source.0.kind: input should be "),
        ({"source": [{**ROWS, "splitt": "train"}]}, 'source.0.splitt: no such key; did you mean "split"?'),
        ({"source": [{**ROWS, "split": "test"}]}, 'split does not go with kind = "jsonl", only with hub'),
        ({"source": [ROWS, ROWS]}, 'two sources are called "rows"; give one of them another name'),
        ({"part": 0}, "give both of part and parts, or none"),
        ({"part": 2, "parts": 2}, "part = 2, but parts = 2 are numbered from 0"),
        ({"tokenizer": "/nowhere"}, "/nowhere: no tokenizer, neither a folder of one nor a hub name"),
        ({"out": "{empty}/../rows.jsonl"}, "exists and holds no token shards; give another folder for out"),
    ],
)
def test_mistakes_of_a_preparation(
    changes: dict[str, Any], expected: str, places: Places, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"texts": "a"}\n')
    (tmp_path / "empty").mkdir()
    paths = {"rows": tmp_path / "rows.jsonl", "empty": tmp_path / "empty"}

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [{key: filled(inner) for key, inner in source.items()} for source in value]
        return value.format_map(paths) if isinstance(value, str) else value

    tables = {"out": str(tmp_path / "out"), "tokenizer": str(places.world.tokenizer), "source": filled([ROWS])}
    path = written(tmp_path, tables, {key: filled(value) for key, value in changes.items()})
    before = set(tmp_path.iterdir())
    assert exit_code(lambda: not prepare(load_config(PrepareConfig, path))) == 2
    assert_one_line(capfd.readouterr().err, expected)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("task_distill", ["nowhere.toml"], "nowhere.toml: cannot read the config (No such file or directory)"),
        ("task_distill", ["configs/task/lad.toml", "optim.lr"], "an override is written key.subkey=value"),
        (
            "finetune_teacher",
            ["configs/task/teacher.toml", "run.step=1"],
            'run.step: no such key; did you mean "steps"?',
        ),
        ("pretrain_distill", ["configs/pretrain/kd.toml", "data.shards=/nowhere"], "/nowhere: holds no token shards"),
        ("prepare_corpus", ["configs/pretrain/corpus.toml", "source=[]"], "source: "),
        ("prepare_corpus", ["--verify", "/nowhere"], "/nowhere: holds no token shards"),
        ("train_tokenizer", ["configs/pretrain/tokenizer_unigram.toml", "kind=bpe"], "kind: input should be "),
        ("evaluate", ["configs/task/evaluate.toml", "data.task=rtee", "data.path=x"], 'task "rtee" is unknown'),
        ("tune", ["configs/tune/lad.toml", "search.metric=1"], "search.metric: "),
        ("benchmark", ["stepp", "configs/task/lad.toml"], "benchmark: name what to time"),
        ("report", ["/nowhere"], "/nowhere: no such folder"),
        ("report", ["--base", "kd", "tests"], "report: unrecognized arguments: --base"),
    ],
)
def test_mistakes_through_the_real_scripts(script: str, words: list[str], expected: str) -> None:
    done = launch([ROOT / "launch" / f"{script}.py", *words])
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line(done.stderr, expected)
    assert not (ROOT / "runs" / "lad").exists()
