"""What a person reads: progress of a run, lines and tables on standard output."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from lad_dist.distributed import processes


class Console:
    """Reports rows to a person. On processes other than the main one it is silent.

    every: seconds at least between two lines where there is no terminal, and these lines tell the time left; None: a
    line for each row."""

    def __init__(self, name: str, every: float | None = None):
        self.name, self.every = name, every
        self.begun: tuple[float, int] | None = None  # when, and the step of the first row
        self.said = 0.0
        self.terminal = Terminal(stderr=True)
        self.bar: Progress | None = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        if not processes.is_main():
            return
        line = "  ".join(
            f"{key} {_short(value)}" for key, value in row.items() if key not in ("step", "steps") and "/" not in key
        )
        dev = "  ".join(f"{key} {_short(value)}" for key, value in row.items() if key.startswith("dev/"))
        if self.terminal.is_terminal:
            self._advance(row, line or dev)
        elif self.every is None:
            print(f"{self.name} step {row['step']}/{row['steps']}  {line or dev}", file=sys.stderr, flush=True)
        else:
            self._say_now_and_then(row, line, self.every)

    def _say_now_and_then(self, row: Mapping[str, Any], line: str, every: float) -> None:
        now = time.monotonic()
        if self.begun is None:
            self.begun = now, row["step"]
        begin, first = self.begun
        if now - max(begin, self.said) < every or row["step"] == first:
            return
        self.said = now
        left = timedelta(seconds=round((now - begin) / (row["step"] - first) * (row["steps"] - row["step"])))
        share = row["step"] / row["steps"]
        print(f"{self.name} {share:.1%} done, {left} left  {line}", file=sys.stderr, flush=True)

    def _advance(self, row: Mapping[str, Any], line: str) -> None:
        if self.bar is None:
            columns = (
                TextColumn(self.name),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=self.terminal)
            self.bar.add_task("", total=row["steps"])
            self.bar.start()
        self.bar.update(self.bar.tasks[0].id, completed=row["step"], description=line)
        if row["step"] >= row["steps"]:
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def say(text: str) -> None:
    """A line on standard output, from the main process, for as long as anyone reads it: `| head` is no mistake."""
    if not processes.is_main():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for a person on standard output, from the main process."""
    if not processes.is_main():
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
