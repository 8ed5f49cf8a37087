"""What both commits read: a little real text and real tasks, and toy BERTs made with plain transformers.

    make(folder, data)   folder/text, folder/glue, and a model with its tokenizer in each of MODELS

Weights come from a seed and the vocabulary from counts, so that any machine has the same.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

REPOSITORY = Path(__file__).resolve().parents[2]
WIKIPEDIA = "wikipedia/AA/wiki_00"
SHORT_ARTICLE, ARTICLES = 6000, 16  # characters at most; how many of them
BOOK = "books/1064_the_masque_of_the_red_death.txt"
TASKS = {"RTE": 64, "MRPC": 64, "SST-2": 64, "STS-B": 64}  # examples to train on, and half as many to evaluate on
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
WHOLE_WORDS = 800
LABELS = {
    "rte": ("entailment", "not_entailment"),
    "mrpc": ("not_equivalent", "equivalent"),
    "sst2": ("negative", "positive"),
    "stsb": ("score",),
}
MODELS = ("pretrained", "narrow", *LABELS)


class DataMissing(Exception):
    """The real data, or some of them, are not there."""


def data_folder() -> Path:
    """The real data. Raises DataMissing."""
    folder = Path(os.environ.get("LAD_DIST_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    for name in (WIKIPEDIA, BOOK, *(f"glue/{task}/train.tsv" for task in TASKS)):
        if not (folder / name).is_file():
            raise DataMissing(f"no real data in {folder} ({name}); set LAD_DIST_TEST_DATA")
    return folder


def make(folder: Path, data: Path) -> None:
    logging.disable_progress_bar()
    texts = _copy_text(folder / "text", data)
    _copy_tasks(folder / "glue", data / "glue")
    tokenizer = _tokenizer(texts)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    _save(BertForMaskedLM(_config(**sizes)), tokenizer, folder / "pretrained", seed=1)
    narrow = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48}
    _save(BertModel(_config(**sizes, **narrow)), tokenizer, folder / "narrow", seed=2)
    for seed, (task, labels) in enumerate(LABELS.items(), start=3):
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
        model = BertForSequenceClassification(_config(**sizes, **names))
        _save(model, tokenizer, folder / task, seed)


def _copy_text(folder: Path, data: Path) -> list[str]:
    """The first short articles of Wikipedia and a short story; both as text."""
    wikipedia = re.findall(r"<doc .*?</doc>\n", (data / WIKIPEDIA).read_text(encoding="utf-8"), re.DOTALL)
    articles = "".join([article for article in wikipedia if len(article) <= SHORT_ARTICLE][:ARTICLES])
    story = (data / BOOK).read_text(encoding="utf-8")
    for path, text in ((folder / WIKIPEDIA, articles), (folder / BOOK, story)):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return [articles, story]


def _copy_tasks(folder: Path, glue: Path) -> None:
    """The first examples of each, and the line that names the columns."""
    for task, count in TASKS.items():
        (folder / task).mkdir(parents=True)
        for split, examples in (("train", count), ("dev", count // 2)):
            lines = (glue / task / f"{split}.tsv").read_bytes().splitlines(keepends=True)
            (folder / task / f"{split}.tsv").write_bytes(b"".join(lines[: examples + 1]))


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Uncased WordPiece: the words that are most frequent, and all characters to spell the others with."""
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:WHOLE_WORDS]
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces = [*SPECIAL.values(), *characters, *(f"##{c}" for c in characters), *(w for w in words if len(w) > 1)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, last = ((SPECIAL[role], vocabulary[SPECIAL[role]]) for role in ("cls", "sep"))
    tokenizer.post_processor = processors.BertProcessing(last, first)
    roles: dict[str, Any] = {f"{role}_token": token for role, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def _config(**more: Any) -> BertConfig:
    """Weights ten times as large as BERT's at first, so that attention chooses and layers differ."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return BertConfig(**{**sizes, **more})


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> None:
    """With weights drawn anew from the seed: norms stay, biases are drawn too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" not in name:
                weight.normal_(0.0, model.config.initializer_range, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
