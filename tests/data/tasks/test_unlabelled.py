"""Texts without labels beside those of a task: files, columns, and the examples that a run reads of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from sklearn.utils.class_weight import compute_class_weight

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TaskDataConfig
from lad_dist.core.labels import UNLABELLED
from lad_dist.data.datasets import TaskDataset
from lad_dist.data.sources import hub
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.task import check_task, load_task

pytest_plugins = ["data_fixtures"]
WORDS = ("the", "and", "was", "were", "her", "with")


def config(folder: Path, unlabelled: str | None, *, pairs: bool = False, **rest: Any) -> TaskDataConfig:
    """Return the config of a task of twelve labelled texts, and write these."""
    frame = pd.DataFrame({"text": [f"{word} {n}" for n, word in enumerate(WORDS * 2)], "label": [0, 1, 1] * 4})
    if pairs:
        frame = frame.assign(text_pair=frame.text[::-1].to_numpy())
    for name in ("train", "dev"):
        frame.assign(text=frame.text + f" {name}").to_csv(folder / f"{name}.csv", index=False)
    files = {name: str(folder / f"{name}.csv") for name in ("train", "dev")}
    place = None if unlabelled is None else str(folder / unlabelled)
    data = {**files, "unlabelled": place, "max_length": 16, "micro_batch_size": 4, **rest}
    return TaskDataConfig.model_validate(data)


def texts(data: TaskDataConfig) -> Texts:
    check_task(data)
    unlabelled = load_task(data).unlabelled
    assert unlabelled is not None
    return unlabelled


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_without_the_blank_texts(ending: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [1, 2, 3, 4], "body": ["one, two", "", " ", "three"]})
    file = tmp_path / f"logs.{ending}"
    if ending == "txt":
        file.write_text("one, two\n\n \nthree")
    elif ending == "parquet":
        frame.to_parquet(file)
    elif ending == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False, sep="\t" if ending == "tsv" else ",")
    data = config(tmp_path, file.name)
    frame = pd.read_csv(data.train).rename(columns={"text": "body"})  # type: ignore[arg-type]
    for name in ("train", "dev"):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    unlabelled = texts(data.model_copy(update={"text": "body"}))
    assert (unlabelled.texts, unlabelled.pairs) == (["one, two", "three"], None)
    assert unlabelled.labels.tolist() == [UNLABELLED] * 2


def test_pairs_where_the_task_has_pairs(tmp_path: Path) -> None:
    (tmp_path / "logs.csv").write_text("text_pair,text\nb,a\n,\n,c\n")
    unlabelled = texts(config(tmp_path, "logs.csv", pairs=True))
    assert (unlabelled.texts, unlabelled.pairs) == (["a", "c"], ["b", ""])
    assert texts(config(tmp_path, "logs.csv")).pairs is None
    (tmp_path / "logs.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"logs.txt: the task reads pairs, of which a .txt file has no second texts; "):
        texts(config(tmp_path, "logs.txt", pairs=True))


def test_a_glue_task_with_numbers_as_labels(tmp_path: Path) -> None:
    (tmp_path / "STS-B").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "STS-B" / f"{name}.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t1.5\nc\td\t2\n")
    (tmp_path / "logs.csv").write_text("text,text_pair,first,second\na,b,e,f\n")
    data = {"task": "stsb", "path": str(tmp_path), "unlabelled": str(tmp_path / "logs.csv")}
    for columns, expected in (({}, ["a", "b"]), ({"text": "first", "text_pair": "second"}, ["e", "f"])):
        unlabelled = texts(TaskDataConfig.model_validate({**data, **columns}))
        assert [*unlabelled.texts, *(unlabelled.pairs or [])] == expected
        assert unlabelled.labels.dtype == np.float32
        assert np.isnan(unlabelled.labels).all()


def test_a_split_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {name: pd.read_csv(config(tmp_path, None).train) for name in ("train", "dev")}  # type: ignore[call-overload]
    splits = {name: datasets.Dataset.from_pandas(frame) for name, frame in rows.items()}
    splits["rest"] = datasets.Dataset.from_dict({"text": ["more", " "]})
    monkeypatch.setattr(hub, "load", lambda path, config, split, columns: splits[split])
    assert texts(TaskDataConfig(hub="me/logs", train="train", dev="dev", unlabelled="rest")).texts == ["more"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("logs.txt", None, r"logs\.txt: no such file"),
        ("logs.txt", "\n \n", r"logs\.txt: no texts; remove data\.unlabelled"),
        ("logs.txt", "a\n\xff\n", r"logs\.txt:2: not UTF-8"),
        ("logs.csv", "", r"logs\.csv: empty"),
        ("logs.csv", "text\n", r"logs\.csv: no rows"),
        (
            "logs.csv",
            "texts\na\n",
            r'no column "text" among texts: .*; data\.text and data\.text_pair name',
        ),
        ("logs.jsonl", '{"text": "a"}\n{"text": null}\n', r"logs\.jsonl:2: text is None, not a text"),
        ("logs.doc", "a", r'logs\.doc: file type "\.doc" is unknown'),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message) as raised:
        texts(config(tmp_path, name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"kind": "tagging", "unlabelled": "c"},
            'unlabelled goes with kind = "classification", "multilabel" or "regression" alone',
        ),
        ({"kind": "question_answering", "unlabelled": "c"}, "unlabelled goes with kind = "),
        ({"unlabelled_weight": 2.0}, "unlabelled_weight goes with unlabelled alone"),
        ({"unlabelled": "c", "unlabelled_weight": 0.0}, "greater than 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskDataConfig.model_validate({"train": "a", "dev": "b", **keys})


def test_texts_of_the_dev_and_test_sets_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = config(tmp_path, "logs.txt")
    dev = pd.read_csv(data.dev).text  # type: ignore[arg-type]
    (tmp_path / "test.csv").write_text("text,label\nlast,0\n")
    (tmp_path / "logs.txt").write_text(f"{dev[3]} \n{dev[3]}\nother\nlast\n")
    message = "texts are in the dev or test set too, where scores may come out too good; remove them"
    for test, count in ((None, 2), (str(tmp_path / "test.csv"), 3)):
        caplog.clear()
        load_task(data.model_copy(update={"test": test}))
        assert [record.getMessage() for record in caplog.records] == [f"{data.unlabelled}: {count} of 4 {message}"]
    caplog.clear()
    (tmp_path / "logs.txt").write_text("other\n")
    load_task(data)
    assert not caplog.records


def dataset(data: TaskDataConfig, tokenizer: Any, seed: int = 0) -> TaskDataset:
    return TaskDataset(data, load_task(data), tokenizer, seed=seed)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_an_epoch_reads_labelled_texts_once_and_the_others_by_weight(
    weight: float, toy_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "logs.txt").write_text("the her\nand was\nwith her the\nwere\n")
    data = config(tmp_path, "logs.txt", micro_batches_per_step=2, unlabelled_weight=weight, class_weights="balanced")
    mixed = dataset(data, toy_tokenizer)
    assert mixed.steps_per_epoch == (12 + 4 * weight) / 8
    assert mixed.steps_per_pass == 16 / 8
    labels = mixed.train.labels
    weights = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels[:12])
    read: Counter[int] = Counter()
    for number in range(round(2 * mixed.steps_per_epoch * 2)):  # two epochs
        ids, batch = mixed.example_ids(*divmod(number, 2)), mixed.batch(*divmod(number, 2))
        assert batch.labels.tolist() == labels[ids].tolist()
        assert batch.num_unlabelled == sum(ids >= 12) in (1, 2)  # spread evenly
        assert batch.counts.labelled_rows == 4 - batch.num_unlabelled
        assert batch.row_weights is not None
        is_labelled = batch.labels != UNLABELLED
        expected = weights[batch.labels[is_labelled].numpy()]
        assert batch.row_weights[is_labelled].tolist() == pytest.approx(expected.tolist())
        read.update(ids.tolist())
    assert read == {n: 2 if n < 12 else round(2 * weight) for n in range(16)}
    assert mixed.description == "12 labelled and 4 unlabelled training examples; 12 to evaluate on"


def test_the_fingerprint_covers_unlabelled_texts(toy_tokenizer: Any, tmp_path: Path) -> None:
    contents = ("the her\nand\n", "the her\nwas\n", "the her\n")
    fingerprints = set()
    for content in contents:
        (tmp_path / "logs.txt").write_text(content)
        mixed = dataset(config(tmp_path, "logs.txt"), toy_tokenizer)
        fingerprints |= {mixed.fingerprint, mixed.train.fingerprint}
    labelled = dataset(config(tmp_path, None), toy_tokenizer)
    assert len(fingerprints | {labelled.fingerprint, labelled.train.fingerprint}) == 8
    ids = [mixed.train.batch(np.array([n])).input_ids.tolist() for n in range(12)]
    assert ids == [labelled.train.batch(np.array([n])).input_ids.tolist() for n in range(12)]
    assert mixed.train.batch(np.array([12])).input_ids.tolist() == toy_tokenizer("the her")["input_ids"]


def test_unlabelled_texts_that_the_tokenizer_does_not_know_are_refused(toy_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "logs.txt").write_text("ζωή και\n" * 9)
    with pytest.raises(UserError, match=r"train's unlabelled data: 18 of the first 18 tokens are \[UNK\]"):
        dataset(config(tmp_path, "logs.txt"), toy_tokenizer)


def test_the_share_of_cut_texts_is_that_of_all(toy_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "logs.txt").write_text("the " * 30 + "\nher\nwas\nand\n")
    description = dataset(config(tmp_path, "logs.txt"), toy_tokenizer).description
    assert description.startswith("12 labelled and 4 unlabelled training examples, 6.25% of them cut at 16 tokens;")


def test_seeds_and_micro_batches_alone_decide_what_is_read(toy_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "logs.txt").write_text("".join(f"the {n} was\n" for n in range(30)))
    data = config(tmp_path, "logs.txt", unlabelled_weight=0.3)
    one, two, other = (dataset(data, toy_tokenizer, seed) for seed in (0, 0, 1))
    one.batch(7, 0)
    assert torch.equal(one.batch(3, 0).input_ids, two.batch(3, 0).input_ids)
    assert any(one.samples(step, 0) != other.samples(step, 0) for step in range(3))
    ids = np.concatenate([one.samples(step, 0) for step in range(round(10 * one.steps_per_epoch))])
    numbers = Counter(ids.tolist())
    assert {numbers[n] for n in range(12)} <= {9, 10, 11}
    assert {numbers[n] for n in range(12, 42)} == {3}  # ten epochs
