"""The command line that all launch scripts share: `NAME.py CONFIG.toml [dotted.key=value …]`.

    run(doc, schema, function)   parses, calls function(config), ends with the documented exit code
    train_script(doc, schema)    the whole of a script that trains
    plain_script(doc, main)      the whole of one that reads its own words
    say, print_table             what a person reads on standard output
    Console                      a report: a progress bar with time left on a terminal, plain lines elsewhere

Exit codes: 0 done, 1 a crash or a fault that is not the user's, 2 the user's mistake, 3 nothing valid to resume from,
75 stopped early and wants to be run again, 93 died again and again at the same place, 130 interrupted by Ctrl-C.
"""

import contextlib
import errno
import inspect
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from lad_dist.config.describe import describe_keys, type_name
from lad_dist.config.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR, Fault, UserError
from lad_dist.config.load import keyword_parameters, load_config
from lad_dist.config.schema import ConfigTable
from lad_dist.distributed import processes
from lad_dist.distributed.environment import check_environment

# Of the file system: nothing is wrong with the program where these are met.
FILE_SYSTEM_ERRORS = frozenset(
    getattr(errno, name) for name in "EACCES EDQUOT EEXIST EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS".split()
)
MAX_LINE = 280  # characters of a complaint
COMPLAINT_SECONDS = 10  # seconds for another process of the host to complain
LAUNCHER_ARGUMENTS = re.compile(r"--local[_-]rank=\d+|--deepspeed")  # the environment says the same

NamedChoices = Mapping[str, Mapping[str, Callable[..., Any]]]


def run_script(
    doc: str, schema: type[ConfigTable], function: Callable[[Any], int | None], named: Callable[[], NamedChoices] = dict
) -> None:
    """Calls function(config) for the command line's config. `named()` are, for --help, the choices behind each `name`
    key."""
    words = [word for word in sys.argv[1:] if not LAUNCHER_ARGUMENTS.fullmatch(word)]
    if not words or {"-h", "--help"} & set(words):
        print(help_text(doc, schema, named()))
        sys.exit(EXIT_DONE if words else EXIT_USER_ERROR)
    sys.exit(guarded(lambda: function(load_config(schema, words[0], words[1:]))))


def train_script(doc: str, schema: type[ConfigTable]) -> None:
    """The whole of a script that trains."""
    run_script(doc, schema, _train, _choices)


def plain_script(doc: str, main: Callable[[], int | None]) -> None:
    """The whole of a script whose command line is no config and overrides: `main` reads its own words."""
    if {"-h", "--help"} & set(sys.argv):
        print(doc)
        sys.exit(EXIT_DONE)
    sys.exit(guarded(main))


def _train(config: Any) -> int:
    from lad_dist.cli.commands import train_command

    return train_command(config)


def _choices() -> NamedChoices:
    from lad_dist.compression.registry import COMPRESSIONS
    from lad_dist.objectives import OBJECTIVES

    return {"objective": OBJECTIVES, "compression": COMPRESSIONS}


def guarded(work: Callable[[], int | None]) -> int:
    """The exit code of `work`; a UserError is one line on stderr, and so are Ctrl-C and what the system refuses."""
    try:
        check_environment()
        return work() or EXIT_DONE
    except (UserError, Fault) as error:
        _complain(f"error: {one_line(str(error))}")
        return error.code
    except OSError as error:
        if error.errno not in FILE_SYSTEM_ERRORS:
            raise
        said = f"{error.filename}: {error.strerror}; see what the place is, who may write there, and what room is left"
        _complain(f"error: {one_line(said)}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted", patience=0)
        return EXIT_INTERRUPTED


def _complain(line: str, patience: float = COMPLAINT_SECONDS) -> None:
    """To the user, once for each host: what one of them lacks the others may have."""
    with contextlib.suppress(ValueError):  # the ranks are perhaps the mistake
        if 0 < processes.rank() < processes.world_size():
            if processes.local_rank() > 0:
                _await_the_complaint(patience)
                return
            line = f"{socket.gethostname()}: {line}"
    print(line, file=sys.stderr)


def _await_the_complaint(patience: float) -> None:
    """torchrun and deepspeed end all processes once one has left: perhaps the one that was to complain, and was not yet
    there. Those that have met are abreast of each other, and srun's wait for each other (slurm/common.sh)."""
    if "RANK" in os.environ and not dist.is_initialized():
        time.sleep(patience)


def one_line(text: str) -> str:
    """The text as a terminal can show it, its middle left out where it is longer than a reader has patience for."""
    text = "".join(c if c.isprintable() else "\\n" if c == "\n" else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} … {text[3 - MAX_LINE // 2 :]}"


def help_text(doc: str, schema: type[ConfigTable], named: NamedChoices) -> str:
    """The script's docstring, then every key with type, default and description."""
    lines = [inspect.cleandoc(doc), "", "Config keys (type, default):"]
    lines += [f"  {key} ({kind}, {default}): {text}" for key, kind, default, text in describe_keys(schema)]
    for key, choices in named.items():
        for name, function in choices.items():
            lines += ["", f'With {key}.name = "{name}":', *(f"  {key}.{line}" for line in _keyword_lines(function))]
    return "\n".join(lines)


def _keyword_lines(function: Any) -> list[str]:
    found = []
    for name, parameter in keyword_parameters(function).items():
        default = "required" if parameter.default is parameter.empty else repr(parameter.default)
        notes = [text for text in map(_description, getattr(parameter.annotation, "__metadata__", ())) if text]
        found.append(f"{name} ({type_name(parameter.annotation)}, {default}){': ' + notes[0] if notes else ''}")
    return found or ["name alone"]


def _description(note: Any) -> str | None:
    return getattr(note, "description", None)
