"""Sentences with tags: files read, every word with a row of its own, long sentences cut between words."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import toy_families
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TaskDataConfig
from lad_dist.data.tasks.examples import TaggingExamples, split_sentence, tokenize
from lad_dist.data.tasks.task import Task, check_task, load_task
from lad_dist.data.tokenization.encoding import EncodedWords, encode_words
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import special_token_frame

pytest_plugins = ["data_fixtures"]

FAMILIES = ["bert", "roberta", "albert", "xlm-roberta"]
GOOD = "Ada B-PER\nwent O\n\nto O\nRome B-LOC\n"


def own(train: Path, dev: Path, **rest: object) -> Task:
    return load_task(TaskDataConfig.model_validate({"train": str(train), "dev": str(dev), "kind": "tagging", **rest}))


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_conll_and_jsonl_give_the_same_sentences(tmp_path: Path) -> None:
    """Columns by blanks or tabs, empty lines that hold blanks, no empty line at the end, marks between documents.

    Comments have as many columns as words, or others; a word may be a # and hold a no-break space.
    """
    conll = written(
        tmp_path / "a.CONLL",
        "-DOCSTART- -X- O\n\n# id domain=en\n# text = x\nAda\u00a0L. NNP B-PER\nwent VBD O\n\n\n"
        "-DOCSTART- -X- O\n \n# newdoc id = y\n# SYM O\nto\tTO\tO\nNew York\tNNP\tB-LOC",
    )
    rows = [
        {"tokens": ["Ada\u00a0L.", "went"], "tags": ["B-PER", "O"]},
        {"tokens": ["#", "to", "New York"], "tags": ["O", "O", "B-LOC"]},
    ]
    lines = written(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = own(conll, lines)
    assert task.label_names == ("B-LOC", "B-PER", "O")
    for sentences in (task.train, task.dev["dev"]):
        assert sentences.words == [row["tokens"] for row in rows]
        assert [tags.tolist() for tags in sentences.tags] == [[1, 2], [2, 2, 0]]


@pytest.mark.parametrize(
    ("tags", "metrics"),
    [
        ("B-PER I-PER O", ("f1", "precision", "recall", "accuracy")),
        ("S-PER B-X I-X E-X O", ("f1", "precision", "recall", "accuracy")),
        ("U-PER L-geo-loc O", ("f1", "precision", "recall", "accuracy")),
        ("B I O", ("f1", "precision", "recall", "accuracy")),
        ("NOUN VERB O", ("accuracy",)),
        ("0 1 2", ("accuracy",)),
    ],
)
def test_entities_are_counted_where_tags_mark_them(tags: str, metrics: tuple[str, ...], tmp_path: Path) -> None:
    file = written(tmp_path / "a.txt", "".join(f"word {tag}\n" for tag in tags.split()))
    assert own(file, file).metrics == metrics


def test_a_tag_that_training_does_not_have_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path / "train.bio", GOOD)
    dev = written(tmp_path / "dev.bio", "Ada B-PERS\n")
    with pytest.raises(UserError, match=r'dev\.bio:1: label "B-PERS" is unknown: did you mean "B-PER"\?'):
        own(train, dev)
    with pytest.raises(UserError, match=r"nowhere\.bio: no such file"):
        check_task(TaskDataConfig(train=str(train), dev=str(tmp_path / "nowhere.bio"), kind="tagging"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_has_a_first_token(family: str, tmp_path: Path) -> None:
    """Also words that a tokenizer leaves out, and long ones.

    The tokens from one first token to the next decode to the word.
    """
    words = load_tokenizer(toy_families.tokenizer(family, tmp_path))
    sentences = [["ban", "dert"], ["\x01", "fisk", "\x01", "\x02"], ["gompban" * 4, "ne"], ["lud"] * 30, [" "]]
    for sentence, encoded in zip(sentences, encode_words(words, sentences), strict=True):
        assert len(encoded.firsts) == len(sentence)
        assert (np.diff(encoded.firsts) > 0).all()
        assert encoded.firsts[-1] < len(encoded.ids)
        for word, (begin, end) in zip(sentence, pairwise([*encoded.firsts.tolist(), len(encoded.ids)]), strict=True):
            text = words.decode(encoded.ids[begin:end]).replace(" ", "").replace("##", "")
            assert text.strip() == word.strip() or encoded.ids[begin] == words.unk_token_id


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_parts_of_a_sentence_cover_all_words_and_fit(sizes: list[int], room: int) -> None:
    """More tokens than fit are only in a stretch of one word."""
    firsts = np.cumsum([0, *sizes])
    borders = split_sentence(EncodedWords(np.zeros(firsts[-1], dtype=np.int32), firsts[:-1]), room)
    assert (borders[0], borders[-1]) == (0, len(sizes))
    for begin, end in pairwise(borders):
        assert begin < end
        assert sum(sizes[begin:end]) <= room or end - begin == 1


def test_long_sentences_are_cut_between_words_and_none_is_lost(toy_tokenizer, tmp_path: Path) -> None:
    long = [("the", "O"), ("and", "B-X")] * 40 + [("andthe" * 20, "O")] + [("and", "B-X")]
    file = written(tmp_path / "a.bio", "".join(f"{word} {tag}\n" for word, tag in long) + "\nthe O\n")
    data = TaskDataConfig(train=str(file), dev=str(file), kind="tagging", max_length=16)
    task = load_task(data)
    examples = tokenize(task, task.train, toy_tokenizer, data, "it")
    assert isinstance(examples, TaggingExamples)
    special = special_token_frame(toy_tokenizer)
    tags = [tag for _, tag in long] + ["O"]
    assert examples.labels.tolist() == [task.label_names.index(tag) for tag in tags]
    batch = examples.batch(np.arange(examples.count))
    assert batch.lengths.max() <= 16
    assert len(batch.head_positions) == len(tags)
    assert (np.diff(batch.head_positions.numpy()) > 0).all()
    read = batch.input_ids[batch.head_positions]
    expected = [toy_tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("the", "and")]
    assert read[:80].tolist() == expected * 40
    ends = batch.cu_seqlens[1:].long() - 1
    assert (batch.input_ids[ends] == int(special.after[0])).all()
    assert examples.score(np.eye(2)[examples.labels]) == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
