"""How a command ends: an error that one line explains is one line on standard error, and an exit code.

Exit codes: config/errors.py.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator

from lad_dist.cli.console import TERMINAL_PROGRESS, waiting
from lad_dist.cli.logging_setup import configure_logging
from lad_dist.config.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Fault, UserError
from lad_dist.distributed import ranks
from lad_dist.distributed.environment import check_environment
from lad_dist.utils import progress

# Errors of the file system: they say nothing about the program.
FILE_SYSTEM_ERRORS = frozenset(
    getattr(errno, name) for name in "EACCES EDQUOT EEXIST EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS".split()
)
MAX_LINE = 280  # characters of an error message
MESSAGE_SECONDS = 10  # seconds for another process of the host to print the message


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Log and show progress for a person, and exit after an error that one line explains.

    A UserError or Fault, an interruption and an error of the file system each become one line on standard error.
    """
    configure_logging()
    progress.install(TERMINAL_PROGRESS, waiting)
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
        if 0 < ranks.rank() < ranks.world_size():
            if ranks.local_rank() > 0:
                _await_message(patience)
                return
            line = f"{socket.gethostname()}: {line}"
    print(line, file=sys.stderr)


def _await_message(patience: float) -> None:
    """Give the process that prints the message the time to do so.

    Launchers (torchrun, deepspeed) end all processes once one has left, perhaps before that process got here. Processes
    that have joined a group are abreast of each other, and those of srun wait for each other (slurm/common.sh).
    """
    distributed = sys.modules.get("torch.distributed")  # without it no group was joined, and it takes long to import
    if "RANK" in os.environ and not (distributed and distributed.is_initialized()):
        time.sleep(patience)


def printable_line(text: str) -> str:
    """Return the text as a terminal can show it, shortened in the middle where it is long."""
    text = "".join(c if c.isprintable() else "\\n" if c == "\n" else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} … {text[3 - MAX_LINE // 2 :]}"
