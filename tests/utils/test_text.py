"""Numbers as a person writes them, and the command as it was typed."""

import sys

import pytest

from lad_dist.utils.text import byte_size, command_line, duration, si_number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under a second"), (0.003, "under a second"), (1, "1 second"), (1.46, "1.5 seconds"), (59.4, "59 seconds"),
        (59.6, "1 minute"), (100, "1.7 minutes"), (3569, "59 minutes"), (3590, "1 hour"), (5400, "1.5 hours"),
        (36_000, "10 hours"), (4_442_400, "1,234 hours"),
    ],
)  # fmt: skip
def test_a_time(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "number", "size"),
    [
        (0, "0", "0 bytes"), (7, "7", "7 bytes"), (999, "999", "999 bytes"), (999.6, "1k", "1 kB"),
        (25_600, "25.6k", "25.6 kB"), (999_600, "1M", "1 MB"), (32_200_000, "32.2M", "32.2 MB"),
        (1.239e9, "1.24G", "1.24 GB"), (141e9, "141G", "141 GB"), (2.5e12, "2.5T", "2.5 TB"),
    ],
)  # fmt: skip
def test_a_number_and_a_size(value: float, number: str, size: str) -> None:
    assert (si_number(value), byte_size(value)) == (number, size)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["/bin/lad-dist", "distill", "a b.toml"], "lad-dist distill 'a b.toml'"),
        (["/x/lad_dist/cli/__main__.py", "env"], "python -m lad_dist.cli env"),
        (["train.py", "--local", "x"], "python train.py --local x"),
        (["launch/tune.py", "--local_rank=3", "c.toml", "run.steps=2"], "deepspeed launch/tune.py c.toml run.steps=2"),
        (["/x/lad_dist/cli/__main__.py", "--local_rank=0", "env"], "deepspeed --module lad_dist.cli env"),
        (["/x/ray/_private/workers/default_worker.py", "--node-ip-address=10.0.0.1"], "lad-dist tune"),
    ],
)
def test_the_command_is_that_of_a_person(argv: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert command_line() == text
