"""What a command is, and the text of its `--help`."""

import argparse
import inspect
import re
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
OPTION = re.compile(r"\S+(?: \S+)* {2,}")  # of a docstring's line


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
            methods = ", and the arguments of each method" if issubclass(self.schema, TrainConfig) else ""
            yield f"{len(rows) - len(shown)} more keys{methods}: lad-dist {name} --help all"


# A function of the command's arguments that returns the exit code; its docstring is the text of `--help`.
Command = Callable[[list[str]], int] | ConfigCommand


class ArgumentParser(argparse.ArgumentParser):
    """A parser for commands with options: positional and optional arguments may mix, and a mistake is a UserError."""

    def __init__(self, prog: str):
        super().__init__(prog, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message}; see lad-dist {self.prog} --help")


def add_form_options(parser: ArgumentParser) -> None:
    """Add an option for each form in which ONNX files are written."""
    for option in ("--onnx", "--fp16", "--int8"):
        parser.add_argument(option, action="store_true")


def requested_forms(options: argparse.Namespace) -> list[str]:
    """Return the names of the requested forms, as lad_dist.compression.footprint has them."""
    names = {"onnx": options.onnx, "onnx fp16": options.fp16, "onnx int8": options.int8}
    return [name for name, requested in names.items() if requested]


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


def wrapped(text: str, first: str = "  ", others: str = "      ") -> list[str]:
    """Return a text as lines that fit the terminal: the `first` one and the `others` begin with these."""
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 0)).columns)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def wrapped_document(text: str) -> Iterator[str]:
    """Yield the lines of a docstring as they fit the terminal.

    Paragraphs are filled, and what an option means goes on below itself. Commands stay whole, to be copied.
    """
    for number, block in enumerate(text.split("\n\n")):
        if number:
            yield ""
        lines = block.split("\n")
        if lines[0].startswith(("usage:", "example:")):
            yield from lines
            continue
        items: list[tuple[str, str]] = []  # an option, or nothing before a paragraph, and the text
        for line in lines:
            option = OPTION.match(line)
            if option:
                items.append((option[0], line[option.end() :]))
            else:
                first, content = items.pop() if items else ("", "")
                items.append((first, f"{content} {line.strip()}"))
        for first, content in items:
            yield from wrapped(content.strip(), first, " " * len(first))
