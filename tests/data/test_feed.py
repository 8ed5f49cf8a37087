from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_text import WORDS, sentence

from lad_dist.config import CorpusData, PrepareConfig, TaskData, UserError
from lad_dist.data import tokenizers
from lad_dist.data.feed import CorpusFeed, TaskFeed
from lad_dist.data.prepare import prepare
from lad_dist.data.shards import Shards
from lad_dist.data.tasks import Examples, Task, load_task
from lad_dist.flat import Batch

pytest_plugins = ["data_fixtures"]


@pytest.fixture
def shards(tmp_path: Path, toy_corpus: Path, toy_tokenizer_folder: Path) -> Path:
    config = {
        "out": str(tmp_path / "shards"),
        "tokenizer": str(toy_tokenizer_folder),
        "held_out": 0.2,
        "source": [{"kind": "text", "path": str(toy_corpus)}],
    }
    prepare(PrepareConfig.model_validate(config), lambda _: None)
    return tmp_path / "shards"


def corpus_data(shards: Path, **rest: object) -> CorpusData:
    return CorpusData.model_validate(
        {"shards": str(shards), "max_length": 16, "tokens_per_slot": 64, "slots": 3} | rest
    )


def toy_task(count: int, pairs: bool = True) -> Task:
    def examples(count: int) -> Examples:
        texts = [sentence(i, 1 + i % 9) for i in range(count)]
        return Examples(texts, [sentence(i + 5, 3) for i in range(count)] if pairs else None, np.arange(count) % 2)

    return Task("toy", "classification", ("no", "yes"), ("accuracy",), examples(count), {"dev": examples(150)})


def task_data(**rest: object) -> TaskData:
    return TaskData.model_validate({"task": "rte", "max_length": 16, "examples_per_slot": 4, "slots": 3} | rest)


def same(a: Batch, b: Batch) -> bool:
    return all(
        x.equal(y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def sequences_in(batch: Batch) -> list[list[int]]:
    """The batch's sequences with the masks undone."""
    ids = batch.input_ids.clone()
    ids[batch.rows] = batch.labels
    bounds = batch.cu_seqlens.tolist()
    return [ids[begin:end].tolist() for begin, end in pairwise(bounds)]


def test_an_epoch_of_a_corpus_is_the_corpus_with_some_tokens_masked(shards: Path, toy_tokenizer) -> None:
    feed = CorpusFeed(corpus_data(shards), toy_tokenizer, seed=1)
    slots = round(feed.steps_per_epoch * feed.slots)
    batches = [feed.batch(*divmod(number, 3)) for number in range(slots)]
    assert all(batch.tokens <= 64 for batch in batches)
    read = sorted(sequence for batch in batches for sequence in sequences_in(batch))
    documents = Shards(shards)
    expected = []
    for number, length in enumerate(documents.lengths.tolist()):
        pieces = [documents.tokens(number, at, min(at + 14, length)).tolist() for at in range(0, length, 14)]
        expected += [[toy_tokenizer.cls_token_id, *piece, toy_tokenizer.sep_token_id] for piece in pieces]
    assert read == sorted(expected)
    share = sum(len(batch.rows) for batch in batches) / sum(batch.tokens for batch in batches)
    assert 0.1 < share < 0.25
    hidden = torch.cat([batch.input_ids[batch.rows] for batch in batches])
    assert (hidden == toy_tokenizer.mask_token_id).float().mean() > 0.7


def test_corpus_batches_are_functions_of_seed_step_and_slot(shards: Path, toy_tokenizer) -> None:
    feed = CorpusFeed(corpus_data(shards), toy_tokenizer, seed=1)
    asked = [(9, 2), (0, 0), (4, 1), (9, 2), (30, 0)]
    first = [feed.batch(*place) for place in asked]
    assert same(first[0], first[3])
    again = CorpusFeed(corpus_data(shards), toy_tokenizer, seed=1)
    assert all(same(again.batch(*place), batch) for place, batch in zip(asked, first, strict=True))
    assert not same(CorpusFeed(corpus_data(shards), toy_tokenizer, seed=2).batch(0, 0), first[1])


def test_masks_change_from_epoch_to_epoch(shards: Path, toy_tokenizer) -> None:
    feed = CorpusFeed(corpus_data(shards, tokens_per_slot=100_000, slots=1), toy_tokenizer, seed=0)
    assert feed.steps_per_epoch == 1
    masks = []
    for epoch in (0, 1):
        batch = feed.batch(epoch, 0)
        hidden = torch.zeros_like(batch.input_ids)
        hidden[batch.rows] = 1
        bounds = batch.cu_seqlens.tolist()
        spans = [hidden[a:b].tolist() for a, b in pairwise(bounds)]
        masks.append(dict(zip(map(tuple, sequences_in(batch)), spans, strict=True)))
    assert masks[0].keys() == masks[1].keys()
    changed = sum(masks[0][sequence] != masks[1][sequence] for sequence in masks[0])
    assert changed > 0.7 * len(masks[0])


def test_held_out_batches_are_the_same_in_every_run(shards: Path, toy_tokenizer) -> None:
    first, second = (CorpusFeed(corpus_data(shards), toy_tokenizer, seed).held_out() for seed in (1, 2))
    assert len(first) > 1
    assert all(same(a(), b()) for a, b in zip(first, second, strict=True))
    assert same(first[0](), first[0]())
    tokens = sum(sum(len(sequence) - 2 for sequence in sequences_in(batch())) for batch in first)
    assert tokens == Shards(shards, "held_out").lengths.sum()


def test_at_most_32_held_out_slots(shards: Path, toy_tokenizer) -> None:
    feed = CorpusFeed(corpus_data(shards, max_length=8, tokens_per_slot=8), toy_tokenizer, seed=0)
    assert len(feed.held_out()) == 32


def test_nothing_held_out(tmp_path: Path, toy_corpus: Path, toy_tokenizer_folder: Path, toy_tokenizer) -> None:
    config = {
        "out": str(tmp_path / "all"),
        "tokenizer": str(toy_tokenizer_folder),
        "held_out": 0.0,
        "source": [{"kind": "text", "path": str(toy_corpus)}],
    }
    prepare(PrepareConfig.model_validate(config), lambda _: None)
    assert CorpusFeed(corpus_data(tmp_path / "all"), toy_tokenizer, seed=0).held_out() == []


def test_another_tokenizer_is_refused(shards: Path, tmp_path: Path) -> None:
    tokenizers.train_wordpiece([" ".join(WORDS[:10])] * 50, 100, tmp_path / "other")
    other = tokenizers.load_tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match=r"shards: made with another tokenizer; use the one in .*tokenizer"):
        CorpusFeed(corpus_data(shards), other, seed=0)
    its_own = tokenizers.load_tokenizer(Shards(shards).tokenizer_folder)
    CorpusFeed(corpus_data(shards), its_own, seed=0)


def test_a_slot_too_small_for_a_sequence_is_refused(shards: Path, toy_tokenizer) -> None:
    with pytest.raises(UserError, match="tokens_per_slot = 64 is less than max_length = 65"):
        CorpusFeed(corpus_data(shards, max_length=65), toy_tokenizer, seed=0)


@pytest.mark.parametrize("pairs", [True, False])
def test_task_batches_are_what_the_tokenizer_says(toy_tokenizer, pairs: bool) -> None:
    task = toy_task(10, pairs)
    feed = TaskFeed(task_data(), task, toy_tokenizer, seed=0)
    assert feed.steps_per_epoch == 10 / 12
    expected = toy_tokenizer(task.train.texts, task.train.pairs, truncation=True, max_length=16)["input_ids"]
    seen = []
    for number in range(5):  # two epochs of ten examples in fours
        batch = feed.batch(*divmod(number, 3))
        assert batch.input_ids[batch.rows].tolist() == [toy_tokenizer.cls_token_id] * 4
        bounds = batch.cu_seqlens.tolist()
        rows = [batch.input_ids[a:b].tolist() for a, b in pairwise(bounds)]
        seen += list(zip(rows, batch.labels.tolist(), strict=True))
        assert (batch.token_type_ids.sum() > 0) == pairs
    assert batch.labels.dtype == torch.int64
    assert sorted(seen) == sorted(list(zip(expected, task.train.labels.tolist(), strict=True)) * 2)


def test_dev_batches_are_in_order_flat_and_small(toy_tokenizer) -> None:
    task = toy_task(10)
    feed = TaskFeed(task_data(pad_to=20), task, toy_tokenizer, seed=0)
    batches = [make() for make in feed.dev["dev"]]
    assert [len(batch.labels) for batch in batches] == [64, 64, 22]
    assert torch.cat([batch.labels for batch in batches]).tolist() == task.dev["dev"].labels.tolist()
    assert all(batch.tokens == len(batch.input_ids) for batch in batches)
    assert same(feed.dev["dev"][1](), batches[1])


def test_padding_as_a_data_option(toy_tokenizer) -> None:
    flat, padded = (TaskFeed(task_data(pad_to=p), toy_task(10), toy_tokenizer, 0).batch(1, 1) for p in (None, 20))
    assert padded.input_ids.shape == (80,)
    assert padded.tokens == flat.tokens
    assert padded.labels.equal(flat.labels)
    assert padded.lengths.equal(flat.lengths)
    assert padded.input_ids.view(4, 20)[padded.attended].equal(flat.input_ids)
    assert (padded.input_ids.view(4, 20)[~padded.attended] == toy_tokenizer.pad_token_id).all()


def test_task_batches_are_functions_of_seed_step_and_slot(toy_tokenizer) -> None:
    feeds = [TaskFeed(task_data(), toy_task(50), toy_tokenizer, seed) for seed in (0, 0, 1)]
    feeds[0].batch(20, 0)
    assert same(feeds[0].batch(3, 2), feeds[1].batch(3, 2))
    assert not same(feeds[0].batch(3, 2), feeds[2].batch(3, 2))


def test_a_task_that_the_tokenizer_does_not_know_is_refused(toy_tokenizer) -> None:
    unknown = Examples(["ζωή και the"] * 20, None, np.arange(20) % 2)
    task = toy_task(10)._replace(train=unknown)
    with pytest.raises(UserError, match=r"toy's training data: 40 of the first 60 tokens are \[UNK\]"):
        TaskFeed(task_data(), task, toy_tokenizer, seed=0)


@pytest.mark.data
def test_real_task_through_a_tokenizer_of_its_own(real_data: Path, tmp_path: Path) -> None:
    data = TaskData(task="stsb", path=str(real_data / "glue"), max_length=64, examples_per_slot=32)
    task = load_task(data)
    tokenizers.train_wordpiece([*task.train.texts, *(task.train.pairs or [])], 2000, tmp_path / "tokenizer")
    feed = TaskFeed(data, task, tokenizers.load_tokenizer(tmp_path / "tokenizer"), seed=0)
    assert feed.steps_per_epoch == 5749 / 32
    assert feed.batch(0, 0).labels.dtype == torch.float32
    assert sum(len(make().labels) for make in feed.dev["dev"]) == 1500
