"""The record of a search: read back as it was written, also where a crash cut a line off."""

from pathlib import Path

import pytest

from lad_dist.config.errors import UserError
from lad_dist.runs.search_record import TrialState
from lad_dist.search.record import SearchRecord


def written(file: Path) -> SearchRecord:
    record = SearchRecord(file)
    record.begin(TrialState("trial-000", {"task.optim.lr": 0.1}, {"task.optim.lr": 0.1}))
    record.score("trial-000", 2, {"accuracy": 0.5})
    record.begin(TrialState("trial-001", {"layers": [1, 3]}, {"layers": "[1, 3]"}))
    record.pause("trial-001", 3.0)
    record.end("trial-000", "completed", seconds=4.0, values={"accuracy": 0.75}, step=4)
    record.end("trial-001", "failed", seconds=2.0, error="no memory")
    return record


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = written(tmp_path / "s" / "trials.jsonl")
    again = SearchRecord(record.file)
    assert again.trials == record.trials
    first, second = again.trials.values()
    assert (first.status, first.values, first.step, first.scores) == (
        "completed", {"accuracy": 0.75}, 4, [(2, {"accuracy": 0.5})]
    )  # fmt: skip
    assert (second.status, second.seconds, second.error) == ("failed", 5.0, "no memory")


def test_a_trial_that_begins_again_has_no_status_and_keeps_earlier_scores(tmp_path: Path) -> None:
    record = written(tmp_path / "trials.jsonl")
    record.begin(record.trials["trial-001"])
    record.score("trial-001", 4, {"accuracy": 0.5})
    record.score("trial-001", 2, {"accuracy": 0.25})  # from its checkpoint, a step for the second time
    trial = SearchRecord(record.file).trials["trial-001"]
    assert (trial.status, trial.error, trial.scores) == (None, None, [(2, {"accuracy": 0.25})])


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    record = written(tmp_path / "trials.jsonl")
    text = record.file.read_bytes()
    lines = text.splitlines(keepends=True)
    for length in range(len(text) - len(lines[-1]), len(text)):
        record.file.write_bytes(text[:length])
        again = SearchRecord(record.file)
        assert again.trials["trial-001"].status is None
        again.end("trial-001", "failed", seconds=2.0, error="no memory")
        assert record.file.read_bytes() == text


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "nonsense", '{"event": "end", "trial": "trial-009", "status": "completed"}']
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    record = written(tmp_path / "trials.jsonl")
    with record.file.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"trials.jsonl:7: damaged"):
        SearchRecord(record.file)
