"""What a command is, and the text of its `--help`."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lad_dist.config.describe import describe_keys, type_name
from lad_dist.config.errors import UserError
from lad_dist.config.load import keyword_parameters, load_config
from lad_dist.config.schema import ConfigTable, TrainConfig

MAX_WIDTH = 120  # characters of a line of help


@dataclass(frozen=True)
class ConfigCommand:
    """A command whose arguments are a config and changes of its keys.

    Attributes:
        run: Called with the config; returns the exit code. Its docstring is the text of `--help`.
        schema: The schema of the config.
        common_keys: The keys that `--help` explains; `--help all` explains every key.
    """

    run: Callable[[Any], int]
    schema: type[ConfigTable]
    common_keys: Sequence[str]

    def __call__(self, arguments: Sequence[str]) -> int:
        """Run the command; raise UserError where the arguments name no valid config."""
        path, *overrides = arguments
        if "=" in path and not Path(path).exists():
            raise UserError(f"{path}: the first argument is a config; `lad-dist configs` lists those that are shipped")
        return self.run(load_config(self.schema, path, overrides))

    def help_lines(self, name: str, everything: bool) -> Iterator[str]:
        """Yield the explanations of the common keys, or of every key."""
        rows = describe_keys(self.schema)
        shown = rows if everything else [row for row in rows if row[0] in self.common_keys]
        yield f"{'keys' if everything else 'common keys'} of CONFIG (type, default):"
        for key, kind, default, text in shown:
            yield from wrapped(f"{key} ({kind}, {default}): {text}")
        if everything and issubclass(self.schema, TrainConfig):
            yield from method_lines()
        elif len(shown) < len(rows):
            yield f"{len(rows) - len(shown)} more keys, and the arguments of each method: lad-dist {name} --help all"


# A function of the command's arguments that returns the exit code; its docstring is the text of `--help`.
Command = Callable[[list[str]], int] | ConfigCommand


class ArgumentParser(argparse.ArgumentParser):
    """A parser for commands with options: positional and optional arguments may mix, and a mistake is a UserError."""

    def __init__(self, prog: str):
        super().__init__(prog, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message}; see lad-dist {self.prog} --help")


def documentation(command: Command) -> str:
    """Return the docstring of a command."""
    return inspect.getdoc(command.run if isinstance(command, ConfigCommand) else command) or ""


def method_lines() -> Iterator[str]:
    """Yield the arguments of each objective and of each compression."""
    from lad_dist.compression.registry import COMPRESSIONS
    from lad_dist.objectives.registry import OBJECTIVES

    registries: Mapping[str, Mapping[str, Callable[..., Any]]] = {"objective": OBJECTIVES, "compression": COMPRESSIONS}
    for kind, registry in registries.items():
        for name, method in registry.items():
            yield from ("", f'with {kind}.name = "{name}":')
            for key, parameter in keyword_parameters(method).items():
                default = "required" if parameter.default is parameter.empty else repr(parameter.default)
                notes = [note.description for note in getattr(parameter.annotation, "__metadata__", ())
                         if getattr(note, "description", None)]  # fmt: skip
                text = f": {notes[0]}" if notes else ""
                yield from wrapped(f"{kind}.{key} ({type_name(parameter.annotation)}, {default}){text}")


def wrapped(text: str) -> list[str]:
    """Return an explanation as indented lines that fit the terminal."""
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 0)).columns)
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
