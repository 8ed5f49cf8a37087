"""Progress of long work: silent until a command installs the terminal's reporter."""

from collections.abc import Callable

# Shows that `done` of `total` units of a task are complete, and a short text beside them: (task, done, total, detail).
ProgressReporter = Callable[[str, float, float, str], None]


def silent(task: str, done: float, total: float, detail: str) -> None:
    """Show nothing."""


_reporter: ProgressReporter = silent


def install(reporter: ProgressReporter) -> None:
    """Make this the reporter of the process."""
    global _reporter
    _reporter = reporter


def report(task: str, done: float, total: float, detail: str = "") -> None:
    """Tell the installed reporter how far a task is."""
    _reporter(task, done, total, detail)
