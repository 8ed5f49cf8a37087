"""What a person sees while it works."""

import pytest

from lad_dist import cli


def test_lines_come_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 104.0, 110.0, 119.9, 160.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    console = cli.Console("corpus", every=10)
    for step in (20, 21, 22, 30, 60):  # the first twenty were done before
        console({"step": step, "steps": 100, "million tokens": 1.5 * step})
    console.close()
    assert capsys.readouterr().err.splitlines() == [
        "corpus 22.0% done, 0:06:30 left  million tokens 33",
        "corpus 60.0% done, 0:01:00 left  million tokens 90",
    ]
