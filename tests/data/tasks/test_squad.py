"""Questions about texts: files read, answers windows again through tokens and windows, predictions joined."""

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
import toy_families
import toy_heads
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.config.schema import TaskDataConfig
from lad_dist.data.tasks.examples import QuestionExamples, tokenize
from lad_dist.data.tasks.squad import Answer, AnswerWindows, Questions, find_answers
from lad_dist.data.tasks.task import Task, load_task
from lad_dist.data.tokenization.encoding import encode_windows
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer
from lad_dist.objectives.losses import hard_label_loss

FAMILIES = ["bert", "roberta", "albert", "xlm-roberta", "deberta-v2"]


def own(train: Any, dev: Any, folder: Path) -> Task:
    places = {}
    for name, value in (("train", train), ("dev", dev)):
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        places[name] = str(folder / f"{name}.json")
    return load_task(TaskDataConfig.model_validate({**places, "kind": "question_answering"}))


def article(context: str, *questions: dict[str, Any]) -> dict[str, Any]:
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def qa(*answers: tuple[str, int], **rest: Any) -> dict[str, Any]:
    entries = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": "1", "question": " Who? ", "answers": entries, **rest}


GOOD = article("Ada went to Rome.", qa(("Ada", 0), ("Ada went", 0)), qa(("Rome", 12), is_impossible=False))
LACKING = article("Ada went to Rome.", qa(is_impossible=True), qa())


def test_both_versions_are_read(tmp_path: Path) -> None:
    task = own(GOOD, GOOD, tmp_path)
    assert task.metrics == ("f1", "exact_match")
    assert task.outputs == ("start", "end")
    assert task.train == Questions(
        ["Who?", "Who?"],
        ["Ada went to Rome."] * 2,
        [[Answer("Ada", 0), Answer("Ada went", 0)], [Answer("Rome", 12)]],
        False,
    )
    second = own(GOOD, LACKING, tmp_path)
    assert second.metrics == ("f1", "exact_match", "f1_unanswerable")  # dev has no others
    assert second.train.unanswerable
    assert second.dev["dev"].answers == [[], []]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedTokenizerFast]:
    return cache(lambda family: load_tokenizer(toy_families.tokenizer(family, tmp_path_factory.mktemp("w") / family)))


CONTEXT = "  " + "\n\n".join(toy.sentence(n, most=30) for n in range(8)) + " (Ban-Derté, fi) \t"


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(begin=st.integers(0, 60), count=st.integers(1, 2), stride=st.sampled_from([10, 14]), long=st.booleans())
def test_every_answer_in_a_window_is_read_back(
    family: str, begin: int, count: int, stride: int, long: bool, words: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    """From characters to tokens to the text again, whatever the tokenizer; an answer is as short as the stride."""
    places = [(n, n + len(w)) for n, w in _words_of(CONTEXT)]
    first = begin % (len(places) - 2)
    answer = Answer(CONTEXT[places[first][0] : places[first + count - 1][1]], places[first][0])
    raw = Questions(["ban dert " * (9 if long else 1)], [CONTEXT], [[answer]], False)
    data = TaskDataConfig(train="x", dev="x", kind="question_answering", max_length=32, doc_stride=stride)
    task = Task("t", "question_answering", (), ("f1", "exact_match"), raw, {})
    tokenizer = words(family)
    if len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) > stride - 1:
        return
    examples = QuestionExamples(task, raw, tokenizer, data, "it", None)
    batch = examples.batch(np.arange(examples.count))
    assert batch.lengths.max() <= 32
    assert batch.labels.sum(dim=0).tolist() == [examples.count] * 2
    # The rows with the answer win over the first tokens, which no answer means.
    logits = batch.labels.numpy() * 10
    assert (logits[examples._places.starts[:-1], 0] == 0).any()
    assert examples.answers(logits) == [answer.text]
    assert examples.score(logits) == {"f1": 1.0, "exact_match": 1.0}
    assert examples.loyalty(logits, logits) == {"label_loyalty": 1.0, "probability_loyalty": pytest.approx(1)}
    trained = hard_label_loss(torch.from_numpy(logits / 5), batch, "question_answering")
    assert examples.loss(logits / 5) == pytest.approx(trained.item(), rel=1e-5)


def _words_of(text: str) -> list[tuple[int, str]]:
    places, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        places.append((at, word))
        at += len(word)
    return places


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_hold_the_whole_context_and_overlap(
    family: str, words: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    tokenizer = words(family)
    windows = encode_windows(tokenizer, ["ban", "ban"], [CONTEXT, "dert"], 32, 10)
    assert windows.question.tolist() == [0] * (len(windows.question) - 1) + [1]
    first = [
        characters for characters, question in zip(windows.characters, windows.question, strict=True) if question == 0
    ]
    whole = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert [tuple(x) for x in first[0]] == [tuple(x) for x in whole[: len(first[0])]]
    assert tuple(first[-1][-1]) == tuple(whole[-1])
    for before, after in pairwise(first):
        assert before[-10:].tolist() == after[:10].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_of_any_length_leaves_room_for_any_stride(
    family: str, words: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    """The beginning of a question may be read as more tokens than it was as a part of it."""
    for length in (8, 9, 16, 17):
        windows = encode_windows(words(family), ["which of the many red dogs?"], [CONTEXT], length, length // 2 - 1)
        assert max(map(len, windows.encoded.ids)) <= length
        read = {
            place
            for characters in windows.characters
            for begin, end in characters.tolist()
            for place in range(begin, end)
        }
        assert read >= {place for place, character in enumerate(CONTEXT) if not character.isspace()}


def test_answers_that_no_window_holds_are_reported(
    words: Callable[[str], PreTrainedTokenizerFast], capfd: pytest.CaptureFixture[str]
) -> None:
    text = toy.sentence(4) * 3
    raw = Questions(["ban"] * 3, [text] * 3, [[Answer(text, 0)], [Answer(text[:3], 0)], []], True)
    task = Task("t", "question_answering", (), (), raw, {})
    data = TaskDataConfig(train="x", dev="x", kind="question_answering", max_length=16)
    tokenize(task, raw, words("bert"), data, "toy's data")
    assert capfd.readouterr().err == (
        "toy's data: 1 of 3 answers are in no window as a whole; raise data.doc_stride or data.max_length\n"
    )


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5), st.booleans())
def test_the_best_stretch_of_all_windows_wins(seed: int, sizes: list[int], max_length: int, unanswerable: bool) -> None:
    """Against every pair of rows, one by one."""
    random = np.random.default_rng(seed)
    context = "abcdefghijklmnopqrstuvwxyz"
    starts = np.cumsum([0, *(size + 1 for size in sizes)])
    logits = random.normal(size=(starts[-1], 2))
    begins = random.integers(0, 20, size=starts[-1])
    rows = AnswerWindows(np.zeros(len(sizes), dtype=np.int64), starts, np.stack([begins, begins + 1], axis=1))
    best, text, none = -np.inf, "", np.inf
    for first, end in pairwise(starts):
        none = min(none, logits[first].sum())
        for i in range(first + 1, end):
            for j in range(i, min(i + max_length, end)):
                if logits[i, 0] + logits[j, 1] > best:
                    best, text = logits[i, 0] + logits[j, 1], context[begins[i] : begins[j] + 1]
    questions = Questions([""], [context], [[]], unanswerable)
    for threshold in (-1.0, 0.0, 1.0):
        expected = "" if unanswerable and none - best > threshold else text
        assert find_answers(logits, rows, questions, max_length, threshold) == [expected]


def test_a_toy_file_is_scored_perfectly_by_the_labels(
    tmp_path: Path, words: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    """Questions without answers are among them."""
    files = toy_heads.question_files(tmp_path, train=20, dev=20, length=60, unanswerable=True)
    data = TaskDataConfig.model_validate({**files, "max_length": 48, "doc_stride": 20})
    task = load_task(data)
    examples = tokenize(task, task.dev["dev"], words("bert"), data, "it")
    assert examples.count > 20
    assert set(examples.score(examples.labels * 20).values()) == {1.0}
