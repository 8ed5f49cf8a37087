"""A user's mistake: one line on stderr, exit code 2, no traceback, nothing left behind, before a weight is read."""

from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World
from launching import ROOT, launch, run_command
from malformed_inputs import Case, assert_one_line, complaint, jsonl

from lad_dist.data.tokenization.algorithms import train_wordpiece

TASK, CORPUS, EVALUATE, PREPARE = "distill", "pretrain", "evaluate", "prepare"
# In the folder of a case.
FILES = {"rows.jsonl": '{"text": "a"}\n{"texts": "a"}\n', "empty/note": ""}
ROWS = {"kind": "jsonl", "path": "{here}/rows.jsonl"}


@pytest.fixture(scope="module")
def places(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the things are that mistakes point to."""
    folder = tmp_path_factory.mktemp("mistakes")
    train_wordpiece((f"xx{n} yy{n}" for n in range(200)), 150, folder / "words")
    rows = [{"text": toy.sentence(n), "label": label} for n, label in enumerate(["no", "yes", "no", "yess"])]
    (folder / "bad.jsonl").write_text(jsonl(*rows))
    roberta = {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 34}
    return {
        "other_words": toy.model(folder / "other", folder / "words", "classification", toy.LABELS),
        "three": toy.model(folder / "three", world.tokenizer, "classification", ("a", "b", "c")),
        "renamed": toy.model(folder / "renamed", world.tokenizer, "classification", ("left", "right")),
        "bad_dev": folder / "bad.jsonl",  # its fourth line has a label that training does not have
        "short_roberta": toy.model(folder / "roberta", world.tokenizer, "mlm", **roberta),  # of 34 positions it uses 32
    }


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
    (TASK, {"deepspeed.bf16.enable": True}, 'deepspeed.bf16.enable: no such key; did you mean "enabled"?'),
    (TASK, {"deepspeed.bf16.enabled": True}, "needs deepspeed.zero_optimization.stage = 1 or more"),
    (TASK, {"deepspeed.fp16.enabled": True}, "deepspeed.fp16.enabled: DeepSpeed has no fp16 on this device (cpu)"),
    (TASK, {"deepspeed.gradient_clipping": "one"}, "deepspeed.gradient_clipping: "),
    (TASK, {"deepspeed.train_batch_size": 8}, "deepspeed.train_batch_size: data.micro_batches_per_step"),
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
    (TASK, {"data.labels": ["no", "no"]}, 'data: labels has "no" twice'),
    (TASK, {"data.labels": ["no", "yess"]}, 'label "yes" is unknown: did you mean "yess"?'),
    (TASK, {"data.labels": ["no", 1], "data.kind": "regression"}, 'labels does not go with kind = "regression"'),
    (TASK, {"data.positive": "yess"}, 'data.positive "yess" is unknown: did you mean "yes"?'),
    (TASK, {"data.task": "rte", "data.train": None, "data.dev": None, "data.positive": 1}, "positive is for train and"),
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
    (EVALUATE, {"data.test": "{bad_dev}"}, "data.test is scored by trainings; give the file as data.dev"),
    (EVALUATE, {"data.class_weights": "balanced"}, "data.class_weights are for trainings"),
    (TASK, {"objective": {"name": "kd", "soft": 0.0, "hard": 0.0}}, "objective: all weights are 0"),
    (TASK, {"objective": {"name": "kd", "hard": 0.0}, "data.class_weights": "balanced"}, "does not learn from labels"),
    (
        TASK,
        {"objective": {"name": "kd", "soft": 0.0}, "data.unlabelled": "{bad_dev}"},
        'data.unlabelled: objective.name "kd" reads nothing of a teacher here; take kd or lad with objective.soft',
    ),
    (
        TASK,
        {"teacher": None, "objective": {"name": "supervised"}, "data.unlabelled": "{bad_dev}"},
        'data.unlabelled: objective.name "supervised" reads nothing of a teacher here; take kd or lad with objective',
    ),
    (TASK, {"teacher": None, "data.unlabelled": "{bad_dev}"}, 'objective.name "lad" needs a teacher: set teacher.path'),
    (TASK, {"data.unlabelled": "nowhere.txt"}, "nowhere.txt: no such file"),
    (EVALUATE, {"data.unlabelled": "{bad_dev}"}, "data.unlabelled is for trainings; remove it"),
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
    (CORPUS, {"data.whole_word_mask": "False"}, "input should be a valid boolean, not 'False'; write false"),
    (CORPUS, {"data.source_weights": {"novels": 2.0}}, 'data.source_weights: no source "novels" in'),
    (CORPUS, {"data.source_weights": {"books": 0.0}}, "data.source_weights.books: input should be greater than 0"),
    (TASK, {"objective.norm": "sequence"}, "it normalises over whole sequences, so set data.pad_to"),
    (CORPUS, {"teacher.cache": "teacher_cache"}, "teacher.cache is for tasks"),
    (CORPUS, {"teacher.baseline_check": False}, "teacher.baseline_check is for tasks"),
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
    (CORPUS, {"student": {"architecture": {**toy.SIZES, "hidden_act": "geluu"}}}, "can be built ('geluu')"),
    (CORPUS, {"student": {"architecture": {**toy.SIZES, "vocab_size": 9}}}, "student.architecture: the tokenizer has"),
    (CORPUS, {"student.path": "{short_roberta}"}, "after the padding token 1, the tokenizer's is 0"),
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
    # evaluations
    (EVALUATE, {"model.path": "/nowhere"}, "/nowhere: cannot read a model"),
    (EVALUATE, {"model.path": "{three}"}, "the head has 3 outputs"),
    (EVALUATE, {"teacher.path": "{renamed}"}, "the model's labels are left, right"),
    (EVALUATE, {"data.dev": "nowhere.csv"}, "nowhere.csv: no such file"),
    (EVALUATE, {"data.max_length": 65}, "data.max_length: 65 tokens, but"),
    (EVALUATE, {"teacher.path": "{other_words}"}, "this tokenizer does not know the text"),
    (EVALUATE, {"models": {"path": "x"}}, 'models: no such table; did you mean "model"?'),
    # preparations
    (PREPARE, {"source": [ROWS]}, 'rows.jsonl:2: no "text": did you mean "texts"?; mend or remove it, or set on_error'),
    (PREPARE, {"source": [{**ROWS, "path": "{here}/empty"}]}, "empty: no .jsonl files in it"),
    (PREPARE, {"source": [{**ROWS, "path": "/nowhere"}]}, "/nowhere: no such file or folder"),
    (PREPARE, {"source": [{**ROWS, "kind": "parquett"}]}, "source.0.kind: input should be "),
    (PREPARE, {"source": [{**ROWS, "splitt": "train"}]}, 'source.0.splitt: no such key; did you mean "split"?'),
    (PREPARE, {"source": [{**ROWS, "split": "test"}]}, 'split does not go with kind = "jsonl", only with hub'),
    (PREPARE, {"source": [ROWS, ROWS]}, 'two sources are called "rows"; give one of them another name'),
    (PREPARE, {"part": 0}, "give both of part and parts, or none"),
    (PREPARE, {"part": 2, "parts": 2}, "part = 2, but parts = 2 are numbered from 0"),
    (PREPARE, {"tokenizer": "/nowhere"}, "/nowhere: no tokenizer, neither a folder of one nor a hub name"),
    (PREPARE, {"out": "{here}/rows.jsonl"}, "exists and holds no token shards; give another folder for out"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("command", "changes", "expected"), MISTAKES)
def test_a_mistake_ends_in_one_line(
    command: str, changes: dict[str, Any], expected: str, world: World, places: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    case = Case(expected, command, expected, FILES, changes)
    assert_one_line(complaint(case, tmp_path, world, monkeypatch, capfd, places), expected)


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("distill", ["nowhere.toml"], "nowhere.toml: cannot read the config (No such file or directory)"),
        ("distill", ["configs/task/lad.toml", "optim.lr"], "an override is written key.subkey=value"),
        (
            "finetune",
            ["configs/task/teacher.toml", "run.step=1"],
            'run.step: no such key; did you mean "steps"?',
        ),
        ("pretrain", ["configs/pretrain/kd.toml", "data.shards=/nowhere"], "/nowhere: holds no token shards"),
        ("prepare", ["configs/pretrain/corpus.toml", "source=[]"], "source: "),
        ("verify", ["/nowhere"], "/nowhere: holds no token shards"),
        ("train-tokenizer", ["configs/pretrain/tokenizer_unigram.toml", "kind=bpe"], "kind: input should be "),
        ("evaluate", ["configs/task/evaluate.toml", "data.task=rtee", "data.path=x"], 'task "rtee" is unknown'),
        ("tune", ["configs/tune/lad.toml", "search.metric=[1]"], "search.metric: "),
        ("benchmark", ["stepp", "configs/task/lad.toml"], "benchmark: name what to time"),
        ("report", ["/nowhere"], "/nowhere: no such folder"),
        ("report", ["--base", "kd", "tests"], "report: unrecognized arguments: --base"),
    ],
)
def test_mistakes_of_commands(
    command: str, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_command(command, *words) == 2
    seen = capfd.readouterr()
    assert seen.out == ""
    assert_one_line(seen.err, expected)
    assert not (ROOT / "runs" / "lad").exists()


def test_a_mistake_of_a_real_process() -> None:
    done = launch(["-m", "lad_dist.cli", "report", "/nowhere"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line(done.stderr, "/nowhere: no such folder")
