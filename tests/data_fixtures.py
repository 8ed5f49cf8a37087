"""A toy tokenizer, a toy corpus, and the folder of real data."""

import os
from pathlib import Path

import pytest
from toy_text import WORDS, sentence

from lad_dist.data.tokenization.algorithms import train_wordpiece
from lad_dist.data.tokenization.loading import load_tokenizer


@pytest.fixture(scope="session")
def toy_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "toy"
    train_wordpiece([" ".join(WORDS)] * 50, 200, out)
    return out


@pytest.fixture
def toy_tokenizer(toy_tokenizer_folder: Path):
    return load_tokenizer(toy_tokenizer_folder)


@pytest.fixture
def toy_corpus(tmp_path: Path) -> Path:
    """60 documents of 1 to 60 words."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03d}.txt").write_text(sentence(number, number + 1))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("LAD_DIST_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set LAD_DIST_TEST_DATA")
    return folder
