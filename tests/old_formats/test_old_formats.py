"""Artefacts of an earlier version: exports load, runs are refused in one line, teacher caches are ignored.

Commit fe5c21f wrote the folders beside this file (make.sh). They are never written again.
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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lad_dist.checkpointing.store import CheckpointStore, NoValidCheckpoint
from lad_dist.compression.compact import load_compact, load_masked
from lad_dist.config.errors import UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.report.results import collect
from lad_dist.training.train import train

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "logits.json").read_text())


def masks_over_base(folder: Path) -> Any:
    """Load the masks over a base that has moved since."""
    return load_masked(folder, str(HERE / "inputs" / "teacher"))


@pytest.mark.parametrize(
    ("folder", "form", "loader"),
    [
        ("export", "ordinary", AutoModelForSequenceClassification.from_pretrained),
        ("export", "compact", load_compact),
        ("export_masked", "ordinary", AutoModelForSequenceClassification.from_pretrained),
        ("export_masked", "compact", load_compact),
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
    pairs = [
        name
        for name, module in load_compact(HERE / "export").named_modules()
        if isinstance(module, torch.nn.Sequential)
    ]
    assert len(pairs) == 7  # the word embeddings, and the linear maps of the one layer


@pytest.mark.parametrize("form", [load_compact, masks_over_base], ids=["compact", "masked"])
def test_an_old_small_form_needs_no_ordinary_one(form: Callable[[Path], Any], tmp_path: Path) -> None:
    names = ["config.json", "compact.safetensors" if form is load_compact else "mask.safetensors"]
    for name in names:
        shutil.copy(HERE / "export_masked" / name, tmp_path)
    assert form(tmp_path).config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("folder", ["export", "export_masked"])
def test_the_tokenizer_of_an_old_export_gives_the_ids_that_it_gave(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(HERE / folder))
    assert tokenizer(EXPECTED["text"])["input_ids"] == EXPECTED["input_ids"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new current folder, with the inputs where the old runs had them: `inputs`, beside `runs`."""
    shutil.copytree(HERE / "inputs", tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name: str, cache: str) -> TrainConfig:
    """Return the config of run_interrupted and run_complete, but for the name and the teacher's cache."""
    files = {"train": "inputs/train.csv", "dev": "inputs/dev.jsonl"}
    teacher = Path("inputs/teacher")
    changes = {"run.name": name, "student.num_hidden_layers": 1, "teacher.cache": cache}
    return toy.parsed(toy.task_config(Path("runs"), files, teacher, teacher), changes)


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of all files below a folder, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


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
    assert "choose another run.name, or remove the folder" in message
    assert "\n" not in message
    assert digests(folder) == before


def test_an_old_teacher_cache_is_ignored(workplace: Path) -> None:
    shutil.copytree(HERE / "teacher_cache", "cache_with_old_files")
    before = digests(Path("cache_with_old_files"))
    results, exports = [], []
    for name, cache in (("beside_old_files", "cache_with_old_files"), ("alone", "empty_cache")):
        result = train(config(name, cache))
        results.append(result.results["metrics"])
        exports.append(digests(result.folder / "export")["model.safetensors"])
    after = digests(Path("cache_with_old_files"))
    added = {path: digest for path, digest in after.items() if path not in before}
    assert results[0] == results[1]
    assert exports[0] == exports[1]
    assert {path: after[path] for path in before} == before
    assert added == digests(Path("empty_cache"))


def test_the_report_skips_an_old_run() -> None:
    with pytest.raises(UserError, match="no complete run on a task below; of an earlier version of lad_dist: 1"):
        collect([HERE / "run_complete"])


def test_an_old_checkpoint_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(HERE / "run_interrupted" / "checkpoints", folder)
    with pytest.raises(NoValidCheckpoint, match=r"step-000000001: written by an earlier version of lad_dist; choose"):
        CheckpointStore(folder).newest()
    assert (folder / "step-000000001").exists()
    assert not capsys.readouterr().err
