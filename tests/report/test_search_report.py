"""A search as a report: hand-made records whose best trial, most important key and front are known."""

import csv
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomli_w
from complete_runs import run
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.config.search_schema import RANGES
from lad_dist.report import search_importance, search_plots, search_trials
from lad_dist.report.build import build_report
from lad_dist.report.search_trials import read_search
from lad_dist.runs.search_record import MINIMISED, TrialState, cost
from lad_dist.search import metrics, space
from lad_dist.search.record import SearchRecord
from lad_dist.training import best_model

LR, LAYERS, WORDS = "task.optim.lr", "task.student.num_hidden_layers", "task.student.layers"
SPACE = {LR: {"loguniform": [1e-5, 1e-3]}, LAYERS: {"randint": [2, 9]}, WORDS: {"choice": ["even", [1, 2, 4]]}}


def new_search(folder: Path, **changes: Any) -> SearchRecord:
    """Write the search.toml of a search; return the empty record. The changes are by table."""
    options = {"name": folder.name, "dir": str(folder.parent), "num_samples": 12, "processes": 2, "gpus": 0.5}
    tables = {
        "search": options | changes.pop("search", {}),
        "stage": [{"name": "task", "base": "base.toml"}],
        "space": SPACE,
        "base": {"base.toml": {"run": {"name": "x"}}},
    }
    folder.mkdir(parents=True)
    (folder / "search.toml").write_text(tomli_w.dumps(tables | changes))
    return SearchRecord(folder / "trials.jsonl")


def add(record: SearchRecord, values: Mapping[str, float], sample: dict[str, Any] | None = None, **end: Any) -> str:
    """Record a trial that ends with these values."""
    name = f"trial-{len(record.trials):03}"
    record.begin(TrialState(name, sample or {}, sample))
    end = {"status": "completed", "seconds": 60.0, "step": 40, "values": dict(values), **end}
    record.end(name, **end)
    return name


def end_search(folder: Path, names: Sequence[str]) -> None:
    (folder / "results.json").write_text(json.dumps({"metrics": list(names), "trials": [], "failed": []}))


def sample(lr: float, layers: int = 4, words: Any = "even") -> dict[str, Any]:
    return {LR: lr, LAYERS: layers, WORDS: words}


def table_of(text: str, after: str = "") -> list[list[str]]:
    """Return the cells of the first table after a text."""
    lines = text.partition(after)[2].splitlines() if after else text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows if "---" not in line]


def varied(folder: Path) -> SearchRecord:
    """A search that has trials of each status; trial-002 is the best, and trial-000 the base config."""
    record = new_search(folder)
    add(record, {"accuracy": 0.7, "f1": 0.1})
    add(record, {}, sample(1e-4, words=[1, 2, 4]), status="failed", error="a | b", step=0)
    add(record, {"accuracy": 0.9}, sample(2e-4), seconds=120.0)
    add(record, {"accuracy": 0.8}, sample(5e-4, 3), status="stopped", step=20, seconds=30.0)
    add(record, {}, sample(1e-3, 8), status="refused", error="parameters 9 are above", step=0, seconds=0.0)
    record.begin(TrialState("trial-005", sample(1e-5), sample(1e-5)))
    record.score("trial-005", 10, {"accuracy": 0.95})
    return record


def test_trials_best_first_and_their_hours(tmp_path: Path) -> None:
    varied(tmp_path / "s")
    text = build_report([tmp_path / "s"])
    header, *rows = table_of(text)
    assert header == ["trial", LR, LAYERS, WORDS, "accuracy", "n", "step", "status", "minutes"]
    assert rows == [
        ["trial-002", "0.0002", "4", "even", "0.9", "1", "40", "completed", "2.0"],
        ["trial-003", "0.0005", "3", "even", "0.8", "1", "20", "stopped at step 20", "0.5"],
        ["trial-000", "-", "-", "-", "0.7", "1", "40", "completed", "1.0"],
        ["trial-001", "0.0001", "4", "[1,2,4]", "-", "-", "-", "failed: a \\| b", "1.0"],
        ["trial-004", "0.001", "8", "even", "-", "-", "-", "refused: parameters 9 are above", "-"],
        ["trial-005", "1e-05", "4", "even", "0.95", "-", "10", "not ended", "-"],
    ]
    totals = {row[0]: row[1:] for row in table_of(text, "## Totals")[1:]}
    assert totals["completed"] == ["2", "0.05", "0.1", "0.05"]
    assert totals["all"] == ["6", "0.075", "0.15", "0.075"]
    assert {status: row[0] for status, row in totals.items()} == {
        "completed": "2", "failed": "1", "stopped": "1", "refused": "1", "not ended": "1", "all": "6"
    }  # fmt: skip
    assert "# s: 6 trials by accuracy\n\nThe search has not ended" in text
    assert "* trial-000 is the base config." in text
    assert "needs at least 10 trials with drawn values and a score, and 2 have both" in text


def test_a_search_that_has_ended(tmp_path: Path) -> None:
    record = new_search(tmp_path / "s")
    for score in (0.2, 0.3):
        add(record, {"accuracy": 0.5, "f1": score}, sample(1e-4))
    end_search(tmp_path / "s", ["f1"])
    (tmp_path / "s" / "best.toml").write_text("")
    text = build_report([tmp_path / "s"])
    assert "# s: 2 trials by f1\n\nBest first" in text
    assert [row[0] for row in table_of(text)[1:]] == ["trial-001", "trial-000"]
    assert f"* The config of the best trial: {tmp_path / 's' / 'best.toml'}." in text


def test_repetitions_are_a_mean_and_come_first(tmp_path: Path) -> None:
    record = new_search(tmp_path / "s", search={"metric": "accuracy", "num_seeds": 3, "finalists": 1})
    add(record, {"accuracy": 0.9}, sample(1e-4))
    add(record, {"accuracy": 0.95}, sample(2e-4), status="stopped")
    for seed, score in ((1, 0.8), (2, 0.85)):
        record.begin(TrialState(f"trial-000-seed{seed}", sample(1e-4), sample(1e-4), seed))
        record.end(f"trial-000-seed{seed}", "completed", seconds=60.0, values={"accuracy": score}, step=40)
    record.begin(TrialState("trial-001-seed1", sample(2e-4), sample(2e-4), 1))
    record.end("trial-001-seed1", "failed", error="why")
    text = build_report([tmp_path / "s"])
    rows = table_of(text)[1:]
    assert rows[0] == ["trial-000", "0.0001", "4", "even", "0.85 ± 0.029", "3", "40", "completed", "3.0"]
    assert [row[0] for row in rows] == ["trial-000", "trial-001", "trial-001-seed1"]
    assert "± is the standard error of a mean over n seeds" in text


def test_the_front(tmp_path: Path) -> None:
    names = ["accuracy", "parameters", "latency"]
    record = new_search(tmp_path / "s", search={"metric": names})
    points = [(0.9, 9e6, 0.09), (0.8, 5e6, 0.05), (0.8, 6e6, 0.04), (0.7, 6e6, 0.06), (0.9, 9e6, 0.09)]
    for accuracy, parameters, latency in points:
        add(record, {"accuracy": accuracy, "parameters": parameters, "latency": latency}, sample(1e-4))
    add(record, {"accuracy": 0.99}, sample(1e-4))  # without the others it is on no front
    search = read_search(tmp_path / "s")
    assert sorted(search.front()) == ["trial-000", "trial-001", "trial-002", "trial-004"]
    figure = search_plots.fronts(search)
    assert figure is not None
    labels = {axes.get_xlabel(): {text.get_text() for text in axes.texts} for axes in figure.axes}
    assert labels == {
        "parameters": {"trial-000", "trial-001", "trial-004"}, "latency": {"trial-000", "trial-002", "trial-004"}
    }  # fmt: skip
    assert "better by all metrics than one of these: trial-000, trial-004, trial-001, trial-002." in build_report(
        [tmp_path / "s"]
    )


def test_the_most_important_key_is_on_top(tmp_path: Path) -> None:
    record = new_search(tmp_path / "s")
    chance = random.Random(0)
    for number in range(24):
        drawn = sample(10 ** chance.uniform(-5, -3), chance.randint(2, 8), chance.choice(["even", [1, 2, 4]]))
        if number == 9:
            assert not search_importance.are_enough(read_search(tmp_path / "s"))
            assert search_importance.figure(read_search(tmp_path / "s")) is None
        add(record, {"accuracy": 2.0 + 0.3 * math.log10(drawn[LR]) + 0.03 * drawn[LAYERS]}, drawn)
    table = search_importance.importance(read_search(tmp_path / "s"), "accuracy")
    assert list(table.index) == [LR, LAYERS, WORDS]
    assert table["mean"][LR] > 0.5 > 0.1 > abs(table["mean"][WORDS])


def test_the_history(tmp_path: Path) -> None:
    varied(tmp_path / "s")
    rows = search_plots.history_rows(read_search(tmp_path / "s"), "accuracy")
    assert rows["number"].tolist() == [0, 2, 3, 5]
    assert rows["status"].tolist() == ["completed", "completed", "stopped", "not ended"]
    assert rows["best"].ffill().tolist() == [0.7, 0.9, 0.9, 0.9]  # what has not ended is no best
    record = new_search(tmp_path / "down", search={"metric": "loss"})
    for loss in (2.0, 3.0, 1.0):
        add(record, {"loss": loss}, sample(1e-4))
    rows = search_plots.history_rows(read_search(tmp_path / "down"), "loss")
    assert rows["best"].tolist() == [2.0, 2.0, 1.0]
    figure = search_plots.history(read_search(tmp_path / "down"))
    assert figure is not None
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["base config"] == [2.0, 2.0]
    assert lines["best so far"] == [2.0, 2.0, 1.0]


def test_keys_of_axes_stand_where_they_are_drawn(tmp_path: Path) -> None:
    method = {"lad": {"task.objective.name": "lad", "task.objective.hidden": {"uniform": [0.0, 9.0]}}, "kd": {}}
    record = new_search(tmp_path / "s", space={LR: SPACE[LR], "method": method})
    add(record, {"accuracy": 0.7}, {"method": "lad", "task.objective.hidden": 4.5, LR: 1e-4})
    add(record, {"accuracy": 0.8}, {"method": "kd", LR: 1e-5})
    search = read_search(tmp_path / "s")
    keys = {key.name: key for key in search.keys}
    assert keys["method"].categories == ["lad", "kd"]
    assert (keys[LR].logarithmic, keys[LR].categories) == (True, None)
    assert (keys["task.objective.hidden"].logarithmic, keys["task.objective.hidden"].categories) == (False, None)
    positions = search.positions()
    assert positions.loc["trial-000"].to_dict() == {"method": 0.0, "task.objective.hidden": 4.5, LR: pytest.approx(-4)}
    assert math.isnan(positions.loc["trial-001", "task.objective.hidden"])
    figure = search_plots.parallel(search)
    assert figure is not None
    lines = [list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert lines == [[0.0, 0.5, pytest.approx(1.0)], [1.0, search_plots.ABSENT, 0.0]]  # the best one last
    assert "absent" in {text.get_text() for text in figure.axes[0].texts}


def test_files(tmp_path: Path) -> None:
    record = new_search(tmp_path / "s", search={"metric": ["accuracy", "bytes"]})
    for number in range(12):
        add(record, {"accuracy": number / 20, "bytes": 1e6 + number % 5}, sample(1e-4 + number * 1e-5, 2 + number % 3))
    text = build_report([tmp_path / "s"], out=tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "front.png", "history.png", "importance.png", "parallel.png", "report.md", "trials.csv"
    ]  # fmt: skip
    with (tmp_path / "out" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert (rows[3]["trial"], rows[3]["status"], rows[3]["dev/accuracy"], rows[3][LAYERS]) == (
        "trial-003", "completed", "0.15", "2"
    )  # fmt: skip


def test_searches_and_runs_are_sections(tmp_path: Path) -> None:
    varied(tmp_path / "b" / "s")
    varied(tmp_path / "a" / "s")
    new_search(tmp_path / "grid", space={}, grid={"seed": {"0": {}, "1": {}}})
    run(tmp_path / "grid" / "kd-0", "kd", "rte", 0, 0.5)
    run(tmp_path / "b" / "s" / "trial-000", "lad", "rte", 0, 0.6)  # the search is shown, not the runs in it
    folders = [tmp_path / "grid", tmp_path / "b" / "s", tmp_path / "a" / "s"]
    text = build_report(folders, out=tmp_path / "out")
    titles = [line for line in text.splitlines() if line.startswith("# ")]
    assert titles == ["# s: 6 trials by accuracy", "# s: 6 trials by accuracy", "# 1 method on 1 task"]
    assert "| lad |" not in text
    assert text == build_report([*reversed(folders), folders[1]])
    files = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.png")}
    assert files == {"report.png", *(f"{name}-s/{plot}.png" for name in "ab" for plot in ("history", "parallel"))}


def test_a_search_that_has_just_begun(tmp_path: Path) -> None:
    new_search(tmp_path / "s")
    assert "No trial has begun." in build_report([tmp_path / "s"], out=tmp_path / "out")
    record = SearchRecord(tmp_path / "s" / "trials.jsonl")
    record.begin(TrialState("trial-000", sample(1e-4), {}))
    assert "| trial-000 | 0.0001 | 4 | even | - | - | not ended | - |" in build_report(
        [tmp_path / "s"], out=tmp_path / "out"
    )
    assert list((tmp_path / "out").glob("*.png")) == []


def test_a_line_that_is_being_written_counts_for_nothing(tmp_path: Path) -> None:
    record = varied(tmp_path / "s")
    before = build_report([tmp_path / "s"])
    with record.file.open("a") as file:
        file.write('{"event": "end", "trial": "trial-005", "sta')
    size = record.file.stat().st_size
    assert build_report([tmp_path / "s"]) == before
    assert record.file.stat().st_size == size
    assert SearchRecord(record.file).trials == record.trials  # which removes it
    assert record.file.stat().st_size < size


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("search.toml", lambda text: text[:40] + "[", "search.toml: not valid TOML"),
        ("search.toml", lambda text: text.replace("num_samples", "num_sample"), "search.num_sample: no such key"),
        ("trials.jsonl", lambda text: text.replace('"seed": 0', '"seed": "0"', 1), "trials.jsonl:1: damaged"),
        ("trials.jsonl", lambda text: text.replace("0.7", '"much"', 1), "damaged (TypeError: accuracy is 'much')"),
        ("trials.jsonl", lambda text: f"[]\n{text}", "trials.jsonl:1: damaged (TypeError: no JSON object)"),
        ("trials.jsonl", lambda text: text[20:], "trials.jsonl:1: damaged"),
        ("results.json", lambda text: text[:20], "results.json: damaged"),
        ("results.json", lambda _: "[]", "results.json: damaged"),
        ("results.json", lambda _: '{"metrics": [1]}', "results.json: damaged (metrics is [1])"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, name: str, damage: Callable[[str], str], message: str) -> None:
    varied(tmp_path / "s")
    end_search(tmp_path / "s", ["accuracy"])
    file = tmp_path / "s" / name
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError) as caught:
        build_report([tmp_path / "s"], out=tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_search_has_no_baseline(tmp_path: Path) -> None:
    varied(tmp_path / "s")
    with pytest.raises(UserError, match="--baseline kd: a search is compared by scores"):
        build_report([tmp_path / "s"], "kd")


def test_metrics_and_distributions_are_those_of_the_search() -> None:
    assert {*RANGES, "choice"} == space.DISTRIBUTIONS.keys()
    assert {*metrics.SIZES, best_model.LOSS, metrics.LATENCY} == MINIMISED


scores = st.sampled_from([0.1, 0.2, 0.3])
ends = st.tuples(st.sampled_from(["completed", "stopped", "failed"]), st.lists(scores, min_size=1, max_size=3))


@settings(max_examples=40)
@given(trials=st.lists(ends, min_size=1, max_size=8), metric=st.sampled_from(["accuracy", "loss"]))
def test_samples_with_all_seeds_come_first_and_the_better_before_the_worse(
    trials: list[tuple[str, list[float]]], metric: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("order") / "s"
    record = new_search(folder, search={"metric": metric})
    for number, (status, values) in enumerate(trials):
        for seed, value in enumerate(values):
            name = f"trial-{number:03}{f'-seed{seed}' if seed else ''}"
            record.begin(TrialState(name, sample(1e-4), {}, seed))
            record.end(name, status, values={metric: value}, step=number % 3, seconds=1.0)  # type: ignore[arg-type]
    by_name = {
        f"trial-{number:03}": statistics.fmean(values)
        for number, (status, values) in enumerate(trials)
        if status != "failed"
    }
    search = read_search(folder)
    assert {each.name: each.mean(metric) for each in search.scored} == pytest.approx(by_name)
    counts = [len(each.trials) for each in search.scored]
    for (one, fewer), (other, more) in itertools.pairwise(zip(search.scored, counts, strict=True)):
        assert fewer >= more or fewer < max(counts)
        if fewer == more == max(counts):
            costs = [cost(metric, each.mean(metric)) for each in (one, other)]
            assert costs == sorted(costs)
    assert len(search.others) == sum(len(values) for status, values in trials if status == "failed")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_no_other_trial_is_better_than_the_front(points: list[tuple[int, int]]) -> None:
    means = pd.DataFrame(points, columns=["accuracy", "loss"], index=[str(number) for number in range(len(points))])
    front = set(search_trials.front(means))
    for name, (score, loss) in zip(means.index, points, strict=True):
        is_beaten = any(a >= score and b <= loss and (a, b) != (score, loss) for a, b in points)
        assert (name in front) == (not is_beaten)
