"""Short texts for messages, tables and model cards."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath

MAX_REASON = 120  # characters of a library's complaint
LAUNCHERS = ("deepspeed", "torchrun")
# Launchers add these arguments; the environment says the same.
LAUNCHER_ARGUMENTS = re.compile(r"--local[_-]rank=\d+|--deepspeed")
RAY_WORKER = "default_worker.py"  # the program of the processes that Ray starts


def one_line(error: BaseException, limit: int = MAX_REASON) -> str:
    """Return the whole text of an error in one line of at most `limit` characters; without a text, the error's type."""
    text = " ".join(str(error).split())
    return (text if len(text) <= limit else f"{text[:limit]}…").rstrip(".") or type(error).__name__


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most MAX_REASON characters; without a text, the error's type.

    A stack of C++ frames may follow it.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else type(error).__name__


def is_encodable(text: str) -> bool:
    """Return whether the text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_number(value: float, digits: int = 4) -> str:
    """Return the number with this many digits, or as a whole number with commas where it has as many before the point.

    Large numbers are never written as powers of ten.
    """
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def si_number(value: float) -> str:
    """Return the number with three digits and the prefix of its size: 14.2M."""
    number, prefix = _with_prefix(value)
    return number + prefix


def _with_prefix(value: float) -> tuple[str, str]:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:  # what rounds up to 1,000 of a prefix is 1 of the next
            return plain_number(value / factor, digits=3), prefix
    return f"{value:.3g}", ""


def megabytes(size: float) -> str:
    """Return a number of bytes in MB, with one decimal."""
    return f"{size / 1e6:,.1f} MB"


def byte_size(size: float) -> str:
    """Return a number of bytes with three digits, in the unit of its size: 1.24 GB, 35 MB, 2.5 kB."""
    number, prefix = _with_prefix(size)
    return f"{number} {prefix}B" if prefix else f"{number} bytes"


def duration(seconds: float) -> str:
    """Return a time in the unit that a person would use: under a second, 12 seconds, 3.5 minutes, 1,234 hours."""
    if seconds < 1:
        return "under a second"
    unit, size = ("second", 1) if seconds < 59.5 else ("minute", 60) if seconds < 59.5 * 60 else ("hour", 3600)
    number = plain_number(max(1.0, seconds / size), digits=2)
    return f"{number} {unit}{'s' * (number != '1')}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align_right: bool = False) -> str:
    """Return a table in Markdown; `align_right` aligns all columns but the first to the right."""
    rule = ["---", *(["---:" if align_right else "---"] * (len(header) - 1))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def command_line() -> str:
    """Return the command that started this process as it was typed, with that of a launcher where one did.

    On the nodes of a launcher (deepspeed, torchrun) other than the first, it is the launcher's name and the arguments
    of this process. A process of Ray runs a trial: it does not know the arguments of `lad-dist tune`.
    """
    program, *arguments = sys.argv
    if PurePath(program).name == RAY_WORKER:
        return "lad-dist tune"
    typed = _launcher_command() if "LOCAL_RANK" in os.environ else None
    if typed is not None:
        return shlex.join(typed)
    typed_arguments = [argument for argument in arguments if not LAUNCHER_ARGUMENTS.fullmatch(argument)]
    by_deepspeed = len(typed_arguments) < len(arguments)
    if program.endswith("lad-dist"):
        words = ["lad-dist"]
    elif program.endswith("cli/__main__.py"):
        words = ["deepspeed", "--module", "lad_dist.cli"] if by_deepspeed else ["python", "-m", "lad_dist.cli"]
    else:
        words = ["deepspeed" if by_deepspeed else "python", program]
    return shlex.join([*words, *typed_arguments])


def _launcher_command() -> list[str] | None:
    """Return the command of the launcher among this process's ancestors, None where there is none."""
    import psutil  # noqa: PLC0415 (needed only here)

    for ancestor in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            words = ancestor.cmdline()
            names = [PurePath(word).name for word in words[:2]]  # an interpreter comes first
            for place, name in enumerate(names):
                if name in LAUNCHERS:
                    return [name, *words[place + 1 :]]
    return None
