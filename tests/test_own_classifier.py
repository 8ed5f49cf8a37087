"""The first journey of the README: a classifier that transformers fine-tuned, own files, three commands."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch
import toy
from launching import run_command
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from lad_dist import predict

INTENTS = {"weather": "ba", "alarm": "de", "music": "go", "bank": "lu"}  # LABEL_0 … LABEL_3: not in alphabetical order


def utterances(seed: int, count: int) -> list[tuple[str, str]]:
    """Texts of which one word says the intent; the first intents are more frequent."""
    pick = random.Random(seed)
    others = [word for word in toy.WORDS if word[:2] not in INTENTS.values()]
    rows = []
    for _ in range(count):
        intent = pick.choices(list(INTENTS), weights=[8, 4, 2, 2])[0]
        words = [*pick.choices(others, k=pick.randint(2, 6)), INTENTS[intent] + "n"]
        rows.append((" ".join(pick.sample(words, len(words))), intent))
    return rows


def fine_tune(folder: Path, tokenizer: Path, rows: list[tuple[str, str]]) -> None:
    """Fine-tune with transformers alone, which calls the outputs LABEL_0, LABEL_1, … unless it is given names."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=4, **toy.SIZES))
    inputs = words([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([list(INTENTS).index(intent) for _, intent in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(16):
        for batch in torch.randperm(len(rows)).split(32):
            model(**{name: x[batch] for name, x in inputs.items()}, labels=labels[batch]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def test_three_commands_make_a_served_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate({"train": 240, "dev": 80, "test": 200}.items()):
        with Path(f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("utterance", "intent"), *utterances(seed, count)])
    fine_tune(Path("MY_MODEL"), toy.tokenizer(Path("words")), utterances(0, 240))
    columns = ["data.text=utterance", "data.label=intent"]
    files = ["data.task=none", "data.train=train.csv", "data.dev=dev.csv", "data.test=test.csv"]
    sizes = [
        "student.num_hidden_layers=2",
        "deepspeed.bf16.enabled=false",
        "optim.lr=5e-3",
        "run.epochs=6.0",
        "data.max_length=32",
    ]
    models = ["teacher.path=MY_MODEL", "student.path=teacher", "run.name=small"]
    distil = ["distill", "configs:task/lad.toml", *files, *columns, *models, *sizes]
    assert run_command(*distil) == 2
    assert f"set data.labels = {json.dumps(list(INTENTS))};" in capsys.readouterr().err
    assert run_command(*distil, f"data.labels={json.dumps(list(INTENTS))}") == 0
    assert "new head" not in capsys.readouterr().err
    results = json.loads(Path("runs/small/results.json").read_text())
    majority = sum(intent == "weather" for _, intent in utterances(2, 200)) / 200
    assert results["test"]["teacher"]["accuracy"] > 0.9
    assert results["test"]["student"]["accuracy"] > majority + 0.2

    assert run_command("latency", "runs/small", "--int8", "--batch", "1", "--rounds", "1") == 0
    file = "runs/small/export/onnx/model.int8.onnx"
    words = ["--out", "predictions.csv", "text=utterance", "label=intent"]
    capsys.readouterr()
    assert run_command("predict", file, "test.csv", *words) == 0
    texts = [text for text, _ in utterances(2, 200)]
    with Path("predictions.csv").open(newline="") as stream:
        served = [row["label"] for row in csv.DictReader(stream)]
    student = [prediction.label for prediction in predict("runs/small", texts)]
    equal = sum(one == other for one, other in zip(served, student, strict=True)) / len(texts)
    assert equal >= 0.99
    right = sum(one == intent for one, (_, intent) in zip(served, utterances(2, 200), strict=True))
    assert f"predictions.csv: 200 predictions; accuracy {right / 200:.4g} over 200 labels" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained("runs/small/export")
    assert list(model.config.id2label.values()) == list(INTENTS)
