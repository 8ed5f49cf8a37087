"""Predictions of every form of a model, for texts in memory and for files of every kind."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import toy
import toy_heads
from conftest import World
from launching import launch, run_command
from served_models import FORMS, GOLDS, TEXTS, served

from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import PredictConfig
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import onnx_export, predict_file, prediction
from lad_dist.evaluation.prediction import Prediction, predict
from lad_dist.evaluation.predictor import locate_model, open_predictor
from lad_dist.models import loading
from lad_dist.models.frozen import InferenceModel


@pytest.fixture(scope="module")
def export(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served(tmp_path_factory.mktemp("runs") / "small", world.tokenizer)


@pytest.fixture(scope="module")
def predictions(export: Path) -> list[Prediction]:
    return predict(export, TEXTS)


def write(config: dict[str, Any]) -> predict_file.FileScore:
    return predict_file.predict_file(PredictConfig.model_validate({key: str(x) for key, x in config.items()}))


def test_every_form_predicts_as_the_folder_does(export: Path, predictions: list[Prediction]) -> None:
    assert predict(export.parent, TEXTS) == predictions
    for form, file in FORMS.items():
        predictor = open_predictor(export / file)
        by_form = predict(predictor, TEXTS)
        equal = [one.label == other.label for one, other in zip(by_form, predictions, strict=True)]
        assert np.mean(equal) >= (0.99 if form == "int8" else 1.0)
        if form != "int8":
            gaps = [one.score - other.score for one, other in zip(by_form, predictions, strict=True)]
            assert np.abs(gaps).max() < 1e-4
        assert ("parameters" in predictor.sizes) == (form in ("folder", "compact"))
    assert open_predictor(export / FORMS["compact"]).sizes != open_predictor(export).sizes


def test_a_temperature_changes_probabilities_alone(export: Path, predictions: list[Prediction]) -> None:
    for warm, cold in zip(predict(export, TEXTS[:9], temperature=2.0), predictions, strict=False):
        odds = [np.log(each.probabilities["yes"] / each.probabilities["no"]) for each in (warm, cold)]
        assert odds[0] == pytest.approx(odds[1] / 2, rel=1e-6)
        assert warm.label == cold.label


def test_an_onnx_file_is_read_beside_the_config(export: Path, predictions: list[Prediction], tmp_path: Path) -> None:
    """Not in a folder `onnx` below it, but with it; and not without it."""
    (tmp_path / "model.onnx").write_bytes((export / FORMS["onnx"]).read_bytes())
    with pytest.raises(UserError, match=r"model\.onnx: no config\.json beside it; copy config\.json and tokenizer"):
        locate_model(tmp_path / "model.onnx")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((export / name).read_bytes())
    [alone] = predict(tmp_path / "model.onnx", TEXTS[:1])
    assert alone.score == pytest.approx(predictions[0].score, abs=1e-4)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.onnx", "{here}/nowhere.onnx: no such file"),
        ("compact.safetensors", "{here}/compact.safetensors: no such file"),
        ("texts.csv", "{here}/texts.csv: no model; name a folder, an .onnx file or compact.safetensors"),
        ("bad.onnx", "{here}/bad.onnx: cannot be read as ONNX"),
        ("empty", "{here}/empty: no weights, neither model.safetensors nor pytorch_model.bin"),
        ("pretrained", "{here}/pretrained: BertForMaskedLM has no head for a task"),
    ],
)
def test_a_path_without_a_model_is_refused(path: str, message: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\na\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pretrained").symlink_to(world.pretrained)
    (tmp_path / "bad.onnx").write_text("no graph")
    (tmp_path / "config.json").write_bytes((world.teacher / "config.json").read_bytes())
    with pytest.raises(UserError) as refusal:
        open_predictor(tmp_path / path)
    assert str(refusal.value).startswith(message.format(here=tmp_path))


def text_file(path: Path, labels: list[Any] | None = None) -> Path:
    """The texts as a file of this suffix, with labels where it has columns."""
    table = pd.DataFrame({"utterance": TEXTS, **({} if labels is None else {"label": labels})})
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in TEXTS))
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def read(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    with out.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_a_file_is_predicted_in_order(
    suffix: str, export: Path, predictions: list[Prediction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 64 as in one, to the last digit."""
    file = text_file(tmp_path / f"texts{suffix}", GOLDS)
    config = {"model": export, "file": file, "text": "text" if suffix == ".txt" else "utterance"}
    score = write({**config, "out": tmp_path / "whole.csv"})
    monkeypatch.setattr(predict_file, "CHUNK_ROWS", prediction.BATCH_SIZE)
    write({**config, "out": tmp_path / "chunks.csv"})
    assert (tmp_path / "chunks.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    write({**config, "out": tmp_path / "rows.jsonl"})
    table, objects = read(tmp_path / "whole.csv"), read(tmp_path / "rows.jsonl")
    assert list(table[0]) == ["label", "score", "probability_no", "probability_yes"]
    for row, value, expected in zip(table, objects, predictions, strict=True):
        assert row["label"] == value["label"] == expected.label
        assert float(row["score"]) == value["score"] == pytest.approx(expected.score, rel=1e-5)
        assert float(row["probability_yes"]) == value["probabilities"]["yes"]
        assert value["probabilities"] == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6)
    right = np.mean([gold == each.label for gold, each in zip(GOLDS, predictions, strict=True)])
    assert score.metrics == ({} if suffix == ".txt" else {"accuracy": pytest.approx(right)})
    assert (score.examples, score.labelled) == (200, 0 if suffix == ".txt" else 200)


def test_labels_count_as_far_as_the_model_knows_them(
    export: Path, predictions: list[Prediction], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"no": "yes", "yes": "no"}
    labels: list[Any] = [other[str(each.label)] if n < 20 else each.label for n, each in enumerate(predictions)]
    labels[100:110], labels[110:140] = ["perhaps"] * 10, [None] * 30
    file = text_file(tmp_path / "texts.csv", labels)
    out = tmp_path / "new" / "out.jsonl"
    assert run_command("predict", str(export), str(file), "--out", str(out), "text=utterance") == 0
    cut = sum(2 + len(text.split()) > 8 for text in TEXTS)  # a word is a token
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[-2:]
        == [
            "10 labels of the file are none of the model's and do not count; labels= renames outputs",
            f"{out}: 200 predictions; accuracy 0.875 over 160 labels",
        ]
        or cut
    )
    changes = ["text=utterance", 'labels=["perhaps", "sure"]']
    assert run_command("predict", str(export), str(file), "--out", str(tmp_path / "b.csv"), *changes) == 0
    assert list(read(tmp_path / "b.csv")[0]) == ["label", "score", "probability_perhaps", "probability_sure"]


def test_texts_that_are_cut_are_counted(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(export)
    texts = [toy.sentence(n) for n in range(50)]
    cut = sum(len(tokenizer(text)["input_ids"]) > 8 for text in texts)
    (file := tmp_path / "texts.txt").write_text("\n".join(texts))
    assert run_command("predict", str(export), str(file), "--out", str(tmp_path / "out.csv"), "max_length=8") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{cut} of 50 texts were cut; max_length=N reads more of them",
        f"{tmp_path}/out.csv: 50 predictions",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{here}/nowhere.csv --out {out}", "{here}/nowhere.csv: no such file"),
        (
            "{here}/texts.csv --out {out}",
            '{here}/texts.csv: no column "text" among utterance, label: choose from label, utterance; '
            "text=, text_pair= and label= name the columns",
        ),
        (
            "{here}/texts.xlsx --out {out}",
            '{here}/texts.xlsx: file type ".xlsx" is unknown: choose from .csv, .jsonl, .parquet, .tsv, .txt',
        ),
        ("{here}/texts.csv --out {here}/o.xml", '{here}/o.xml: file type ".xml" is unknown: choose from .csv, .jsonl'),
        (
            "{here}/texts.csv --out {here}/texts.csv",
            "{here}/texts.csv: exists; remove it, or write to another file",
        ),
        ("{here}/torn.csv --out {out}", "{here}/torn.csv:101: 3 columns, not 1"),
        ("{here}/texts.csv", "predict: the following arguments are required: --out; see lad-dist predict --help"),
        ("{here}/texts.csv --out {out} txt=utterance", 'predict: txt: no such key; did you mean "text"?'),
        ("{here}/empty.csv --out {out}", "{here}/empty.csv: no rows"),
        (
            "{here}/texts.csv --out {out} text=utterance max_length=65",
            "max_length: 65 tokens, but {model} has 64 positions",
        ),
        (
            '{here}/texts.csv --out {out} text=utterance labels=["a","b","c"]',
            "labels: 3 names, but {model} has 2 outputs (no, yes)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    words: str, message: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(predict_file, "CHUNK_ROWS", 64)  # the torn row is in the second chunk
    text_file(tmp_path / "texts.csv", GOLDS)
    (tmp_path / "texts.xlsx").write_text("text\n")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "torn.csv").write_text("text\n" + "ba\n" * 99 + "ba,ba,ba\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    places = {"here": tmp_path, "out": tmp_path / "out.csv", "model": export}
    replaced = [word.replace("{here}", str(tmp_path)).replace("{out}", str(places["out"])) for word in words.split()]
    assert run_command("predict", str(export), *replaced) == 2
    assert capsys.readouterr().err == f"error: {message.format(**places)}\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_as_a_user_starts_it(export: Path, tmp_path: Path) -> None:
    file = text_file(tmp_path / "texts.csv", GOLDS)
    words = ["predict", export / FORMS["int8"], file, "--out", tmp_path / "out.csv", "text=utterance"]
    done = launch(["-m", "lad_dist.cli", *words])
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{tmp_path}/out\.csv: 200 predictions; accuracy (1|0.9\d*) over 200 labels\n", done.stdout)
    assert len(read(tmp_path / "out.csv")) == 200


def head_model(world: World, folder: Path, kind: str) -> Path:
    """A model for words, answers or numbers with new weights, and its ONNX file."""
    labels = toy_heads.LABELS.get(kind, ("score",))
    model = toy.model(folder / "model", world.tokenizer, kind, labels, initializer_range=0.3)
    onnx_export.export(InferenceModel(loading.load_model(str(model), kind, require_head=True)), model / "model.onnx")  # type: ignore[arg-type]
    return model


def test_numbers_of_a_regression(world: World, tmp_path: Path) -> None:
    model = head_model(world, tmp_path, "regression")
    numbers = [each.score for each in predict(model, TEXTS)]
    file = text_file(tmp_path / "texts.csv", [str(number + 0.5) for number in numbers])
    score = write({"model": model / "model.onnx", "file": file, "out": tmp_path / "out.csv", "text": "utterance"})
    assert [float(row["score"]) for row in read(tmp_path / "out.csv")] == pytest.approx(numbers, abs=1e-4)
    assert score.metrics == {"mean_squared_error": pytest.approx(0.25, abs=1e-3)}
    places = {"model": str(model), "file": str(file), "out": str(tmp_path / "warm.csv"), "text": "utterance"}
    with pytest.raises(UserError, match=r"^temperature: calibrates the probabilities of labels; .* is for regression$"):
        predict_file.predict_file(PredictConfig.model_validate({**places, "temperature": 2.0}))
    assert not (tmp_path / "warm.csv").exists()


def test_tags_of_words(world: World, tmp_path: Path) -> None:
    """Of CoNLL and .jsonl files, with tags and without: the same, by both forms of the model."""
    model, sentences = head_model(world, tmp_path, "tagging"), [toy_heads.tagged(n) for n in range(30)]
    lines = ["\n".join(f"{word} {tag}" for word, tag in zip(*pair, strict=True)) for pair in sentences]
    (tmp_path / "tagged.conll").write_text("\n\n".join(lines))
    (tmp_path / "words.conll").write_text("\n\n".join("\n".join(words) for words, _ in sentences))
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"tokens": words}) + "\n" for words, _ in sentences))
    with pytest.raises(UserError, match="a model for tagging does not classify texts"):
        predict(model, ["ba"])
    written = []
    for form in (model, model / "model.onnx"):
        for name in ("tagged.conll", "words.conll", "words.jsonl"):
            out = tmp_path / f"{form.name}-{name}.jsonl"
            score = write({"model": form, "file": tmp_path / name, "out": out})
            written.append(read(out))
            assert bool(score.metrics) == (name == "tagged.conll")
    assert [row["tokens"] for row in written[0]] == [words for words, _ in sentences]
    assert all([row["tags"] for row in rows] == [row["tags"] for row in written[0]] for rows in written)
    score = write({"model": model, "file": tmp_path / "tagged.conll", "out": tmp_path / "out.csv"})
    table = read(tmp_path / "out.csv")
    flat = [(n + 1, *pair) for n, row in enumerate(written[0]) for pair in zip(row["tokens"], row["tags"], strict=True)]
    assert [(int(row["sentence"]), row["token"], row["tag"]) for row in table] == flat
    golds = [tag for _, tags in sentences for tag in tags]
    right = np.mean([row["tag"] == gold for row, gold in zip(table, golds, strict=True)])
    assert score.metrics == {"accuracy": pytest.approx(right)}


def test_answers_to_questions(world: World, tmp_path: Path) -> None:
    """A file without answers gets the same predictions; where some have none, an answer may be empty."""
    model, content = head_model(world, tmp_path, "question_answering"), toy_heads.squad(range(1, 20), 60)
    (tmp_path / "answered.json").write_text(json.dumps(content))
    for paragraph in content["data"][0]["paragraphs"]:
        del paragraph["qas"][0]["answers"]
    (tmp_path / "open.json").write_text(json.dumps(content))
    (tmp_path / "some.json").write_text(json.dumps(toy_heads.squad(range(20), 60, unanswerable=True)))
    scores, rows = {}, {}
    for form in (model, model / "model.onnx"):
        for name in ("answered", "open", "some"):
            out = tmp_path / f"{form.name}-{name}.csv"
            scores[name] = write({"model": form, "file": tmp_path / f"{name}.json", "out": out}).metrics
            rows[form.name, name] = read(out)
    assert {name: sorted(score) for name, score in scores.items()} == {
        "answered": ["exact_match", "f1"], "open": [], "some": ["exact_match", "f1"],
    }  # fmt: skip
    contexts = [paragraph["context"] for paragraph in content["data"][0]["paragraphs"]]
    assert rows["model", "open"] == rows["model", "answered"] == rows["model.onnx", "open"]
    for row, context in zip(rows["model", "open"], contexts, strict=True):
        assert row["answer"]
        assert row["answer"] in context
