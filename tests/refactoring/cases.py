"""The runs that are compared: a shipped config each, made tiny, so that all that it is about moves within eight steps.

Paths are relative to the folder in which a commit's runs lie; `../inputs` is what inputs.py made for both commits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

CORPUS_FOLDER, TOKENIZER_FOLDER = "corpus", "tokenizer"


class Case(NamedTuple):
    """A training, or a preparation, which trains nothing: its `files` are compared byte by byte."""

    name: str
    script: str
    config: str
    overrides: Mapping[str, Any]
    folder: str
    processes: int = 1
    files: tuple[str, ...] = ()  # patterns


EVERY_RUN = {
    "run.log_every": 1,
    "run.eval_every": 4,
    "run.save_every": 0,
    "run.watchdog_timeout": 0.0,
    "data.num_workers": 0,
    "data.micro_batches_per_step": 2,
    "optim.lr": 1e-3,
    "deepspeed.bf16.enabled": False,
}
HALF_AS_DEEP = {"student.num_hidden_layers": 2}
GATES_MOVE = {"optim.objective_lr": 1e-2}
STEP_BY_STEP = {"compression.0.update_every": 1}


def _on_corpus(name: str, **changes: Any) -> Case:
    """Eight steps of 2 x 256 tokens, masked and shuffled from the seed, with the teacher's dropout of 0.1."""
    places = {
        "run.steps": 8,
        "data.shards": CORPUS_FOLDER,
        "data.max_length": 32,
        "data.micro_batch_tokens": 256,
        "teacher.path": "../inputs/pretrained",
        "student.path": "../inputs/pretrained",
    }
    return _case(f"corpus-{name}", f"pretrain/{name}", {**places, **HALF_AS_DEEP, **changes})


def _on_task(
    name: str, task: str, changes: Mapping[str, Any], *, config: str | None = None, processes: int = 1
) -> Case:
    """Two epochs of 64 examples: eight steps of 2 x 8. A teacher has the task's labels."""
    places = {
        "run.epochs": 2.0,
        "data.task": task,
        "data.path": "../inputs/glue",
        "data.max_length": 48,
        "data.micro_batch_size": 8,
    }
    return _case(f"task-{name}", f"task/{config or name}", {**places, **changes}, processes)


def _case(name: str, config: str, overrides: Mapping[str, Any], processes: int = 1) -> Case:
    script = "launch/pretrain_distill.py" if config.startswith("pretrain/") else "launch/task_distill.py"
    changes = {"run.name": name, **EVERY_RUN, **overrides}
    return Case(name, script, f"configs/{config}.toml", changes, f"runs/{name}", processes)


def _taught(task: str, student: str = "../inputs/pretrained") -> dict[str, Any]:
    return {"teacher.path": f"../inputs/{task}", "teacher.baseline_check": False, "student.path": student}


TOKENIZER = Case(
    "train_tokenizer",
    "launch/train_tokenizer.py",
    "configs/pretrain/tokenizer_wordpiece.toml",
    {
        "out": TOKENIZER_FOLDER,
        "vocab_size": 1000,
        "max_characters": 60_000,
        "source": [{"kind": "text", "path": "../inputs/text/books"}],
    },
    TOKENIZER_FOLDER,
    files=("tokenizer.json",),
)
CORPUS = Case(
    "prepare_corpus",
    "launch/prepare_corpus.py",
    "configs/pretrain/corpus.toml",
    {
        "out": CORPUS_FOLDER,
        "tokenizer": "../inputs/pretrained",
        "held_out": 0.1,
        "num_workers": 1,
        "source": [
            {"kind": "wikiextractor", "path": "../inputs/text/wikipedia"},
            {"kind": "text", "path": "../inputs/text/books", "document": "block"},
        ],
    },
    CORPUS_FOLDER,
    files=("*/*.bin", "*/*.npy"),
)
CASES = (
    # 8 relation heads, as the toys are 32 wide; the corpus's second source twice in an epoch.
    _on_corpus("minilm2", **{"objective.heads": 8, "data.source_weights": {"books": 2.0}}),
    # A narrower student, fitted to the first batches before it trains.
    _on_corpus("kd", **{"student.hidden_size": 24, "student.num_attention_heads": 4, "data.mlm_probability": 0.3}),
    _on_corpus("lad", **GATES_MOVE, **{"data.whole_word_mask": True}),
    # Batches from a loader process.
    _on_task("lad", "rte", {**_taught("rte"), **HALF_AS_DEEP, **GATES_MOVE, "data.num_workers": 1}),
    _on_task("lad_paper", "mrpc", {**_taught("mrpc"), **HALF_AS_DEEP, **GATES_MOVE, "data.pad_to": 48}),
    # The student is 2 x 24 and the teacher 4 x 32: hidden states go through a learnt map.
    _on_task("tinybert", "rte", _taught("rte", "../inputs/narrow")),
    # Weights of 1, so that the plans of transport, renewed each step, show in the loss.
    _on_task("emd", "stsb", {**_taught("stsb"), **HALF_AS_DEEP, "objective.hidden": 1.0, "objective.attention": 1.0}),
    # The coins of two blocks over eight steps; gates over all layers.
    _on_task("theseus_lad", "rte", {**_taught("rte", "teacher"), **HALF_AS_DEEP, **GATES_MOVE}),
    # In a toy there is more that nothing makes smaller. Factors are pruned at each of the first steps.
    _on_task("ladabert-2", "sst2", {**_taught("sst2", "teacher"), **STEP_BY_STEP, "compression.0.reduction": 3.0}),
    _on_task("prune_lad", "mrpc", {**_taught("mrpc", "teacher"), **GATES_MOVE, **STEP_BY_STEP}),
    # A rate at which scores overtake each other within eight steps.
    _on_task("adapting", "stsb", {"student.path": "../inputs/pretrained", "optim.lr": 1e-2}),
    # Two processes under ZeRO 2, whose weights are compared; the teacher is asked anew at each step.
    _on_task(
        "lad-zero-2",
        "rte",
        {
            **_taught("rte"),
            **HALF_AS_DEEP,
            **GATES_MOVE,
            "run.replica_check_every": 2,
            "teacher.cache_gb": 0.0,
            "data.micro_batches_per_step": 4,
            "data.micro_batch_size": 4,
            "deepspeed.zero_optimization.stage": 2,
        },
        config="lad",
        processes=2,
    ),
)
# Those whose losses are held to losses.json.
RECORDED = tuple(
    case for case in CASES if case.name in ("corpus-minilm2", "task-lad", "task-theseus_lad", "task-prune_lad")
)
