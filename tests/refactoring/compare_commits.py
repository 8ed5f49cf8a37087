"""Same seed, same loss: trains the runs of cases.py at two commits and compares all that they logged and exported.

usage: python tests/refactoring/compare_commits.py OLD NEW [--work DIR] [--only NAME …]
       python tests/refactoring/compare_commits.py --record TREE

OLD, NEW and TREE are git revisions or folders; "." or WORKTREE is the working tree as it is. Floats have to be equal to
the bit. Exit codes: 0 all is equal, 1 something differs or a run failed, 2 a mistake, which one line names.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import inputs
import torch
from case_runs import RunFailed, Tree, losses, run
from cases import CASES, CORPUS, RECORDED, TOKENIZER, Case
from differences import contents, differences

LOSSES = Path(__file__).with_name("losses.json")
EQUAL, DIFFERENT, MISTAKE = 0, 1, 2
MAX_PLACES = 5  # that a line names


class Mistake(Exception):
    """The user's."""


def main(words: Sequence[str]) -> int:
    try:
        arguments = _arguments(words)
        data = inputs.data_folder()
        if arguments.record:
            return record(arguments.record, data)
        return compare(arguments.old, arguments.new, _chosen(arguments.only), arguments.work, data)
    except (Mistake, inputs.DataMissing) as error:
        print(f"compare_commits: {error}", file=sys.stderr)
        return MISTAKE


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", nargs="?")
    parser.add_argument("new", metavar="NEW", nargs="?")
    parser.add_argument("--work", metavar="DIR", type=Path, help="a new folder for the runs, which stay there")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="cases, as the table calls them")
    parser.add_argument("--record", metavar="TREE", help=f"write the losses of some cases into {LOSSES.name}")
    arguments = parser.parse_args(words)
    if bool(arguments.record) == bool(arguments.new) or (arguments.record and arguments.old):
        parser.error("give OLD and NEW, or --record TREE")
    return arguments


def _chosen(names: Sequence[str] | None) -> list[Case]:
    """Return the cases of these names, all if none is given, after the corpus, which some of them read."""
    every = {case.name: case for case in (TOKENIZER, CORPUS, *CASES)}
    for name in names or ():
        if name not in every:
            raise Mistake(f"no case is called {name}; there are {', '.join(every)}")
    return [case for name, case in every.items() if not names or name in names or case is CORPUS]


def compare(old: str, new: str, chosen: Sequence[Case], work: Path | None, data: Path) -> int:
    with _work_folder(work) as folder, _checkout(old) as old_files, _checkout(new) as new_files:
        inputs.make(folder / "inputs", data)
        trees = Tree(f"OLD ({old})", old_files, folder / "old"), Tree(f"NEW ({new})", new_files, folder / "new")
        return max([_compare_case(case, trees) for case in chosen])


def _compare_case(case: Case, trees: tuple[Tree, Tree]) -> int:
    """Print a line about the case; return EQUAL or DIFFERENT."""
    begin = time.monotonic()
    try:
        old, new = (contents(case, run(case, tree)) for tree in trees)
    except (RunFailed, OSError, LookupError) as error:
        print(f"{case.name:<18} FAILED: {error}", flush=True)
        return DIFFERENT
    places = differences(old, new)
    result = f"DIFFERENT in {len(places)} places: {'; '.join(places[:MAX_PLACES])}" if places else "equal"
    print(f"{case.name:<18} {len(old):>4} places {time.monotonic() - begin:>4.0f} s  {result}", flush=True)
    return DIFFERENT if places or not old else EQUAL


@contextlib.contextmanager
def _work_folder(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="compare_commits.") as name:
            yield Path(name).resolve()
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Mistake(f"--work {folder}: not an empty folder; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder.resolve()


@contextlib.contextmanager
def _checkout(tree: str) -> Iterator[Path]:
    """The folder of that name, or one with the files of that revision, for as long as it is needed."""
    folder = inputs.REPOSITORY if tree == "WORKTREE" else Path(tree)
    if folder.is_dir():
        if not (folder / "lad_dist").is_dir():
            raise Mistake(f"{tree}: no working tree of this project, there is no lad_dist in it")
        yield folder.resolve()
        return
    commit = _git(tree, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{tree}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="compare_commits.") as name:
        folder = Path(name).resolve() / "tree"
        _git(tree, "worktree", "add", "--quiet", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            _git(tree, "worktree", "remove", "--force", str(folder))


def _git(tree: str, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(inputs.REPOSITORY), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Mistake(f"{tree}: {' '.join(done.stderr.split()) or 'neither a revision nor a folder'}")
    return done.stdout.strip()


def record(tree: str, data: Path) -> int:
    """Writes the losses of RECORDED in a tree into losses.json."""
    with _work_folder(None) as folder, _checkout(tree) as files:
        inputs.make(folder / "inputs", data)
        recorded = Tree(tree, files, folder / "runs")
        try:
            run(CORPUS, recorded)
            curves = {case.name: losses(run(case, recorded)) for case in RECORDED}
        except RunFailed as error:
            print(error, file=sys.stderr)
            return DIFFERENT
    command = f"python tests/refactoring/compare_commits.py --record {tree}"
    table = {"command": command, "torch": torch.__version__, "losses": curves}
    LOSSES.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return EQUAL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
