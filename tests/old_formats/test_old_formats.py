"""What an earlier version wrote: exports load for ever, runs are refused in one line, teachers' caches are passed over.

The folders beside this file are what commit fe5c21f wrote (make.sh). None of them is ever written again.

TODO after the move: names below are those of commit fe5c21f. They stand in the imports from lad_dist, in `config` (with
`task_config` and `parsed` of toy.py), and in what is read of an Outcome (`folder`, `results["metrics"]`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from lad_dist.compact import load, load_masked
from lad_dist.train import train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lad_dist.config import TrainConfig, UserError

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "logits.json").read_text())


def masks_over_base(folder: Path) -> Any:
    """With the base elsewhere than where it lay."""
    return load_masked(folder, str(HERE / "inputs" / "teacher"))


@pytest.mark.parametrize(
    ("folder", "form", "loader"),
    [
        ("export", "ordinary", AutoModelForSequenceClassification.from_pretrained),
        ("export", "compact", load),
        ("export_masked", "ordinary", AutoModelForSequenceClassification.from_pretrained),
        ("export_masked", "compact", load),
        ("export_masked", "masked", masks_over_base),
    ],
)
def test_an_old_export_gives_the_logits_that_it_gave(folder: str, form: str, loader: Callable[[Path], Any]) -> None:
    model = loader(HERE / folder)
    model.set_attn_implementation("sdpa")  # as transformers itself runs it
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([EXPECTED["input_ids"]])).logits[0]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED[folder][form]), rtol=0, atol=1e-6)


def test_an_old_compact_form_has_pairs() -> None:
    pairs = [name for name, module in load(HERE / "export").named_modules() if isinstance(module, torch.nn.Sequential)]
    assert len(pairs) == 7  # the word embeddings, and the linear maps of the one layer


@pytest.mark.parametrize("form", [load, masks_over_base], ids=["compact", "masked"])
def test_an_old_small_form_needs_no_ordinary_one(form: Callable[[Path], Any], tmp_path: Path) -> None:
    names = ["config.json", "compact.safetensors" if form is load else "mask.safetensors"]
    for name in names:
        shutil.copy(HERE / "export_masked" / name, tmp_path)
    assert form(tmp_path).config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("folder", ["export", "export_masked"])
def test_the_tokenizer_of_an_old_export_gives_the_ids_that_it_gave(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(HERE / folder))
    assert tokenizer(EXPECTED["text"])["input_ids"] == EXPECTED["input_ids"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the inputs where the old runs had them: `inputs`, beside `runs`."""
    shutil.copytree(HERE / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name: str, cache: str) -> TrainConfig:
    """That of run_interrupted and run_complete, but for the name and the teacher's cache."""
    files = {"train": "inputs/train.csv", "dev": "inputs/dev.jsonl"}
    teacher = Path("inputs/teacher")
    changes = {"run.name": name, "student.depth": 1, "teacher.cache": cache}
    return toy.parsed(toy.task_config(Path("runs"), files, teacher, teacher), changes)


def digests(folder: Path) -> dict[str, str]:
    """Of all files below a folder, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# Fails until there is a version whose runs are others: the code of fe5c21f takes up the one and returns the other.
@pytest.mark.parametrize("name", ["run_interrupted", "run_complete"])
def test_an_old_run_is_refused_in_one_line_and_stays_as_it_is(name: str, workplace: Path) -> None:
    folder = Path("runs") / name
    shutil.copytree(HERE / name, folder)
    before = digests(folder)
    with pytest.raises(UserError) as refusal:
        train(config(name, cache="empty"))
    message = str(refusal.value)
    assert str(folder) in message
    assert "earlier version" in message
    assert "run.name" in message or "remove" in message  # what to do
    assert "\n" not in message
    assert digests(folder) == before


# Fails until answers of a teacher have another format: the code of fe5c21f reads its own files.
def test_an_old_teacher_cache_is_passed_over(workplace: Path) -> None:
    shutil.copytree(HERE / "teacher_cache", "cache_with_old_files")
    before = digests(Path("cache_with_old_files"))
    results, exports = [], []
    for name, cache in (("beside_old_files", "cache_with_old_files"), ("alone", "empty_cache")):
        outcome = train(config(name, cache))
        assert outcome.results is not None
        results.append(outcome.results["metrics"])
        exports.append(digests(outcome.folder / "export")["model.safetensors"])
    after = digests(Path("cache_with_old_files"))
    added = {path: digest for path, digest in after.items() if path not in before}
    assert results[0] == results[1]
    assert exports[0] == exports[1]
    assert {path: after[path] for path in before} == before
    assert added == digests(Path("empty_cache"))
