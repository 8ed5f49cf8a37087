"""What a person reads: progress on standard error, lines and tables on standard output."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from lad_dist.distributed import ranks
from lad_dist.utils import progress
from lad_dist.utils.text import plain_number

LINE_SECONDS = 10.0  # at least, between two lines about a task where there is no terminal
BAR_WIDTH = 12  # characters of a bar
NUMBERS_WIDTH = 30  # of "12345/12345  100%  12:34" and the spaces between columns
MIN_TEXT = 24  # of the name of a task and the text beside its bar


class TimeLeft:
    """Estimates how long each task still takes, from its reports."""

    def __init__(self) -> None:
        self._begin: dict[str, tuple[float, float]] = {}  # of a task: when it was first reported, and how far it was

    def estimate(self, task: str, done: float, total: float, now: float) -> timedelta | None:
        """Return the time that is left; None at the first report, and where the task begins again or ends."""
        begin, first = self._begin.setdefault(task, (now, done))
        if done >= total or done < first:
            self._begin.pop(task)
            return None
        return timedelta(seconds=round((now - begin) / (done - first) * (total - done))) if done > first else None


class TerminalProgress:
    """Reporter of progress: a bar for each task on a terminal; elsewhere a line now and then, with the time left.

    Only the main process speaks.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._time_left = TimeLeft()
        self._last_line: dict[str, float] = {}
        self.without_lines: set[str] = set()  # tasks of which something else prints lines

    def __call__(self, task: str, done: float, total: float, detail: str = "") -> None:
        """Show that `done` of `total` units of a task are complete."""
        if not ranks.is_main():
            return
        terminal = Terminal(stderr=True)
        if terminal.is_terminal:
            self._update_bar(terminal, task, done, total, detail)
        elif task not in self.without_lines:
            self._print_line(task, done, total, detail)

    def _update_bar(self, terminal: Terminal, task: str, done: float, total: float, detail: str) -> None:
        if self._bars is None:
            if done >= total:
                return  # a task of one report, or one whose bar has come to its end
            # Standard output is perhaps a file: it must not go to the terminal with the bar.
            self._bars = Progress(*_columns(), console=terminal, redirect_stdout=False)
            self._bars.start()
        numbers = {bar.description: bar.id for bar in self._bars.tasks}
        if task not in numbers:
            numbers[task] = self._bars.add_task(task, total=total, detail=detail)
        self._bars.update(numbers[task], completed=done, total=total)
        if detail:
            self._bars.update(numbers[task], detail=detail)
        _share_width(self._bars, terminal.width)
        if all(bar.finished for bar in self._bars.tasks):
            self.close()

    def _print_line(self, task: str, done: float, total: float, detail: str) -> None:
        now = time.monotonic()
        left = self._time_left.estimate(task, done, total, now)
        if left is None:
            self._last_line[task] = now
        elif now - self._last_line[task] >= LINE_SECONDS:
            self._last_line[task] = now
            print(f"{task} {done / total:.1%} done, {left} left  {detail}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bars as they are; the next report begins new ones."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _columns() -> list[ProgressColumn]:
    """Return the columns of a bar."""
    name, detail = (Column(no_wrap=True, overflow="ellipsis") for _ in range(2))
    return [
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(BAR_WIDTH),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}", markup=False, table_column=detail),
    ]


def _share_width(bars: Progress, width: int) -> None:
    """Make bars whole on a terminal of this width: the texts get two thirds of what is left at most, names the rest."""
    rest = max(MIN_TEXT, width - BAR_WIDTH - NUMBERS_WIDTH)
    longest = max(len(bar.fields["detail"]) for bar in bars.tasks)
    name, *_, detail = (column.get_table_column() for column in bars.columns if isinstance(column, ProgressColumn))
    detail.max_width = max(1, min(longest, rest - rest // 3))
    name.max_width = rest - detail.max_width


TERMINAL_PROGRESS = TerminalProgress()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a text while the context lasts: on a terminal until its end, elsewhere as a line once it lasts long."""
    if Terminal(stderr=True).is_terminal or not ranks.is_main():
        with _spinner(text):
            yield
        return
    timer = threading.Timer(LINE_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def loading_libraries() -> contextlib.AbstractContextManager[None]:
    """Say on a terminal that libraries are imported, which takes seconds."""
    return _spinner("loading libraries")


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[None]:
    """Show a text on a terminal while the context lasts, from the main process; nothing elsewhere."""
    terminal = Terminal(stderr=True)
    if not (terminal.is_terminal and ranks.is_main()):
        yield
        return
    TERMINAL_PROGRESS.close()
    spinner = Spinner("dots", Text(text, no_wrap=True, overflow="ellipsis"))
    with Live(spinner, console=terminal, transient=True, redirect_stdout=False):
        yield


class Console:
    """Reports the rows of a training to a person: a bar on a terminal, a line for each row elsewhere."""

    def __init__(self, name: str):
        self.name = name
        self._time_left = TimeLeft()
        self._shown: dict[str, float] = {}  # the last loss and the last score on the dev set
        TERMINAL_PROGRESS.without_lines.add(name)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a row; silent on processes other than the main one."""
        if not ranks.is_main():
            return
        step, steps = row["step"], row["steps"]
        values = {key: value for key, value in row.items() if key not in ("step", "steps")}
        scores = {key: value for key, value in values.items() if key.startswith("dev/")}
        terms = {key: value for key, value in values.items() if "/" not in key}
        if "loss" in terms:
            self._shown["loss"] = terms["loss"]
        for key in list(scores)[:1]:
            self._shown["dev loss" if key == "dev/loss" else key.removeprefix("dev/")] = scores[key]
        left = self._time_left.estimate(self.name, step, steps, time.monotonic())
        if Terminal(stderr=True).is_terminal:
            progress.report(self.name, step, steps, _in_words(self._shown, digits=3))
        elif terms or scores:
            remaining = f" {step / steps:.0%}, {left} left" if left else ""
            line = f"{self.name} step {step}/{steps}{remaining}  {_in_words(terms or scores)}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        TERMINAL_PROGRESS.close()


def _in_words(values: Mapping[str, float], digits: int = 4) -> str:
    return "  ".join(f"{key} {plain_number(value, digits)}" for key, value in values.items())


def say(text: str) -> None:
    """Print a line on standard output, from the main process.

    What reads the output may end before: `| head` is no mistake.
    """
    if not ranks.is_main():
        return
    TERMINAL_PROGRESS.close()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output, from the main process."""
    if not ranks.is_main():
        return
    table = RichTable(title=title)
    for name in header:
        table.add_column(name, overflow="fold")  # a cut number would be another one
    for row in rows:
        table.add_row(*map(_cell, row))
    terminal = Terminal(width=None if sys.stdout.isatty() else 140)
    with terminal.capture() as text:
        terminal.print(table)
    say(text.get().rstrip("\n"))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
