"""What a person reads: progress, errors, output."""

import os
import re
import shlex
import subprocess
import sys
from functools import partial

import pytest
from conftest import World
from launching import exit_code

from lad_dist.cli import console
from lad_dist.cli.console import Terminal, TerminalProgress, time
from lad_dist.cli.logging_setup import configure_logging
from lad_dist.distributed.logs import EVERY_RANK, get_logger
from lad_dist.models import loading
from lad_dist.models.loading import load_model
from lad_dist.utils import progress


def test_without_a_terminal_a_line_now_and_then_has_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 104.0, 110.0, 119.9, 160.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    report = TerminalProgress()
    for done in (20, 21, 22, 30, 60):  # the first twenty were done before
        report("corpus", done, 100, f"million tokens {1.5 * done:.4g}")
    assert capsys.readouterr().err.splitlines() == [
        "corpus 22.0% done, 0:06:30 left  million tokens 33",
        "corpus 60.0% done, 0:01:00 left  million tokens 90",
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is a terminal, whatever the environment says (FORCE_COLOR, TTY_COMPATIBLE)."""
    monkeypatch.setattr(console, "Terminal", partial(Terminal, force_terminal=True))


@pytest.mark.usefixtures("terminal")
def test_a_terminal_has_a_bar_until_the_task_ends(capsys: pytest.CaptureFixture[str]) -> None:
    report = TerminalProgress()
    for done in (1, 2, 2):
        report("corpus [1]", done, 2, "a.txt")
        assert (report._bars is None) == (done == 2)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("corpus [1]", "2/2", "a.txt"))


@pytest.mark.usefixtures("terminal")
def test_two_tasks_have_a_bar_each(capsys: pytest.CaptureFixture[str]) -> None:
    report = TerminalProgress()
    report("read", 1, 10)
    report("write", 1, 5)
    assert report._bars is not None
    assert [(bar.description, bar.completed, bar.total) for bar in report._bars.tasks] == [
        ("read", 1, 10),
        ("write", 1, 5),
    ]
    report.close()
    assert report._bars is None
    assert "write" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_a_wait_until_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with console.waiting("loading a"), console.loading_libraries():
        pass
    shown = capsys.readouterr()
    assert ("loading a" in shown.err, "loading libraries" in shown.err, shown.out) == (True, True, "")
    assert shown.err.endswith("\x1b[1A\x1b[2K")  # the line is gone


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_without_a_terminal_a_long_wait_is_a_line(
    seconds: float, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", seconds)
    monkeypatch.setattr(loading.progress, "_waiting", console.waiting)
    with console.loading_libraries():
        load_model(str(world.teacher), "classification")
    size = (world.teacher / "model.safetensors").stat().st_size / 1e6
    assert capsys.readouterr().err == ("" if seconds else f"loading {world.teacher}, {size:.1f} MB\n")


def test_downloads_from_the_hub_show_bars() -> None:
    assert loading.hub_utils.are_progress_bars_disabled() == ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ)


@pytest.mark.parametrize("process", ["main", "other"])
def test_loggers_write_bare_lines_of_the_main_process(
    process: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0" if process == "main" else "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    logger = get_logger("lad_dist.tests")
    configure_logging()
    logger.info("%s: saved", "runs/a")
    logger.debug("details")
    logger.warning("of each rank", extra=EVERY_RANK)
    lines = capsys.readouterr().err.splitlines()
    assert lines == (["runs/a: saved"] if process == "main" else []) + ["of each rank"]


@pytest.mark.parametrize("call", ["say('x' * 1000)", "print_table('t', ('a', 'b'), [('x' * 100, 1.0)] * 10)"])
def test_a_closed_pipe_is_no_mistake(call: str) -> None:
    script = f"from lad_dist.cli import console\nfor _ in range(500): console.{call}\n"
    process = subprocess.run(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_a_table_wider_than_the_terminal_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("t", ("x" * 200, "y"), [("z" * 150, 2.5e-05)])
    shown = capsys.readouterr().out
    assert (shown.count("x"), shown.count("z"), "2.5e-05" in shown) == (200, 150, True)


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


ROWS: tuple[dict[str, float], ...] = (
    {"step": 100, "steps": 100_000, "loss": 2.4631, "hard": 1.2, "grad_norm": 7.1},
    {"step": 12_000, "steps": 100_000, "loss": 1.23456, "hard": 1.1, "grad_norm": 6.5},
    {"step": 12_000, "steps": 100_000, "dev/accuracy": 0.83121, "dev/f1": 0.8},
)


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_of_progress_is_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "Terminal", partial(Terminal, force_terminal=True, width=width))
    monkeypatch.setattr(console, "TERMINAL_PROGRESS", TerminalProgress())
    progress.install(console.TERMINAL_PROGRESS)
    shown = console.Console("lad-rte-teacher-low-0")
    for row in ROWS:
        shown(row)
        progress.report(shown.name, row["step"] + 1, row["steps"])  # the next step has no row
    shown.close()
    progress.install(progress.silent)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    last = next(line for line in reversed(lines) if line.strip())
    assert len(last) <= width
    assert last.startswith("lad-rte-")
    progress.install(bars := TerminalProgress())
    progress.report("asking the teacher", 1, 10, "256 examples each")
    bars.close()
    progress.install(progress.silent)
    assert "…" not in capsys.readouterr().err  # there is room for this name
    for text in ("12001/100000", "12%", "loss 1.23", "accuracy 0.831"):
        assert text in last


def test_without_a_terminal_a_row_is_a_line_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 119.0, 119.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    shown = console.Console("lad")
    for row in ROWS:
        shown(row)
        console.TERMINAL_PROGRESS("lad", row["step"] + 1, row["steps"])
    assert capsys.readouterr().err.splitlines() == [
        "lad step 100/100000  loss 2.463  hard 1.2  grad_norm 7.1",
        "lad step 12000/100000 12%, 0:14:40 left  loss 1.235  hard 1.1  grad_norm 6.5",
        "lad step 12000/100000 12%, 0:14:40 left  dev/accuracy 0.8312  dev/f1 0.8",
    ]
