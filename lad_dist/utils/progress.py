"""Progress of long work: silent until a command installs a reporter.

install(reporter)            what shows progress from now on; commands install the terminal's
report(task, done, total)    tells the reporter how far a task is
"""

from typing import Protocol


class ProgressReporter(Protocol):
    """Shows progress to a person."""

    def __call__(self, task: str, done: float, total: float, detail: str = "") -> None:
        """Show that `done` of `total` units of a task are complete; `detail` is a short text beside them."""


def silent(task: str, done: float, total: float, detail: str = "") -> None:
    """Show nothing."""


_reporter: ProgressReporter = silent


def install(reporter: ProgressReporter) -> None:
    """Make this the reporter of the process."""
    global _reporter
    _reporter = reporter


def report(task: str, done: float, total: float, detail: str = "") -> None:
    """Tell the installed reporter how far a task is."""
    _reporter(task, done, total, detail)
