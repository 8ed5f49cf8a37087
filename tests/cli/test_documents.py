"""Documents are true: files, keys, tables and commands that they show."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT

from lad_dist.cli.command import ConfigCommand
from lad_dist.cli.main import COMMANDS
from lad_dist.config.key_table import key_tables
from lad_dist.config.load import load_config
from lad_dist.report.results_page import page_with_tables

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", ".github/*.md", "configs/**/*.md", "lad_dist/**/*.md", "slurm/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
    if "old_formats" not in path.parts and (ROOT / "lad_dist" / "configs") not in path.parents
)
PAGES = sorted((ROOT / "configs" / "results").glob("*.md"))
PACKAGES = sorted(path.parent for path in (ROOT / "lad_dist").glob("*/__init__.py"))
NAMED_FILE = re.compile(r"\b(?:launch|configs|slurm|tests)/[\w/.-]+\.(?:py|toml|sh|sbatch|md)\b")
LINK = re.compile(r"\]\(([^)#:]+)\)")
LAUNCHERS = {"pretrain_distill": "pretrain", "finetune_teacher": "finetune", "task_distill": "distill"}
STAGES = {"prepare": "prepare", "pretrain": "pretrain", "finetune": "finetune", "task": "distill", "tune": "tune"}
SET_UP = (
    "git clone", "python3 -m venv", "source ", "pip install", "pre-commit install", "export ", "bash tests/",
    "bash slurm/pipeline.sh prepare … ",
)  # fmt: skip


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def commands(document: Path) -> Iterator[str]:
    """Yield the commands of a document's shell blocks, continued lines as one, without comments."""
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                yield command


SHOWN = [(str(path.relative_to(ROOT)), command) for path in DOCUMENTS for command in commands(path)]


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("package", PACKAGES, ids=ids(PACKAGES))
def test_each_package_has_a_short_readme(package: Path) -> None:
    assert 1 <= len((package / "README.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    missing = [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists() and "NAME" not in name]
    assert missing == []
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []


def test_the_key_table_is_that_of_the_schema() -> None:
    """To renew it: python -m lad_dist.config.key_table > configs/README.md."""
    assert (ROOT / "configs" / "README.md").read_text() == key_tables()


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_a_results_page_has_the_tables_of_the_rows_beside_it(page: Path) -> None:
    """To renew them: python -m lad_dist.report.results_page PAGE."""
    assert page.read_text() == page_with_tables(page)
    assert page.read_text().count("<!-- table: ") > 0
    for part in ("**Question.**", "**Set-up.**", "## Findings"):
        assert part in page.read_text()


def check(name: str, arguments: list[str]) -> None:
    """Fail where a command does not exist, or would refuse its arguments before it reads data."""
    command = COMMANDS[name]
    if name == "plan":
        check("pretrain", arguments[:1])
        return
    if not isinstance(command, ConfigCommand) or not arguments or arguments[0] in ("CONFIG", "--help"):
        return
    path, *overrides = arguments
    assert all("=" in word for word in overrides), overrides
    if path.startswith(("configs/", "configs:")):
        load_config(command.schema, ROOT / path if path.startswith("configs/") else path, overrides)


@pytest.mark.parametrize(("document", "command"), SHOWN)
def test_every_command_that_a_document_shows_is_one(document: str, command: str) -> None:
    if command.startswith(SET_UP):
        return
    line = [argument for argument in shlex.split(command) if argument != "…"]
    while re.fullmatch(r"[A-Z_]+=.*", line[0]):
        line.pop(0)
    program, *arguments = line
    if program == "lad-dist":
        check(arguments[0], arguments[1:])
    elif program == "deepspeed":
        start = next(n for n, word in enumerate(arguments) if word.endswith(".py") or word == "--module")
        if arguments[start] == "--module":
            assert arguments[start + 1] == "lad_dist.cli"
            check(arguments[start + 2], arguments[start + 3 :])
        else:
            check(LAUNCHERS[Path(arguments[start]).stem], arguments[start + 1 :])
    elif program == "sbatch":
        script = next(n for n, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[script]).is_file()
        overrides = [word for word in arguments[script + 2 :] if not word.startswith("--each=") and "{" not in word]
        name = Path(arguments[script]).stem
        check(STAGES.get(name, name), [*arguments[script + 1 : script + 2], *overrides])
    else:
        assert (program, arguments[0]) == ("python", "-m") or (ROOT / arguments[0]).exists(), command
