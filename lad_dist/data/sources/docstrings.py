"""Text that every installation carries, and a labelled task made of it: which library does a passage document?

    harvest(libraries)   passages of the docstrings of Python's standard library and of installed packages
    split(passages)      passages to train on and to test on, no module in both
    write(folder)        both as files: a corpus of .txt, train.jsonl and dev.jsonl

Sources are read by `ast` and never imported; `pydoc_data.topics`, the language reference behind `help()`, adds to the
standard library. A passage is a paragraph of prose. One word replaces the names of all libraries, so that no passage
says what it documents.

The files are a function of the installation: modules are taken in the order of a hash of their names, never in that of
a folder.
"""

import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from lad_dist.config.errors import UserError
from lad_dist.data.requests import read_json_table

# Libraries that lad_dist depends on and that differ in what they are for, with the names that would reveal them.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "python": ("cpython", "python"),
    "matplotlib": ("matplotlib", "pyplot", "mpl", "plt."),
    "pandas": ("pandas", "dataframe", "pd."),
    "ray": ("ray", "rllib"),
    "scipy": ("scipy", "numpy", "np."),
    "transformers": ("transformers", "hugging face", "huggingface"),
}
ANONYMOUS = "library"
TESTS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages"}
SHORTEST, LONGEST = 80, 400  # characters of a passage
SHORTEST_LABELLED = 150  # shorter ones often fit any library
SECTION = re.compile(r"^\s*([-=~^*#\"'+`])\1{2,}\s*$")
CODE = re.compile(r"^\s*(>>>|\.\.\.(\s|$)|\.\. |@|:\w+:`?$)")
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # fields of an `ast` node that hold statements
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Passage(NamedTuple):
    """A paragraph of prose, and what it documents."""

    library: str
    module: str
    text: str


def harvest(libraries: Mapping[str, tuple[str, ...]] = LIBRARIES, most: int = 2500) -> list[Passage]:
    """Return at most `most` passages of each library that is installed, names hidden.

    A passage that occurs again, in whatever library, is left out.
    """
    hide = hiding(libraries)
    letters: set[str] = set()
    passages: list[Passage] = []
    for library in libraries:
        new = (
            Passage(library, module, text)
            for module, paragraphs in _documents(library)
            for text in map(hide, paragraphs)
            if _is_new(text, letters)
        )
        passages += islice(new, most)
    return passages


def hiding(libraries: Mapping[str, tuple[str, ...]]) -> Callable[[str], str]:
    """Return a function that replaces the names of all the libraries in a text by one word.

    Names of four letters or more are replaced inside words too ("torchvision"), shorter ones as words of their own.
    """
    names = sorted({name for names in libraries.values() for name in names}, key=len, reverse=True)
    pattern = re.compile("|".join(map(_name_pattern, names)), re.IGNORECASE)
    return lambda text: pattern.sub(lambda match: ANONYMOUS + "." * match[0].endswith("."), text)


def _name_pattern(name: str) -> str:
    if len(name.rstrip(".")) > 3:
        return re.escape(name)
    return rf"\b{re.escape(name)}" + ("" if name.endswith(".") else r"\b")


def _is_new(text: str, earlier: set[str]) -> bool:
    """Return whether no earlier passage has these letters, and add them; digits and signs make no difference."""
    letters = re.sub(r"[^a-z]+", "", text.lower())
    if letters in earlier:
        return False
    earlier.add(letters)
    return True


def _documents(library: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, paragraphs) of a library, in the order of a hash of the module's name; none if not installed."""
    sources = _sources(library)
    for module in sorted(sources, key=_hash):
        source = sources[module]
        texts = docstrings(source) if isinstance(source, Path) else [source]
        yield module, [paragraph for text in texts for paragraph in paragraphs(text)]


def _sources(library: str) -> dict[str, Path | str]:
    """Return the file of each module, and the text of each topic of the language reference."""
    root = _root(library)
    if root is None:
        return {}
    sources: dict[str, Path | str] = {
        f"{library}.{_module(root, file)}": file
        for file in root.rglob("*.py")
        if TESTS.isdisjoint(file.relative_to(root).parts) and not file.name.startswith("test_")
    }
    if library == "python":
        sources |= {f"pydoc_data.topics.{topic}": text for topic, text in topics.items()}
    return sources


def _root(library: str) -> Path | None:
    if library == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _module(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a source file, read without importing it; none of a file that Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in _statements(tree):
        if isinstance(node, DOCUMENTED):
            yield ast.get_docstring(node) or ""


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the statements of a module in the order of `ast.walk`, which is six times slower: it visits expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in BLOCKS:
            waiting.extend(getattr(node, field, ()))


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of prose in a docstring: without code, headings and markup, cut to LONGEST characters."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not CODE.match(line)]
        text_lines = [line for line, after in zip_longest(lines, lines[1:], fillvalue="") if not _heading(line, after)]
        prose = " ".join(ROLE.sub(r"\1", " ".join(text_lines)).replace("`", "").replace("*", "").split())
        if len(prose) >= SHORTEST and _is_prose(prose):
            yield prose if len(prose) <= LONGEST else prose[:LONGEST].rsplit(" ", 1)[0]


def _heading(line: str, after: str) -> bool:
    return bool(SECTION.match(line) or SECTION.match(after))


def _is_prose(text: str) -> bool:
    words = text.split()
    return sum(word.strip(".,;:()'\"").isalpha() for word in words) >= 0.75 * len(words)


def split(passages: Iterable[Passage], share: float) -> tuple[list[Passage], list[Passage]]:
    """Return passages (to train on, to test on): the latter are all of the modules whose hash falls into `share`."""
    train: list[Passage] = []
    test: list[Passage] = []
    for passage in passages:
        (test if _hash("test " + passage.module) < share * 2**64 else train).append(passage)
    return train, test


def balanced(passages: Sequence[Passage], per_library: int) -> list[Passage]:
    """Return `per_library` of the longer passages of every library that has as many, in an order that mixes them."""
    by_library: dict[str, list[Passage]] = {}
    long_enough = [passage for passage in passages if len(passage.text) >= SHORTEST_LABELLED]
    for passage in sorted(long_enough, key=lambda passage: _hash(passage.text)):
        by_library.setdefault(passage.library, []).append(passage)
    chosen = [passage for group in by_library.values() if len(group) >= per_library for passage in group[:per_library]]
    return sorted(chosen, key=lambda passage: _hash(passage.text))


def write(
    folder: Path,
    *,
    most: int = 2500,
    train_each: int = 900,
    few_each: int = 100,
    dev_each: int = 150,
    held_out: float = 0.2,
) -> dict[str, int]:
    """Write a corpus and a labelled task into the folder, and return counts for a person to read.

    corpus/*.txt has a file for each module that is trained on. train.jsonl, few.jsonl and dev.jsonl have columns text
    and label: `train_each`, the first `few_each` of them, and `dev_each` passages of every library. A folder that is
    complete is left as it is. Raise UserError where fewer than two libraries have enough documentation.
    """
    counts_file = folder / "counts.json"
    if counts_file.exists():
        return read_json_table(counts_file, f"remove {folder} and run again")
    train, test = split(harvest(most=most), held_out)
    rows, dev = balanced(train, train_each), balanced(test, dev_each)
    labels = {row.library for row in rows} & {row.library for row in dev}
    if len(labels) < 2:
        raise UserError(
            f"{folder}: only {len(labels)} of {', '.join(LIBRARIES)} with enough documentation are installed"
        )
    modules: dict[str, list[str]] = {}
    for passage in train:
        modules.setdefault(passage.module, []).append(passage.text)
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for module, texts in modules.items():
        (folder / "corpus" / f"{module}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    rows = [row for row in rows if row.library in labels]
    few = [row for library in sorted(labels) for row in [row for row in rows if row.library == library][:few_each]]
    _write_rows(folder / "train.jsonl", rows)
    _write_rows(folder / "few.jsonl", few)
    _write_rows(folder / "dev.jsonl", (row for row in dev if row.library in labels))
    counts = {
        "libraries": len(labels),
        "modules": len(modules),
        "passages": len(train),
        "characters": sum(len(passage.text) for passage in train),
        "train": train_each * len(labels),
        "few": few_each * len(labels),
        "dev": dev_each * len(labels),
    }
    counts_file.write_text(json.dumps(counts) + "\n")
    return counts


def _write_rows(file: Path, passages: Iterable[Passage]) -> None:
    rows = ({"text": passage.text, "label": passage.library} for passage in passages)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
