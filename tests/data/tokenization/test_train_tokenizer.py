"""Training a tokenizer: the same bytes every time, finished folders left alone, an even sample of the text."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from toy_text import sentence

from lad_dist.config.corpus_schema import SourceConfig, TokenizerConfig
from lad_dist.config.errors import UserError
from lad_dist.config.load import dump_config
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization.algorithms import MODEL_FILE
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import vocabulary_size
from lad_dist.data.tokenization.train import sample, train_tokenizer

pytest_plugins = ["data_fixtures"]


def config(place: Path, corpus_folder: Path, **changes: Any) -> TokenizerConfig:
    tables: dict[str, Any] = {"out": str(place), "kind": "wordpiece", "vocab_size": 120, "lowercase": True}
    tables["source"] = [{"kind": "text", "path": str(corpus_folder)}]
    return TokenizerConfig.model_validate(tables | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_it_writes_a_tokenizer_and_nothing_else(
    kind: str, toy_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "words"
    size = train_tokenizer(config(out, toy_corpus, kind=kind))
    assert list(out.parent.iterdir()) == [out]
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode(sentence(3, 9)), skip_special_tokens=True) == sentence(3, 9)
    assert size == vocabulary_size(tokenizer)
    (message,) = caplog.messages
    assert message.startswith(f"{out}: trained on ")
    assert (out / MODEL_FILE).exists() == (kind == "unigram")


TRAIN_IN_A_PROCESS = """
import sys
from lad_dist.config.corpus_schema import TokenizerConfig
from lad_dist.config.load import load_config
from lad_dist.data.tokenization.train import train_tokenizer
for path in sys.argv[1:]:
    train_tokenizer(load_config(TokenizerConfig, path))
"""


def test_the_same_request_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = sentence(number, 30) + " naïve Ångström привет ΣΊΣΥΦΟΣ façade" * (number % 3)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    paths = []
    for kind in ("wordpiece", "unigram"):
        request = config(tmp_path / kind, tmp_path / "texts", kind=kind, vocab_size=180)
        train_tokenizer(request)
        paths.append(tmp_path / f"{kind}.toml")
        paths[-1].write_text(dump_config(request.model_copy(update={"out": str(tmp_path / f"{kind} again")})))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", TRAIN_IN_A_PROCESS, *paths]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for kind, files in (("wordpiece", 3), ("unigram", 4)):
        assert len(contents(tmp_path / kind)) == files
        assert contents(tmp_path / kind) == contents(tmp_path / f"{kind} again")


def test_a_finished_folder_is_left_alone_and_another_request_refused(
    toy_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "words"
    train_tokenizer(config(out, toy_corpus))
    before = contents(out)
    caplog.clear()
    (toy_corpus / "000.txt").write_bytes(b"\xff")  # not read again
    train_tokenizer(config(out, toy_corpus))
    assert caplog.messages == [f"{out}: already trained by this request; nothing to do"]
    with pytest.raises(UserError, match="words: written with another lowercase, vocab_size; remove it"):
        train_tokenizer(config(out, toy_corpus, vocab_size=90, lowercase=False))
    assert contents(out) == before
    with pytest.raises(UserError, match="exists and holds no tokenizer trained here"):
        train_tokenizer(config(toy_corpus, toy_corpus))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 20}, "vocab_size = 20 is too small"),
        ({"source": [{"kind": "text", "path": "BLANK"}]}, "blank: no text in it to learn from"),
        ({"source": [{"kind": "text", "path": "/nowhere"}]}, "/nowhere: no such file or folder"),
        ({"out": "/proc/words"}, "/proc/words: cannot be written"),
        ({"out": "BLANK/words/words"}, "words: cannot be written"),
        ({"out": "x" * 300}, r"x: cannot be written \(File name too long\)"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    changes: dict[str, Any], message: str, toy_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "words").touch()
    (tmp_path / "blank" / "a.txt").write_text(" \n\n")
    before = sorted(tmp_path.rglob("*"))
    changes = json.loads(json.dumps(changes).replace("BLANK", str(tmp_path / "blank")))
    with pytest.raises(UserError, match=message):
        train_tokenizer(config(tmp_path / "words", toy_corpus, **changes))
    assert sorted(tmp_path.rglob("*")) == before


# What is read


def numbered(folder: Path, documents: int, lines: int) -> SourceConfig:
    """A source whose lines are 0000000, 0000001, …: 7 characters each."""
    folder.mkdir()
    for number in range(documents):
        text = "\n\n".join(f"{number * lines + line:07d}" for line in range(lines))
        (folder / f"{number:03d}.txt").write_text(text)
    return SourceConfig(kind="text", path=str(folder))


def test_lines_are_spread_evenly_over_a_source(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", documents=10, lines=100)
    numbers = [int(line) for line in sample([source], 7 * 50)]
    assert len(numbers) == 50
    assert {after - before for before, after in pairwise(numbers)} == {20}


def test_a_small_source_is_read_whole(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", documents=3, lines=5)
    assert [int(line) for line in sample([source], 10**6)] == list(range(15))


def test_sources_share_by_weight_and_pass_on_what_they_lack(tmp_path: Path) -> None:
    small, *large = (numbered(tmp_path / name, documents=2, lines=n) for name, n in (("a", 5), ("b", 500), ("c", 500)))
    assert lines_of_each([small, *large], 7 * 110) == [10, 50, 50]
    heavy = large[0].model_copy(update={"weight": 3.0})
    assert lines_of_each([small, heavy, large[1]], 7 * 50) == [10, 30, 10]


def lines_of_each(sources: list[SourceConfig], characters: int) -> list[int]:
    """Return how many lines come from each source: the numbers begin again where a source does."""
    numbers = [int(line) for line in sample(sources, characters)]
    begins = [n for n in range(len(numbers)) if n == 0 or numbers[n] <= numbers[n - 1]]
    assert len(begins) == len(sources)
    return [end - begin for begin, end in pairwise([*begins, len(numbers)])]


def test_of_a_hub_dataset_only_the_beginning_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []

    def documents(source: SourceConfig) -> Any:
        for number in range(1000):
            fetched.append(number)
            yield f"{number:07d}\n\n{number:07d}"

    monkeypatch.setattr(corpus, "documents", documents)
    lines = list(sample([SourceConfig(kind="hub", path="some/where")], 70))
    assert lines == [f"{number:07d}" for number in range(5) for _ in range(2)]
    assert len(fetched) <= 6
