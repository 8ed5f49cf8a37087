"""Progress of long work: silent until a command installs the terminal's reporter."""

import contextlib
from collections.abc import Callable

# Shows that `done` of `total` units of a task are complete, and a short text beside them: (task, done, total, detail).
# An empty text leaves the last one.
ProgressReporter = Callable[[str, float, float, str], None]


def silent(task: str, done: float, total: float, detail: str) -> None:
    """Show nothing."""


# Shows a text while its context lasts.
WaitingReporter = Callable[[str], contextlib.AbstractContextManager[None]]


def silent_waiting(text: str) -> contextlib.AbstractContextManager[None]:
    """Show nothing."""
    return contextlib.nullcontext()


_reporter: ProgressReporter = silent
_waiting: WaitingReporter = silent_waiting


def install(reporter: ProgressReporter, waiting: WaitingReporter = silent_waiting) -> None:
    """Make these the reporters of the process."""
    global _reporter, _waiting
    _reporter, _waiting = reporter, waiting


def report(task: str, done: float, total: float, detail: str = "") -> None:
    """Tell the installed reporter how far a task is."""
    _reporter(task, done, total, detail)


def waiting(text: str) -> contextlib.AbstractContextManager[None]:
    """Show what the process waits for while the context lasts: work that cannot say how far it is."""
    return _waiting(text)
