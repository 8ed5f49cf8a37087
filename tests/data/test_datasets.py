"""Micro-batches of a corpus and of a task: what they hold, and that (seed, step, micro-batch) decide it."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from toy_shards import Documents, write_shards
from toy_text import WORDS, sentence

from lad_dist.config.errors import UserError
from lad_dist.config.schema import CorpusDataConfig, TaskDataConfig
from lad_dist.core.batch import Batch
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.data.sampling import num_windows
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.task import Task, load_task
from lad_dist.data.tokenization.algorithms import train_wordpiece
from lad_dist.data.tokenization.loading import load_tokenizer

pytest_plugins = ["data_fixtures"]


def documents_of(lengths: list[int]) -> list[list[int]]:
    """No two tokens that follow each other occur together again nearby."""
    stream = iter(range(10**6))
    return [[5 + next(stream) % 100 for _ in range(length)] for length in lengths]


MANY = documents_of([1, 30, 7, 14, 2, 90, 3, 3, 1, 28, 12, 44, 5, 61, 16])


@pytest.fixture
def shards(tmp_path: Path, toy_tokenizer) -> Path:
    return write_shards(tmp_path / "shards", toy_tokenizer, {"a": MANY, "b": documents_of([33, 8])}, MANY[:6])


def corpus_data(shards: Path, **rest: object) -> CorpusDataConfig:
    return CorpusDataConfig.model_validate(
        {"shards": str(shards), "max_length": 16, "micro_batch_tokens": 64, "micro_batches_per_step": 3} | rest
    )


def toy_task(count: int, pairs: bool = True) -> Task:
    def examples(count: int) -> Texts:
        texts = [sentence(i, 1 + i % 9) for i in range(count)]
        return Texts(texts, [sentence(i + 5, 3) for i in range(count)] if pairs else None, np.arange(count) % 2)

    return Task("toy", "classification", ("no", "yes"), ("accuracy",), examples(count), {"dev": examples(150)})


def task_data(**rest: object) -> TaskDataConfig:
    return TaskDataConfig.model_validate(
        {"task": "rte", "max_length": 16, "micro_batch_size": 4, "micro_batches_per_step": 3} | rest
    )


def same(a: Batch, b: Batch) -> bool:
    return all(
        x.equal(y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def sequences_in(batch: Batch) -> list[list[int]]:
    """Return the batch's sequences with the masked tokens restored."""
    ids = batch.input_ids.clone()
    ids[batch.head_positions] = batch.labels
    return [ids[begin:end].tolist() for begin, end in pairwise(batch.cu_seqlens.tolist()) if end > begin]


def pairs_of(documents: Documents) -> Counter[tuple[int, int]]:
    return Counter(pair for document in documents for pair in pairwise(document))


def epoch_of(dataset: CorpusDataset, epoch: int = 0) -> list[Batch]:
    count = round(dataset.steps_per_epoch * dataset.micro_batches_per_step)
    return [
        dataset.batch(*divmod(number, dataset.micro_batches_per_step))
        for number in range(epoch * count, (epoch + 1) * count)
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_length=st.integers(8, 20),
    seed=st.integers(0, 99),
)
def test_an_epoch_of_a_corpus_is_the_corpus(
    lengths: list[int], max_length: int, seed: int, tmp_path_factory: pytest.TempPathFactory, toy_tokenizer
) -> None:
    """Each token once, in sequences of one document, in order, cut as seldom as windows are."""
    documents = documents_of(lengths)
    folder = write_shards(tmp_path_factory.mktemp("shards"), toy_tokenizer, {"a": documents})
    dataset = CorpusDataset(
        corpus_data(folder, max_length=max_length, micro_batch_tokens=max_length), toy_tokenizer, seed
    )
    batches = epoch_of(dataset)
    sequences = [sequence for batch in batches for sequence in sequences_in(batch)]
    assert all((sequence[0], sequence[-1]) == (2, 3) for sequence in sequences)
    content = [sequence[1:-1] for sequence in sequences]
    assert all(0 < len(text) <= max_length - 2 for text in content)
    assert not {2, 3} & {token for text in content for token in text}
    assert Counter(t for text in content for t in text) == Counter(t for document in documents for t in document)
    missing = pairs_of(documents) - pairs_of(content)
    assert not pairs_of(content) - pairs_of(documents)
    assert missing.total() == len(sequences) - len(documents) < len(batches)
    for batch in batches:
        assert batch.num_tokens <= max_length


def test_micro_batches_hold_windows_and_masks(shards: Path, toy_tokenizer) -> None:
    batches = epoch_of(CorpusDataset(corpus_data(shards), toy_tokenizer, seed=1))
    assert all(50 < batch.num_tokens <= 64 for batch in batches)
    assert {len(batch.head_positions) for batch in batches} == {4 * 2}  # 15 % of the 12 to 13 tokens in a window
    masked = torch.cat([batch.input_ids[batch.head_positions] for batch in batches])
    assert (masked == toy_tokenizer.mask_token_id).float().mean() > 0.7
    for batch in batches:
        bounds = set(batch.cu_seqlens.tolist()) | {end - 1 for end in batch.cu_seqlens.tolist()}
        assert not bounds & set(batch.head_positions.tolist())


def test_batches_have_one_shape(tmp_path: Path, toy_tokenizer) -> None:
    """Compiled code that sees them is compiled once."""
    documents = documents_of(list(np.random.default_rng(0).integers(1, 200, 60)))
    folder = write_shards(tmp_path / "shards", toy_tokenizer, {"a": documents, "b": MANY})
    batches = epoch_of(CorpusDataset(corpus_data(folder, micro_batches_per_step=1), toy_tokenizer, seed=0))
    assert len(batches) > 50
    shapes = {
        (
            b.computed_tokens,
            *(len(x) for x in (b.cu_seqlens, b.lengths, b.head_positions, b.labels)),
            *b.sequence_ids.shape,
        )
        for b in batches
    }
    assert len(shapes) == 1


def test_a_sequence_may_run_on_into_the_next_document(shards: Path, toy_tokenizer) -> None:
    data = corpus_data(shards, cross_documents=True)
    batches = epoch_of(CorpusDataset(data, toy_tokenizer, seed=1))
    sequences = [sequence for batch in batches for sequence in sequences_in(batch)]
    assert {int((batch.lengths > 0).sum()) for batch in batches} == {4}
    assert all((sequence[0], sequence[-1]) == (2, 3) for sequence in sequences)
    plain = epoch_of(CorpusDataset(corpus_data(shards), toy_tokenizer, seed=1))
    plain_sequences = [sequence for batch in plain for sequence in sequences_in(batch)]
    assert sum(map(len, sequences)) == sum(map(len, plain_sequences))
    assert Counter(token for s in sequences for token in s) == Counter(token for s in plain_sequences for token in s)


def test_corpus_batches_are_functions_of_seed_step_and_micro_batch(shards: Path, toy_tokenizer) -> None:
    dataset = CorpusDataset(corpus_data(shards), toy_tokenizer, seed=1)
    places = [(9, 2), (0, 0), (4, 1), (9, 2), (30, 0)]
    first = [dataset.batch(*place) for place in places]
    assert same(first[0], first[3])
    again = CorpusDataset(corpus_data(shards), toy_tokenizer, seed=1)
    assert all(same(again.batch(*place), batch) for place, batch in zip(places, first, strict=True))
    assert not same(CorpusDataset(corpus_data(shards), toy_tokenizer, seed=2).batch(0, 0), first[1])


def masks_of(batches: list[Batch]) -> dict[tuple[int, ...], list[int]]:
    masked = [torch.zeros_like(batch.input_ids).index_fill(0, batch.head_positions, 1) for batch in batches]
    return {
        tuple(sequence): mask[a:b].tolist()
        for batch, mask in zip(batches, masked, strict=True)
        for sequence, (a, b) in zip(sequences_in(batch), pairwise(batch.cu_seqlens.tolist()), strict=False)
    }


def test_masks_belong_to_the_window_and_change_from_epoch_to_epoch(tmp_path: Path, toy_tokenizer) -> None:
    folder = write_shards(tmp_path / "shards", toy_tokenizer, {"a": documents_of([14 * 20 - 2])})
    one, other = (
        CorpusDataset(
            corpus_data(folder, micro_batch_tokens=16 * n, micro_batches_per_step=20 // n), toy_tokenizer, seed=0
        )
        for n in (1, 4)
    )
    first, second = (masks_of(epoch_of(one, epoch)) for epoch in (0, 1))
    assert len(first) == 20
    assert first == masks_of(epoch_of(other))
    assert first.keys() == second.keys()
    assert sum(first[sequence] != second[sequence] for sequence in first) > 14


def test_whole_words_are_masked(tmp_path: Path, toy_tokenizer) -> None:
    text = toy_tokenizer.encode(" ".join(["zebra fox"] * 40), add_special_tokens=False)  # z ##e ##b ##r ##a fox
    folder = write_shards(tmp_path / "shards", toy_tokenizer, {"a": [text]})
    data = corpus_data(folder, max_length=62, micro_batch_tokens=62, mlm_probability=0.2, whole_word_mask=True)
    for batch in epoch_of(CorpusDataset(data, toy_tokenizer, seed=0)):
        (ids,) = sequences_in(batch)
        words = [set(range(at, at + 5)) for at in range(len(ids) - 5) if ids[at] == text[0]]
        chosen = set(batch.head_positions.tolist())
        cut = [word for word in words if chosen & word and not word <= chosen]
        assert len(cut) <= 1


@pytest.mark.parametrize("weights", [{}, {"b": 3.0}, {"a": 0.5, "b": 2.0}])
def test_a_source_is_read_as_often_as_the_weight_says(tmp_path: Path, toy_tokenizer, weights: dict[str, float]) -> None:
    one, two = [5, 6] * 7 * 50, [7, 8] * 7 * 20
    folder = write_shards(tmp_path / "shards", toy_tokenizer, {"a": [one], "b": [two]}, weights={"b": 2.0})
    data = corpus_data(folder, max_length=16, micro_batch_tokens=16, micro_batches_per_step=1, source_weights=weights)
    batches = epoch_of(CorpusDataset(data, toy_tokenizer, seed=0))
    sources = Counter(5 in sequences_in(batch)[0] for batch in batches)
    expected = {"a": 1.0, "b": 2.0, **weights}
    assert sources[True] == pytest.approx(num_windows(len(one) + 2, 14) * expected["a"], abs=1)
    assert sources[False] == pytest.approx(num_windows(len(two) + 2, 14) * expected["b"], abs=1)


def test_a_weight_for_no_source_is_refused(shards: Path, toy_tokenizer) -> None:
    with pytest.raises(UserError, match=r'data\.source_weights: no source "c" in .*shards; choose from a, b'):
        CorpusDataset(corpus_data(shards, source_weights={"c": 1.0}), toy_tokenizer, 0)


def test_held_out_batches_are_the_same_in_every_run(shards: Path, toy_tokenizer) -> None:
    first, second = (CorpusDataset(corpus_data(shards), toy_tokenizer, seed).held_out for seed in (1, 2))
    assert len(first) > 1
    assert all(same(a(), b()) for a, b in zip(first, second, strict=True))
    assert same(first[0](), first[0]())


def test_at_most_32_held_out_micro_batches(tmp_path: Path, toy_tokenizer) -> None:
    folder = write_shards(tmp_path / "shards", toy_tokenizer, {"a": MANY}, documents_of([1000]))
    dataset = CorpusDataset(corpus_data(folder, max_length=8, micro_batch_tokens=8), toy_tokenizer, seed=0)
    assert len(dataset.held_out) == 32


def test_nothing_held_out(tmp_path: Path, toy_tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path / "all", toy_tokenizer, {"a": MANY})
    assert CorpusDataset(corpus_data(folder), toy_tokenizer, seed=0).held_out == []
    assert caplog.messages[0].startswith(f"{folder}: no document is held out, so nothing is evaluated")


def test_another_tokenizer_is_refused(shards: Path, tmp_path: Path) -> None:
    train_wordpiece([" ".join(WORDS[:10])] * 50, 100, tmp_path / "other")
    other = load_tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match=r"shards: prepared with another tokenizer; use the one in .*tokenizer"):
        CorpusDataset(corpus_data(shards), other, seed=0)


def test_micro_batch_tokens_that_are_no_multiple_of_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens = 64 is no multiple of max_length = 20; 60 is"):
        corpus_data(Path("nowhere"), max_length=20)


BILLION = """
import sys, time
from lad_dist.config.schema import CorpusDataConfig
from lad_dist.data.datasets import CorpusDataset
from lad_dist.data.tokenization.loading import load_tokenizer
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
tokenizer = load_tokenizer(sys.argv[2])
data = CorpusDataConfig(shards=sys.argv[1], max_length=128, micro_batch_tokens=4096, micro_batches_per_step=64)
before, begin = peak(), time.perf_counter()
dataset = CorpusDataset(data, tokenizer, seed=1)
dataset.batch(400_000, 63)
print(dataset.steps_per_epoch * 64 * 32, time.perf_counter() - begin, peak() - before)
"""


def test_a_billion_sequences_start_anywhere_within_a_second_and_100_megabytes(
    tmp_path: Path, toy_tokenizer, toy_tokenizer_folder: Path
) -> None:
    """Files with holes: 250 GB of zeros, which occupy nothing."""
    folder = write_shards(tmp_path / "shards", toy_tokenizer, {"a": [[5]] * 4}, shard=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    split = manifest["sources"][0]["splits"]["train"]
    for shard in split["shards"]:
        shard["length"] = 126 * 250_000_000
        with open(folder / shard["file"], "r+b") as file:
            file.truncate(2 * shard["length"])
    split["tokens"] = 126 * 10**9
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-c", BILLION, str(folder), str(toy_tokenizer_folder)]
    sequences, seconds, kilobytes = map(float, subprocess.check_output(command, text=True).split())
    assert sequences == 10**9
    assert seconds < 1
    assert kilobytes < 100_000


@pytest.mark.parametrize("pairs", [True, False])
def test_task_batches_hold_the_ids_of_the_tokenizer(toy_tokenizer, pairs: bool) -> None:
    task = toy_task(10, pairs)
    dataset = TaskDataset(task_data(), task, toy_tokenizer, seed=0)
    assert dataset.steps_per_epoch == 10 / 12
    expected = toy_tokenizer(task.train.texts, task.train.pairs, truncation=True, max_length=16)["input_ids"]
    read = []
    for number in range(5):  # two epochs of ten examples in fours
        batch = dataset.batch(*divmod(number, 3))
        assert batch.input_ids[batch.head_positions].tolist() == [toy_tokenizer.cls_token_id] * 4
        bounds = batch.cu_seqlens.tolist()
        rows = [batch.input_ids[a:b].tolist() for a, b in pairwise(bounds)]
        read += list(zip(rows, batch.labels.tolist(), strict=True))
        assert (batch.token_type_ids.sum() > 0) == pairs
    assert batch.labels.dtype == torch.int64
    assert sorted(read) == sorted(list(zip(expected, task.train.labels.tolist(), strict=True)) * 2)


def test_dev_batches_are_in_order_flat_and_small(toy_tokenizer) -> None:
    task = toy_task(10)
    dataset = TaskDataset(task_data(pad_to=20), task, toy_tokenizer, seed=0)
    batches = [make() for make in dataset.dev["dev"].in_order()]
    assert [len(batch.labels) for batch in batches] == [64, 64, 22]
    assert torch.cat([batch.labels for batch in batches]).tolist() == task.dev["dev"].labels.tolist()
    assert all(batch.num_tokens == len(batch.input_ids) for batch in batches)
    assert same(dataset.dev["dev"].in_order()[1](), batches[1])


def test_classes_weigh_as_scikit_learn_balances_them_or_as_given(toy_tokenizer) -> None:
    task = toy_task(90)
    labels = np.array([0] * 60 + [1] * 30)
    task = task._replace(train=task.train._replace(labels=labels))
    balanced = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    for setting, weights in (("balanced", balanced), ([0.5, 4.0], [0.5, 4.0])):
        dataset = TaskDataset(task_data(class_weights=setting), task, toy_tokenizer, seed=0)
        batch = dataset.batch(0, 0)
        assert batch.row_weights is not None
        assert batch.row_weights.tolist() == pytest.approx([weights[label] for label in batch.labels.tolist()])
        assert next(iter(dataset.dev["dev"].in_order()))().row_weights is None
    assert TaskDataset(task_data(), task, toy_tokenizer, seed=0).batch(0, 0).row_weights is None


def test_a_label_weighs_where_an_example_has_it(toy_tokenizer) -> None:
    """As pos_weight of torch's BCEWithLogitsLoss; balanced, examples with a label count as those without it."""
    labels = np.zeros((90, 3), dtype=np.float32)
    labels[:30, 0] = labels[:60, 1] = 1
    task = toy_task(90)
    task = task._replace(kind="multilabel", train=task.train._replace(labels=labels))
    task = task._replace(label_names=("a", "b", "c"), dev={"dev": task.train})
    for setting, weights in (("balanced", [2.0, 0.5, 90.0]), ([3.0, 4.0, 5.0], [3.0, 4.0, 5.0])):
        batch = TaskDataset(task_data(class_weights=setting), task, toy_tokenizer, seed=0).batch(0, 0)
        assert batch.row_weights is not None
        assert batch.row_weights.tolist() == torch.where(batch.labels > 0, torch.tensor(weights), 1.0).tolist()
        assert batch.labels.shape == (len(batch.head_positions), 3)


def test_padding_as_a_data_option(toy_tokenizer) -> None:
    flat, padded = (TaskDataset(task_data(pad_to=p), toy_task(10), toy_tokenizer, 0).batch(1, 1) for p in (None, 20))
    assert padded.input_ids.shape == (80,)
    assert padded.num_tokens == flat.num_tokens
    assert padded.labels.equal(flat.labels)
    assert padded.lengths.equal(flat.lengths)
    assert padded.input_ids.view(4, 20)[padded.is_token].equal(flat.input_ids)
    assert (padded.input_ids.view(4, 20)[~padded.is_token] == toy_tokenizer.pad_token_id).all()


def test_task_batches_are_functions_of_seed_step_and_micro_batch(toy_tokenizer) -> None:
    datasets = [TaskDataset(task_data(), toy_task(50), toy_tokenizer, seed) for seed in (0, 0, 1)]
    datasets[0].batch(20, 0)
    assert same(datasets[0].batch(3, 2), datasets[1].batch(3, 2))
    assert not same(datasets[0].batch(3, 2), datasets[2].batch(3, 2))


def test_a_task_that_the_tokenizer_does_not_know_is_refused(toy_tokenizer) -> None:
    unknown = Texts(["ζωή και the"] * 20, None, np.arange(20) % 2)
    task = toy_task(10)._replace(train=unknown)
    with pytest.raises(UserError, match=r"toy's training data: 40 of the first 60 tokens are \[UNK\]"):
        TaskDataset(task_data(), task, toy_tokenizer, seed=0)


@pytest.mark.data
def test_real_task_with_a_tokenizer_trained_on_it(real_data: Path, tmp_path: Path) -> None:
    data = TaskDataConfig(task="stsb", path=str(real_data / "glue"), max_length=64, micro_batch_size=32)
    task = load_task(data)
    train_wordpiece([*task.train.texts, *(task.train.pairs or [])], 2000, tmp_path / "tokenizer")
    dataset = TaskDataset(data, task, load_tokenizer(tmp_path / "tokenizer"), seed=0)
    assert dataset.steps_per_epoch == 5749 / 32
    assert dataset.batch(0, 0).labels.dtype == torch.float32
    assert sum(len(make().labels) for make in dataset.dev["dev"].in_order()) == 1500
