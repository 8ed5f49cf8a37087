"""The configs that come with the package: `configs:task/lad.toml` names one."""

from itertools import takewhile
from pathlib import Path

from lad_dist.config.errors import UserError
from lad_dist.utils.suggest import did_you_mean

PREFIX = "configs:"
COMMAND_LINES = ("# lad-dist ", "# deepspeed ", "# python ")  # how to run the config, above its description
FOLDER = Path(__file__).parents[1] / "configs"  # in a clone a link to the folder at the top


def config_file(path: str | Path) -> Path:
    """Return the file that a path names; raise UserError where no config of that name is shipped."""
    name = str(path).removeprefix(PREFIX)
    if name == str(path):
        return Path(path)
    if f"{PREFIX}{name}" not in (names := shipped_configs()):
        raise UserError(f"{path}: no such config is shipped; {did_you_mean(str(path), names)}")
    return FOLDER / name


def shipped_configs() -> dict[str, str]:
    """Return the names of all shipped configs, each with the first sentence of its comment."""
    files = sorted(FOLDER.rglob("*.toml"))
    return {f"{PREFIX}{file.relative_to(FOLDER)}": _description(file) for file in files}


def _description(file: Path) -> str:
    comment = takewhile(lambda line: line.startswith("# "), file.read_text(encoding="utf-8").splitlines())
    prose = " ".join(line[2:] for line in comment if not line.startswith(COMMAND_LINES))
    return prose.partition(". ")[0].rstrip(".")
