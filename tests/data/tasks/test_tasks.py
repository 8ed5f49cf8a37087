import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from lad_dist.config.errors import UserError
from lad_dist.config.schema import TaskDataConfig
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tasks.glue import GLUE
from lad_dist.data.tasks.label_names import sorted_names
from lad_dist.data.tasks.task import Task, check_task, load_task, longest_examples

pytest_plugins = ["data_fixtures"]


def glue(path: Path, task: str) -> Task:
    return load_task(TaskDataConfig(task=task, path=str(path)))


def write_tsv(file: Path, *rows: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(row + "\n" for row in rows))


def own(train: Path, dev: Path, **rest: Any) -> Task:
    return load_task(TaskDataConfig(train=str(train), dev=str(dev), **rest))


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "train", "dev", "pairs"),
    [
        ("sst2", 67349, 872, False),
        ("cola", 8551, 1043, False),
        ("mrpc", 3668, 408, True),
        ("rte", 2490, 277, True),
        ("stsb", 5749, 1500, True),
    ],
)
def test_official_files_are_read_whole(real_data: Path, task: str, train: int, dev: int, pairs: bool) -> None:
    loaded = glue(real_data / "glue", task)
    for examples, count in ((loaded.train, train), (loaded.dev["dev"], dev)):
        assert len(examples.texts) == len(examples.labels) == count
        assert (examples.pairs is not None) == pairs
        assert pairs is False or len(examples.pairs or []) == count
        assert all(examples.texts)
    if loaded.kind == "classification":
        assert set(loaded.train.labels.tolist()) == set(range(len(loaded.label_names)))
        assert loaded.train.labels.dtype == np.int64
    else:
        assert loaded.train.labels.dtype == np.float32
        assert (loaded.train.labels.min(), loaded.train.labels.max()) == (0, 5)


@pytest.mark.data
def test_known_rows_of_the_official_files(real_data: Path) -> None:
    mrpc = glue(real_data / "glue", "mrpc")
    assert mrpc.dev["dev"].texts[0].startswith("He said the foodservice pie business doesn't fit")
    assert mrpc.dev["dev"].pairs is not None
    assert mrpc.dev["dev"].pairs[0] == '"The foodservice pie business does not fit our long-term growth strategy.'
    assert mrpc.dev["dev"].labels[:2].tolist() == [1, 0]
    rte = glue(real_data / "glue", "rte")
    assert [rte.label_names[i] for i in rte.dev["dev"].labels[:2]] == ["not_entailment", "entailment"]
    assert rte.label_names == ("entailment", "not_entailment")
    cola = glue(real_data / "glue", "cola")
    assert cola.train.texts[0] == "Our friends won't buy this analysis, let alone the next one we propose."
    assert cola.train.labels.mean() == pytest.approx(0.7044, abs=1e-4)
    stsb = glue(real_data / "glue", "stsb")
    assert stsb.dev["dev"].labels[:2].tolist() == [5.0, 4.75]


def test_mnli_has_words_for_labels_and_two_dev_sets(tmp_path: Path) -> None:
    header = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
    write_tsv(tmp_path / "MNLI/train.tsv", header, "0\tg\ta\tb\tneutral\tcontradiction", '1\tg\t"c\td\tx\tentailment')
    write_tsv(tmp_path / "MNLI/dev_matched.tsv", header, "0\tg\te\tf\tx\tneutral")
    write_tsv(tmp_path / "MNLI/dev_mismatched.tsv", header, "0\tg\tg\th\tx\tneutral", "0\tg\ti\tj\tx\tentailment")
    task = glue(tmp_path, "mnli")
    assert task.train.texts == ["a", '"c']
    assert task.train.labels.tolist() == [2, 0]
    assert {name: examples.labels.tolist() for name, examples in task.dev.items()} == {
        "dev": [1],
        "dev_mismatched": [1, 0],
    }
    assert task.metrics == ("accuracy",)


def test_torn_rows_of_qqp_are_left_out_and_of_others_refused(tmp_path: Path) -> None:
    rows = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta\tb\t1", "4\t5\t6\tc", "7\t8\t9\td\te\t0"]
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(tmp_path / "QQP" / name, *rows)
        write_tsv(tmp_path / "WNLI" / name, "index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1", "1\ta\t0")
    assert glue(tmp_path, "qqp").train.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"WNLI/train\.tsv:3: 3 columns, not 4"):
        glue(tmp_path, "wnli")


def test_the_hub_has_columns_and_an_order_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    requests = []

    def load_dataset(path: str, config: str, split: str, streaming: bool) -> datasets.Dataset:
        requests.append((path, config, split))
        return datasets.Dataset.from_dict({"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(TaskDataConfig(task="mnli"))
    assert requests == [("nyu-mll/glue", "mnli", s) for s in ("train", "validation_matched", "validation_mismatched")]
    assert (task.train.texts, task.train.pairs, task.train.labels.tolist()) == (["p"], ["h"], [2])
    assert list(task.dev) == ["dev", "dev_mismatched"]


ROWS = [('the "quick"\tfox, it', "a", 2), ("x\ny", "b", 10), ("NA", "null", 2), ("long " * 30_000, "c", 2)]

TWO_OBJECTS = '{"text": "a", "label": "x"}\n\n{"text": "b,", "label": "y"}\n'


@pytest.mark.parametrize("kind", ["csv", "CSV", "jsonl", "parquet"])
def test_own_files_keep_their_texts(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(ROWS, columns=["text", "text_pair", "label"]).assign(more=1.5)
    file = tmp_path / f"own.{kind}"
    if kind.lower() == "csv":
        frame.to_csv(file, index=False)
    elif kind == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_parquet(file)
    task = own(file, file)
    assert task.train.texts == [text for text, _, _ in ROWS]
    assert task.train.pairs == [pair for _, pair, _ in ROWS]
    assert task.label_names == ("2", "10")
    assert task.train.labels.tolist() == [0, 1, 0, 0]
    assert (task.name, task.metrics, list(task.dev)) == ("own", ("accuracy", "f1_macro", "matthews"), ["dev"])


def intents(folder: Path) -> dict[str, str]:
    """Write three files with columns of their own names; return them by key."""
    for name, count in (("train", 6), ("dev", 3), ("test", 2)):
        rows = [f'{number},"say {name} {number}",{("greet", "leave")[number % 2]}' for number in range(count)]
        write_tsv(folder / f"{name}.csv", "id,utterance,intent", *rows)
    return {name: str(folder / f"{name}.csv") for name in ("train", "dev", "test")}


def test_columns_have_the_names_that_the_config_gives(tmp_path: Path) -> None:
    data = TaskDataConfig(**intents(tmp_path), text="utterance", label="intent")
    task = load_task(data)
    assert task.label_names == ("greet", "leave")
    assert isinstance(task.test, Texts)
    assert (task.train.texts[0], len(task.dev["dev"].texts), task.test.texts) == (
        "say train 0", 3, ["say test 0", "say test 1"]
    )  # fmt: skip
    pairs = load_task(data.model_copy(update={"text_pair": "id"}))
    assert (pairs.train.pairs, pairs.train.texts) == ([str(number) for number in range(6)], task.train.texts)
    hint = 'no column "text" among id, utterance, intent: .*; data.text, data.text_pair and data.label name the columns'
    with pytest.raises(UserError, match=hint):
        load_task(data.model_copy(update={"text": "text"}))
    with pytest.raises(UserError, match='no column "second" among'):
        load_task(data.model_copy(update={"text_pair": "second"}))


def test_a_data_set_that_the_datasets_library_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder = tmp_path / "set"
    intents(folder)
    files = {split: f"{folder}/{name}.csv" for split, name in (("train", "train"), ("validation", "dev"))}
    splits = datasets.load_dataset("csv", data_files=files, cache_dir=str(tmp_path / "cache"))
    splits = splits.cast_column("intent", datasets.ClassLabel(names=["greet", "leave"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split, streaming: splits[split])
    data = TaskDataConfig(hub="me/intents", train="train", dev="validation", text="utterance", label="intent")
    check_task(data)
    task, own_task = (
        load_task(each) for each in (data, TaskDataConfig(**intents(tmp_path), text="utterance", label="intent"))
    )
    assert (task.name, task.label_names, task.test) == ("intents", ("greet", "leave"), None)
    assert (task.train.texts, task.train.labels.tolist()) == (own_task.train.texts, own_task.train.labels.tolist())
    assert task.dev["dev"].labels.tolist() == own_task.dev["dev"].labels.tolist()
    with pytest.raises(UserError, match=r'me/intents\[train\]: no column "label" among .*; data.text, data.text_pair'):
        load_task(data.model_copy(update={"label": "label"}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0, 2.0, 3.0], "data.class_weights: 3 weights for the 2 labels greet, leave"), ("balanced", None)],
)
def test_every_label_has_a_weight(weights: Any, message: str | None, tmp_path: Path) -> None:
    data = TaskDataConfig(**intents(tmp_path), text="utterance", label="intent", class_weights=weights)
    if message is None:
        assert load_task(data).label_names == ("greet", "leave")
        return
    with pytest.raises(UserError, match=message):
        load_task(data)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"train": "a", "dev": "b", "kind": "regression", "class_weights": "balanced"},
            "class_weights does not go with",
        ),
        ({"train": "a", "dev": "b", "class_weights": "even"}, "balanced"),
        ({"task": "rte", "test": "a.csv"}, "test goes with train and dev, not with a GLUE task"),
        ({"task": "rte", "text": "utterance"}, "text goes with train and dev, not with a GLUE task"),
        ({"train": "a", "dev": "b", "hub_config": "c"}, "hub_config goes with hub alone"),
        ({"train": "a", "dev": "b", "kind": "tagging", "label": "c"}, 'label goes with kind = "classification", "m'),
        ({"task": "rte", "train": "a", "dev": "b"}, "not both; data.task=none unsets the task"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskDataConfig(**keys)


def test_carriage_returns_end_the_lines_of_a_file_without_newlines(tmp_path: Path) -> None:
    rows = {".csv": 'text,label\na,x\n"b,\n",y\n', ".tsv": "text\tlabel\na\tx\nb,\ty", ".jsonl": TWO_OBJECTS}
    for ending, content in rows.items():
        for number, end in enumerate(("\n", "\r\n", "\r")):
            file = tmp_path / f"{number}{ending}"
            file.write_bytes(content.replace("\n", end).encode())
            assert [text.strip() for text in own(file, file).train.texts] == ["a", "b,"]


def test_own_tsv_has_no_quoting_and_labels_may_be_words(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", "label\ttext", 'good\t"so it begins', "bad\tand 'ends")
    task = own(tmp_path / "a.tsv", tmp_path / "a.tsv")
    assert task.train.texts == ['"so it begins', "and 'ends"]
    assert task.train.pairs is None
    assert (task.label_names, task.train.labels.tolist()) == (("bad", "good"), [1, 0])


@pytest.mark.parametrize(
    ("labels", "ordered"),
    [
        (["2", "01", "1", "001", "-0", "0", "00", "7", "007"], ["-0", "0", "00", "001", "01", "1", "2", "007", "7"]),
        (["--1", "2", "10", "-"], ["-", "--1", "10", "2"]),  # not all are numbers
        (["2", "9" * 5000, "10"], ["10", "2", "9" * 5000]),  # nor is what Python does not read as one
    ],
)
def test_the_order_of_labels_depends_on_the_labels_alone(labels: list[str], ordered: list[str]) -> None:
    assert sorted_names(labels) == tuple(ordered)


def test_the_user_gives_the_order_of_labels_and_the_positive_one(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.csv", "text,label", "x,1", "y,0")
    task = own(tmp_path / "a.csv", tmp_path / "a.csv", labels=[2, "1", 0], positive=1)
    assert (task.label_names, task.train.labels.tolist()) == (("2", "1", "0"), [1, 2])
    assert (task.metrics, task.positive) == (("accuracy", "f1", "f1_macro", "matthews"), "1")
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(tmp_path / "WNLI" / name, "index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1", "1\ta\tb\t0")
    names = ["entailment", "not_entailment"]
    task = load_task(TaskDataConfig(task="wnli", path=str(tmp_path), labels=names))
    assert [task.label_names[n] for n in task.dev["dev"].labels] == names
    assert task.train.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"data\.labels: the labels of wnli are not_entailment, entailment"):
        load_task(TaskDataConfig(task="wnli", path=str(tmp_path), labels=["0", "1"]))


def test_own_regression(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.csv", "text,label", "x,1.5", "y,-2")
    task = own(tmp_path / "a.csv", tmp_path / "a.csv", kind="regression")
    assert (task.kind, task.label_names, task.metrics) == ("regression", (), ("pearson", "spearman"))
    assert task.train.labels.dtype == np.float32
    assert task.train.labels.tolist() == [1.5, -2.0]
    write_tsv(tmp_path / "b.csv", "text,label", "x,1.5", '"two\nlines",2', "y,nan")
    write_tsv(tmp_path / "c.csv", "text,label", "x,1.5", "y,1.5")
    for file, message in (("b", r"b\.csv:5: label 'nan' is not a number"), ("c", r"c\.csv: every label is 1\.5")):
        with pytest.raises(UserError, match=message):
            own(tmp_path / "a.csv", tmp_path / f"{file}.csv", kind="regression")


def test_checks_come_before_reading(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'task "sst-2" is unknown: did you mean "sst2"\?'):
        check_task(TaskDataConfig(task="sst-2"))
    with pytest.raises(UserError, match=r"SST-2/train\.tsv: no such file"):
        check_task(TaskDataConfig(task="sst2", path=str(tmp_path)))
    (tmp_path / "train.csv").write_text("not even a header")
    with pytest.raises(UserError, match=r"dev\.csv: no such file"):
        check_task(TaskDataConfig(train=str(tmp_path / "train.csv"), dev=str(tmp_path / "dev.csv")))
    check_task(TaskDataConfig(train=str(tmp_path / "train.csv"), dev=str(tmp_path / "train.csv")))


def test_checking_imports_nothing_slow() -> None:
    script = (
        "import json, sys; from lad_dist.config.schema import TaskDataConfig;"
        "from lad_dist.data.tasks.task import check_task;"
        "check_task(TaskDataConfig(task='rte'));"
        "print(json.dumps([m for m in ('torch', 'datasets') if m in sys.modules]))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_examples_in_place_of_a_task_have_the_metrics_and_checks_of_the_task(task: str) -> None:
    data = TaskDataConfig(task=task)
    longest = longest_examples(data, 4)
    assert (longest.metrics, len(longest.train.texts)) == (GLUE[task].metrics, 4)  # type: ignore[union-attr]
    weighted = data.model_copy(update={"class_weights": [1.0, 2.0, 3.0]})
    with pytest.raises(
        UserError, match=r"^data\.class_weights: (3 weights for the 2 labels|the labels of stsb are num)"
    ):
        longest_examples(weighted, 4)
