"""The command line that all launch scripts share: `NAME.py CONFIG.toml [dotted.key=value …]`.

    run_script(doc, schema, command)   parses the command line, calls command(config), ends with its exit code
    plain_script(doc, main)            the same for a script that parses arguments of its own, often by ArgumentParser

Exit codes: 0 done, 1 a crash or a fault that is not the user's, 2 the user's mistake, 3 nothing valid to resume from,
75 stopped early and has to run again, 93 died again and again at the same place, 130 interrupted by Ctrl-C.
"""

import argparse
import contextlib
import errno
import inspect
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch.distributed as dist

from lad_dist.cli.console import TERMINAL_PROGRESS
from lad_dist.cli.logging_setup import configure_logging
from lad_dist.config.describe import describe_keys, type_name
from lad_dist.config.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR, Fault, UserError
from lad_dist.config.load import Schema, keyword_parameters, load_config
from lad_dist.config.schema import ConfigTable, TrainConfig
from lad_dist.distributed import processes
from lad_dist.distributed.environment import check_environment
from lad_dist.utils import progress

# Errors of the file system: they say nothing about the program.
FILE_SYSTEM_ERRORS = frozenset(
    getattr(errno, name) for name in "EACCES EDQUOT EEXIST EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS".split()
)
MAX_LINE = 280  # characters of an error message
MESSAGE_SECONDS = 10  # seconds for another process of the host to print the message
LAUNCHER_ARGUMENTS = re.compile(r"--local[_-]rank=\d+|--deepspeed")  # launchers add them; the environment says the same


class ArgumentParser(argparse.ArgumentParser):
    """A parser for `plain_script`: positional and optional arguments may mix, and a mistake is a UserError."""

    def __init__(self, prog: str):
        super().__init__(prog, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message}; see --help")


def run_script(doc: str, schema: type[Schema], command: Callable[[Schema], int | None]) -> NoReturn:
    """Call a command with the config of the command line, and exit.

    Args:
        doc: What --help prints first.
        schema: The schema of the config.
        command: Returns an exit code, None for 0.
    """
    arguments = user_arguments()
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text(doc, schema))
        sys.exit(EXIT_DONE if arguments else EXIT_USER_ERROR)
    with one_line_errors():
        sys.exit(command(load_config(schema, arguments[0], arguments[1:])))


def plain_script(doc: str, main: Callable[[], int | None]) -> NoReturn:
    """Call a function that parses the command line itself, and exit."""
    if {"-h", "--help"} & set(sys.argv):
        print(doc)
        sys.exit(EXIT_DONE)
    with one_line_errors():
        sys.exit(main())


def user_arguments() -> list[str]:
    """Return the arguments of the command line without those that a launcher added."""
    return [argument for argument in sys.argv[1:] if not LAUNCHER_ARGUMENTS.fullmatch(argument)]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Log and show progress for a person, and exit after an error that one line explains.

    A UserError or Fault, an interruption and an error of the file system each become one line on standard error.
    """
    configure_logging()
    progress.install(TERMINAL_PROGRESS)
    try:
        check_environment()
        yield
    except (UserError, Fault) as error:
        _print_error(f"error: {printable_line(str(error))}")
        sys.exit(error.code)
    except OSError as error:
        if error.errno not in FILE_SYSTEM_ERRORS:
            raise
        message = f"{error.filename}: {error.strerror}; check the path, who may write to it, and the space on the disk"
        _print_error(f"error: {printable_line(message)}")
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _print_error("interrupted", patience=0)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        TERMINAL_PROGRESS.close()


def _print_error(line: str, patience: float = MESSAGE_SECONDS) -> None:
    """Print the line once for each host: what one of them lacks, others may have."""
    TERMINAL_PROGRESS.close()
    with contextlib.suppress(ValueError):  # the ranks are perhaps the mistake
        if 0 < processes.rank() < processes.world_size():
            if processes.local_rank() > 0:
                _await_message(patience)
                return
            line = f"{socket.gethostname()}: {line}"
    print(line, file=sys.stderr)


def _await_message(patience: float) -> None:
    """Give the process that prints the message the time to do so.

    Launchers (torchrun, deepspeed) end all processes once one has left, perhaps before that process got here. Processes
    that have joined a group are abreast of each other, and those of srun wait for each other (slurm/common.sh).
    """
    if "RANK" in os.environ and not dist.is_initialized():
        time.sleep(patience)


def printable_line(text: str) -> str:
    """Return the text as a terminal can show it, shortened in the middle where it is long."""
    text = "".join(c if c.isprintable() else "\\n" if c == "\n" else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} … {text[3 - MAX_LINE // 2 :]}"


def help_text(doc: str, schema: type[ConfigTable]) -> str:
    """Return the script's docstring, then every key with type, default and description."""
    lines = [inspect.cleandoc(doc), "", "Config keys (type, default):"]
    lines += [f"  {key} ({kind}, {default}): {text}" for key, kind, default, text in describe_keys(schema)]
    if issubclass(schema, TrainConfig):
        from lad_dist.compression.registry import COMPRESSIONS
        from lad_dist.objectives.registry import OBJECTIVES

        registries: dict[str, Mapping[str, Callable[..., Any]]] = {"objective": OBJECTIVES, "compression": COMPRESSIONS}
        for key, registry in registries.items():
            for name, function in registry.items():
                lines += ["", f'With {key}.name = "{name}":', *(f"  {key}.{line}" for line in _keyword_lines(function))]
    return "\n".join(lines)


def _keyword_lines(function: Any) -> list[str]:
    lines = []
    for name, parameter in keyword_parameters(function).items():
        default = "required" if parameter.default is parameter.empty else repr(parameter.default)
        notes = [text for text in map(_description, getattr(parameter.annotation, "__metadata__", ())) if text]
        lines.append(f"{name} ({type_name(parameter.annotation)}, {default}){': ' + notes[0] if notes else ''}")
    return lines or ["name alone"]


def _description(note: Any) -> str | None:
    return getattr(note, "description", None)
