"""Passages out of docstrings, and the task made of them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.data.sources.docstrings import (
    LIBRARIES,
    LONGEST,
    Passage,
    balanced,
    docstrings,
    harvest,
    hiding,
    paragraphs,
    split,
    write,
)

PROSE = "Returns the index of the first row that holds the value, searching from the left to the right of the table."


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write(folder, most=300, train_each=20, dev_each=5, held_out=0.4)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prose_stays_and_code_headings_and_markup_go() -> None:
    text = f"""Summary
-------
{PROSE.replace("the table", "a :class:`~some.Table`")}

    >>> table.index(3)
    17

.. versionadded:: 3.2
"""
    assert list(paragraphs(text)) == [PROSE.replace("the table", "a some.Table")]


def test_long_prose_is_cut_between_words() -> None:
    (only,) = paragraphs(" ".join([PROSE] * 9))
    assert len(only) <= LONGEST
    assert only.split() == " ".join([PROSE] * 9).split()[: len(only.split())]


def test_docstrings_are_read_and_the_module_is_not_run(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""Of the module."""\nclass C:\n    """Of a class."""\n    def f(self):\n        """Of a method."""\n1 / 0\n'
    )
    assert list(docstrings(module)) == ["Of the module.", "Of a class.", "Of a method."]


def test_a_file_that_does_not_parse_documents_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text('"""Fine."""\ndef f(:\n')
    assert list(docstrings(tmp_path / "broken.py")) == []


def test_names_are_hidden_whatever_stands_around_them() -> None:
    hide = hiding(LIBRARIES)
    assert (
        hide("np.array of a NumPy array, as in pandas' DataFrame")
        == "library.array of a library array, as in library' library"
    )
    assert hide("an array of arrays; Ray arrays") == "an array of arrays; library arrays"


@given(
    st.text(alphabet="abry. ", max_size=30), st.sampled_from([name for names in LIBRARIES.values() for name in names])
)
def test_no_long_name_survives(around: str, name: str) -> None:
    hidden = hiding(LIBRARIES)(f"{around}{name.title()}{around}")
    assert len(name) < 5 or name not in hidden.lower()


def test_no_passage_names_a_library_or_comes_twice() -> None:
    passages = harvest(most=60)
    letters = [re.sub("[^a-z]+", "", passage.text.lower()) for passage in passages]
    assert {passage.library for passage in passages} == set(LIBRARIES)
    assert len(set(letters)) == len(letters)
    assert not [text for text in letters if "pytho" + "n" in text or "matplotlib" in text or "scipy" in text]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 999)), max_size=60), st.floats(0, 1))
def test_no_module_is_on_both_sides(pairs: list[tuple[int, int]], share: float) -> None:
    passages = [Passage("python", f"m{module}", f"text {text}") for module, text in pairs]
    train, test = split(passages, share)
    assert not {p.module for p in train} & {p.module for p in test}
    assert sorted(train + test) == sorted(passages)


def test_every_library_is_in_the_task_as_often_and_short_ones_are_left_out() -> None:
    passages = [
        Passage(library, "m", f"{PROSE} {PROSE} {n}") for library in ("python", "ray") for n in range(7 + len(library))
    ]
    passages += [Passage("scipy", "m", f"{PROSE} {PROSE}"), *(Passage("pandas", "m", f"{n}") for n in range(20))]
    assert Counter(passage.library for passage in balanced(passages, 5)) == {"python": 5, "ray": 5}


def test_the_corpus_holds_no_dev_passage(written: Path) -> None:
    corpus = "\n".join(file.read_text() for file in (written / "corpus").glob("*.txt"))
    train, dev = rows(written / "train.jsonl"), rows(written / "dev.jsonl")
    assert {row["label"] for row in train} == {row["label"] for row in dev} == set(LIBRARIES)
    assert all(row["text"] in corpus for row in train)
    assert not [row for row in dev if row["text"] in corpus]


def test_the_same_installation_gives_the_same_files(written: Path, tmp_path: Path) -> None:
    write(tmp_path, most=300, train_each=20, dev_each=5, held_out=0.4)
    for name in ("train.jsonl", "dev.jsonl"):
        assert (tmp_path / name).read_text() == (written / name).read_text()


def test_what_is_complete_is_left_alone(written: Path) -> None:
    before = (written / "train.jsonl").stat().st_mtime_ns
    assert write(written, most=300, train_each=20, dev_each=5)["libraries"] == len(LIBRARIES)
    assert (written / "train.jsonl").stat().st_mtime_ns == before


def test_too_little_documentation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="enough documentation"):
        write(tmp_path, most=5, train_each=1000, dev_each=1000)
