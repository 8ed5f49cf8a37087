"""Learnable tagging, question answering and labelling at toy size, as files of the user's own."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toy import WORDS, sentence

NAMES = [word for word in WORDS if word.startswith("ba")]
PLACES = [word for word in WORDS if word.startswith("fi")]
OTHERS = [word for word in WORDS if word not in NAMES + PLACES]
LABELS = {
    "tagging": ("B-LOC", "B-PER", "I-PER", "O"),
    "question_answering": ("start", "end"),
    "multilabel": ("ba", "fi", "lu"),
}


def tagged(seed: int, most: int = 8) -> tuple[list[str], list[str]]:
    """Words and tags: a run of names is one entity, a place is one by itself."""
    pick = random.Random(seed)
    words = pick.choices(NAMES + PLACES + OTHERS[:12], k=pick.randint(1, most))
    tags = ["B-LOC" if word in PLACES else "O" for word in words]
    for n, word in enumerate(words):
        if word in NAMES:
            tags[n] = "I-PER" if n and words[n - 1] in NAMES else "B-PER"
    return words, tags


def tagging_files(folder: Path, train: int = 120, dev: int = 30, most: int = 8) -> dict[str, str]:
    """A CoNLL file to train on, a .jsonl to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["-DOCSTART- -X- O", ""]
    for seed in range(train):
        lines += [f"{word} X {tag}" for word, tag in zip(*tagged(seed, most), strict=True)] + [""]
    (folder / "train.conll").write_text("\n".join(lines))
    rows = [dict(zip(("tokens", "tags"), tagged(10_000 + n, most), strict=True)) for n in range(dev)]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "tagging", "train": str(folder / "train.conll"), "dev": str(folder / "dev.jsonl")}


def entry(seed: int, length: int, unanswerable: bool) -> dict[str, Any]:
    """A paragraph: who is where in the text? A name and a place, or nobody."""
    pick = random.Random(seed)
    words = pick.choices(OTHERS, k=length)
    names = [pick.choice(NAMES), pick.choice(PLACES)]
    place = pick.randint(0, len(words))
    absent = unanswerable and seed % 3 == 0
    context = " ".join(words if absent else words[:place] + names + words[place:])
    text = " ".join(names)
    answers = [] if absent else [{"text": text, "answer_start": context.index(text)}]
    question = {"id": str(seed), "question": " ".join(pick.choices(OTHERS, k=2)), "answers": answers}
    return {"context": context, "qas": [question]}


def squad(seeds: range, length: int = 14, unanswerable: bool = False) -> dict[str, Any]:
    return {"data": [{"title": "", "paragraphs": [entry(seed, length, unanswerable) for seed in seeds]}]}


def question_files(
    folder: Path, train: int = 120, dev: int = 30, length: int = 14, unanswerable: bool = False
) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, seeds in (("train", range(train)), ("dev", range(10_000, 10_000 + dev))):
        (folder / f"{name}.json").write_text(json.dumps(squad(seeds, length, unanswerable)))
    return {"kind": "question_answering", "train": str(folder / "train.json"), "dev": str(folder / "dev.json")}


def labelled(seed: int) -> tuple[str, list[str]]:
    """A text, and the first syllables of its words that are labels: none, or several."""
    text = sentence(seed, most=5)
    return text, [label for label in LABELS["multilabel"] if label in text]


def multilabel_files(folder: Path, train: int = 120, dev: int = 30) -> dict[str, str]:
    """A .csv with names in one column to train on, a .jsonl with lists of them to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(text, "|".join(labels)) for text, labels in map(labelled, range(train))]
    (folder / "train.csv").write_text("text,label\n" + "".join(f"{text},{cell}\n" for text, cell in rows))
    rows_of_dev = [dict(zip(("text", "label"), labelled(10_000 + n), strict=True)) for n in range(dev)]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_dev))
    return {"kind": "multilabel", "train": str(folder / "train.csv"), "dev": str(folder / "dev.jsonl")}


MAKE_FILES: dict[str, Callable[..., dict[str, str]]] = {
    "tagging": tagging_files, "question_answering": question_files, "multilabel": multilabel_files,
}  # fmt: skip
