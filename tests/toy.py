"""Toy models, texts and configs that tests share: 4 x 32 teachers over a few hundred words, dropout 0."""

import json
import random
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lad_dist.compression.base import NO_DATA, CompressionContext
from lad_dist.compression.compressed_module import CompressedModule, compressed_modules
from lad_dist.compression.registry import create_compression
from lad_dist.config.load import apply_overrides, parse_config
from lad_dist.config.schema import NamedOptions, TrainConfig, train_schema
from lad_dist.core.batch import Batch, Head
from lad_dist.core.collate import collate, pack
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.tokenization.algorithms import train_wordpiece
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.models import loading
from lad_dist.models.forward import compute_outputs
from lad_dist.models.loading import PreTrainedModel, save_model

WORDS = [
    a + b for a in ("ba", "de", "fi", "go", "lu", "ma", "ne", "po") for b in ("n", "rt", "sk", "l", "mp", "st", "d")
]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LABELS = ("no", "yes")
Kind = TypeVar("Kind", bound=CompressedModule)


def sentence(seed: int, most: int = 20) -> str:
    pick = random.Random(seed)
    return " ".join(pick.choices(WORDS, k=pick.randint(3, most)))


def tokenizer(folder: Path) -> Path:
    train_wordpiece((sentence(n) for n in range(500)), 200, folder)
    return folder


def model(folder: Path, tokenizer_folder: Path, head: str, labels: tuple[str, ...] = (), **sizes: Any) -> Path:
    """A model folder with new weights and the tokenizer."""
    torch.manual_seed(0)
    words = load_tokenizer(str(tokenizer_folder))
    new_model = loading.create_model({**SIZES, **sizes}, head, vocab_size=len(words), labels=labels)  # type: ignore[arg-type]
    save_model(new_model, folder)
    words.save_pretrained(folder)
    return folder


def new_model(head: Head = "classification", *, vocab_size: int = 90, **settings: Any) -> PreTrainedModel:
    """A model in evaluation with new weights."""
    torch.manual_seed(0)
    labels = LABELS if head == "classification" else ()
    return loading.create_model({**SIZES, **settings}, head, vocab_size=vocab_size, labels=labels).eval()


def task_files(folder: Path, train: int = 64, dev: int = 24) -> dict[str, str]:
    """A learnable task as .csv and .jsonl: does the text hold a word of the first syllable?"""
    folder.mkdir(parents=True, exist_ok=True)

    def row(seed: int) -> dict[str, str]:
        text = sentence(seed, most=6)
        return {"text": text, "label": LABELS["ba" in text]}

    (folder / "train.csv").write_text(
        "text,label\n" + "".join("{text},{label}\n".format(**row(n)) for n in range(train))
    )
    (folder / "dev.jsonl").write_text("".join(json.dumps(row(10_000 + n)) + "\n" for n in range(dev)))
    return {"train": str(folder / "train.csv"), "dev": str(folder / "dev.jsonl")}


def batch(
    lengths: list[int], *, pad_to: int | None = None, vocabulary: int = 50, seed: int = 0, labels: Any = None
) -> Batch:
    """A flat batch of random tokens, the first token of each sequence as its head position."""
    random_state = np.random.default_rng(seed)
    sequences = [random_state.integers(5, vocabulary, n) for n in lengths]
    spans = [pad_to or n for n in lengths]
    rows = np.cumsum([0, *spans[:-1]])
    chosen = np.arange(len(lengths)) % 2 if labels is None else np.asarray(labels)
    return collate(sequences, [np.zeros(n, dtype=np.uint8) for n in lengths], rows, chosen, pad_to=pad_to)


BATCH = batch([5, 3, 9])


def logits(model: PreTrainedModel, batch: Batch = BATCH) -> Tensor:
    """Return what the head says in evaluation."""
    outputs = compute_outputs(model.eval(), batch, OutputSpec(logits=True))
    assert outputs.logits is not None
    return outputs.logits


def packed(batch: Batch, span: int) -> Batch:
    """Return a batch without padding in spans of `span` places: as many of its sequences in each as fit."""
    starts, at = [], 0
    lengths = batch.lengths.tolist()
    for length in lengths:
        at = at if at % span + length <= span else -(-at // span) * span
        starts.append(at)
        at += length
    place = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    ids, hidden, labels = (np.zeros(-(-at // span) * span, dtype=np.int64) for _ in range(3))
    ids[place] = batch.input_ids
    hidden[place[batch.head_positions]] = 1
    labels[place[batch.head_positions]] = batch.labels
    ids, hidden, labels = (x.reshape(-1, span) for x in (ids, hidden, labels))
    return pack(ids, np.array(starts), np.array(lengths), hidden > 0, labels)


def task_config(work: Path, files: dict[str, str], teacher: Path, student: Path, **tables: Any) -> dict[str, Any]:
    """Plain tables of a toy LAD run: 8 steps of 4 micro-batches of 4 examples."""
    return {
        "run": {"name": "toy", "dir": str(work), "steps": 8, "log_every": 1},
        "teacher": {"path": str(teacher), "baseline_check": False},  # it has learnt nothing
        "student": {"path": str(student), "num_hidden_layers": 2},
        "data": {**files, "max_length": 32, "micro_batch_size": 4, "micro_batches_per_step": 4, "num_workers": 0},
        "objective": {"name": "lad", "hidden": 1.0},
        "optim": {"lr": 1e-3, "objective_lr": 1e-2},
        "deepspeed": {},
        **tables,
    }


def corpus_config(work: Path, shards: Path, teacher: Path, student: Path, **tables: Any) -> dict[str, Any]:
    """Plain tables of a toy LAD run on a corpus: 4 steps of 2 micro-batches of 256 tokens."""
    return {
        "run": {"name": "toy", "dir": str(work), "steps": 4, "log_every": 1},
        "teacher": {"path": str(teacher)},
        "student": {"path": str(student), "num_hidden_layers": 2},
        "data": {
            "shards": str(shards), "max_length": 32, "micro_batch_tokens": 256, "micro_batches_per_step": 2,
            "num_workers": 0,
        },
        "objective": {"name": "lad", "hidden": 1.0},
        "optim": {"lr": 1e-3, "objective_lr": 1e-2},
        "deepspeed": {},
        **tables,
    }  # fmt: skip


def parsed(tables: dict[str, Any], changes: dict[str, Any] | None = None) -> TrainConfig:
    """The config of plain tables after changes {"a.b": value}, None taking a key away; the data say of which kind."""
    changed = without_none(apply_overrides(tables, (changes or {}).items()))
    return parse_config(train_schema(changed), changed, where="toy")


def without_none(tables: dict[str, Any]) -> dict[str, Any]:
    present = {key: value for key, value in tables.items() if value is not None}
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in present.items()}


def modules_of(model: nn.Module, kind: type[Kind]) -> list[Kind]:
    """Return the compressed modules of a kind, in order."""
    return [module for module in compressed_modules(model) if isinstance(module, kind)]


def compress(
    model: PreTrainedModel, name: str, context: CompressionContext = NO_DATA, **options: Any
) -> PreTrainedModel:
    """Return the model after the compression that a config would list so."""
    return create_compression(NamedOptions.model_validate({"name": name, **options})).apply(model, context)
