"""What a person reads: progress on standard error, lines and tables on standard output."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from lad_dist.distributed import ranks
from lad_dist.utils import progress
from lad_dist.utils.text import plain_number

LINE_SECONDS = 10.0  # at least, between two lines about a task where there is no terminal


class TerminalProgress:
    """Reporter of progress: a bar for each task on a terminal; elsewhere a line now and then, with the time left.

    Only the main process speaks.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._begin: dict[str, tuple[float, float]] = {}  # of a task: when it was first reported, and how far it was
        self._last_line: dict[str, float] = {}

    def __call__(self, task: str, done: float, total: float, detail: str = "") -> None:
        """Show that `done` of `total` units of a task are complete."""
        if not ranks.is_main():
            return
        terminal = Terminal(stderr=True)
        if terminal.is_terminal:
            self._update_bar(terminal, task, done, total, detail)
        else:
            self._print_line(task, done, total, detail)

    def _update_bar(self, terminal: Terminal, task: str, done: float, total: float, detail: str) -> None:
        if self._bars is None:
            if done >= total:
                return  # a task of one report, or one whose bar has come to its end
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            name, text = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[detail]"))
            # Standard output is perhaps a file: it must not go to the terminal with the bar.
            self._bars = Progress(name, *columns, text, console=terminal, redirect_stdout=False)
            self._bars.start()
        numbers = {bar.description: bar.id for bar in self._bars.tasks}
        if task not in numbers:
            numbers[task] = self._bars.add_task(task, total=total, detail=detail)
        self._bars.update(numbers[task], completed=done, total=total, detail=detail)
        if all(bar.finished for bar in self._bars.tasks):
            self.close()

    def _print_line(self, task: str, done: float, total: float, detail: str) -> None:
        now = time.monotonic()
        begin, first = self._begin.setdefault(task, (now, done))
        if done >= total or done < first:  # it has come to its end, or begins again
            self._begin.pop(task)
            self._last_line.pop(task, None)
            return
        if done == first or now - max(begin, self._last_line.get(task, begin)) < LINE_SECONDS:
            return
        self._last_line[task] = now
        left = timedelta(seconds=round((now - begin) / (done - first) * (total - done)))
        print(f"{task} {done / total:.1%} done, {left} left  {detail}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bars as they are; the next report begins new ones."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


TERMINAL_PROGRESS = TerminalProgress()


class Console:
    """Reports the rows of a training to a person: a bar on a terminal, a line for each row elsewhere."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a row; silent on processes other than the main one."""
        if not ranks.is_main():
            return
        values = {key: plain_number(value) for key, value in row.items() if key not in ("step", "steps")}
        line = "  ".join(f"{key} {value}" for key, value in values.items() if "/" not in key)
        line = line or "  ".join(f"{key} {value}" for key, value in values.items() if key.startswith("dev/"))
        if Terminal(stderr=True).is_terminal:
            progress.report(self.name, row["step"], row["steps"], line)
        elif line:
            print(f"{self.name} step {row['step']}/{row['steps']}  {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        TERMINAL_PROGRESS.close()


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
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    terminal = Terminal(width=None if sys.stdout.isatty() else 140)
    with terminal.capture() as text:
        terminal.print(table)
    say(text.get().rstrip("\n"))
