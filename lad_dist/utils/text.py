"""Short texts for messages, tables and model cards."""

import shlex
import sys
from collections.abc import Sequence

MAX_REASON = 120  # characters of a library's complaint


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
    """Return the number with three digits and the prefix of its size: 14.2 M."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def megabytes(size: float) -> str:
    """Return a number of bytes in MB, with one decimal."""
    return f"{size / 1e6:,.1f} MB"


def gigabytes(size: float) -> str:
    """Return a number of bytes in GB, with three digits."""
    return f"{size / 1e9:.3g} GB"


def duration(hours: float) -> str:
    """Return a time in hours, or in minutes where it is less than one hour."""
    return f"{hours:,.3g} hours" if hours >= 1 else f"{hours * 60:.2g} minutes"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align_right: bool = False) -> str:
    """Return a table in Markdown; `align_right` aligns all columns but the first to the right."""
    rule = ["---", *(["---:" if align_right else "---"] * (len(header) - 1))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def command_line() -> str:
    """Return the command that started this process, as a shell reads it."""
    program, *arguments = sys.argv
    if program.endswith("lad-dist"):
        return shlex.join(["lad-dist", *arguments])
    if program.endswith("cli/__main__.py"):
        return shlex.join(["python", "-m", "lad_dist.cli", *arguments])
    return shlex.join(["python", program, *arguments])
