"""What a person sees while it works."""

import shlex
import subprocess
import sys

import pytest

from lad_dist.cli.app import guarded, time
from lad_dist.cli.console import Console


def test_lines_come_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 104.0, 110.0, 119.9, 160.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    console = Console("corpus", every=10)
    for step in (20, 21, 22, 30, 60):  # the first twenty were done before
        console({"step": step, "steps": 100, "million tokens": 1.5 * step})
    console.close()
    assert capsys.readouterr().err.splitlines() == [
        "corpus 22.0% done, 0:06:30 left  million tokens 33",
        "corpus 60.0% done, 0:01:00 left  million tokens 90",
    ]


@pytest.mark.parametrize("call", ["say('x' * 1000)", "print_table('t', ('a', 'b'), [('x' * 100, 1.0)] * 10)"])
def test_a_reader_that_has_seen_enough_is_no_mistake(call: str) -> None:
    script = f"from lad_dist.cli import app\nfor _ in range(500): app.{call}\n"
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert guarded(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
