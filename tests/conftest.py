"""Fixtures: one toy world per session, built once and only read."""

import gc
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import sweep
import toy
from hypothesis import settings

from lad_dist.cli.logging_setup import configure_logging
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.data.shards.prepare import prepare
from lad_dist.models import loading
from lad_dist.training import train  # noqa: F401 (so that it is among what is frozen)

configure_logging()
logging.getLogger("lad_dist").propagate = True  # for pytest's caplog, which listens at the root
settings.register_profile("lad_dist", deadline=None)  # seconds say how busy a machine is, not whether the code is right
settings.load_profile("lad_dist")


# Files that take minutes. They begin first, so that in the end no worker waits for another one with such a file; the
# first two mostly wait, and go beside those that compute.
LONGEST = (
    "test_slurm.py", "test_search.py", "test_world_sizes.py", "test_search_faults.py", "test_slurm_search.py",
    "test_connect.py", "test_chaos.py", "test_train.py", "test_reshard.py", "test_compressions_and_world_sizes.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run whole products of cases, not a part that covers them")


def pytest_configure(config: pytest.Config) -> None:
    sweep.enabled = config.getoption("sweep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def _frozen_garbage() -> None:
    """`train` collects garbage at its start, which takes long among all that is imported and collected by now."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class World:
    """Folders of the toy world."""

    tokenizer: Path
    teacher: Path  # classification, labels no and yes
    pretrained: Path  # with an MLM head
    headless: Path  # an encoder alone
    books: Path  # texts
    corpus: Path  # token shards, of the books
    files: dict[str, str]  # a task's train and dev


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    words = toy.tokenizer(folder / "tokenizer")
    books = folder / "books"
    books.mkdir()
    for number in range(40):
        text = "\n\n".join(toy.sentence(100 * number + n, most=30) for n in range(12))
        (books / f"{number:02d}.txt").write_text(text + "\n")
    corpus = folder / "corpus"
    source = {"kind": "text", "path": str(books)}
    request = {"out": str(corpus), "tokenizer": str(words), "held_out": 0.1, "source": [source]}
    prepare(PrepareConfig.model_validate(request))
    return World(
        words,
        toy.model(folder / "teacher", words, "classification", toy.LABELS),
        toy.model(folder / "pretrained", words, "mlm"),
        toy.model(folder / "headless", words, "none"),
        books,
        corpus,
        toy.task_files(folder / "task"),
    )


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read or drawn within the test."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read or drawn before the mistake was found")

    monkeypatch.setattr(loading, "load_model", forbidden)
    monkeypatch.setattr(loading, "create_model", forbidden)
