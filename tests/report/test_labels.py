"""Methods are runs of one label: the default label, the baseline, and the settings that differ where a label is one."""

from pathlib import Path
from typing import Any

import pytest
from complete_runs import METRICS, load_comparison, method_names, run
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.report.build import build_report
from lad_dist.report.comparison import distinct_suffixes


def test_a_run_without_label_has_the_names_of_objective_and_compressions(tmp_path: Path) -> None:
    run(tmp_path / "one", "kd", "rte", 0, 0.5)
    run(tmp_path / "two", "kd", "rte", 1, 0.5, compression=[{"name": "low_rank"}, {"name": "prune"}])
    run(tmp_path / "three", "kd", "rte", 2, 0.5, run__label="ours")
    assert method_names(tmp_path) == {"kd", "kd + low_rank + prune", "ours"}


def test_the_baseline_is_a_label(tmp_path: Path) -> None:
    for seed in (0, 1):
        for label in ("random-20", "random-50", "adapting-50"):
            run(tmp_path / f"{label}-{seed}", "supervised", "rte", seed, 0.5, run__label=label)
    text = build_report([tmp_path], "random-50").partition("## Against random-50\n")[2].partition("## Loyalty")[0]
    assert "| adapting-50 |" in text
    assert "| random-20 |" in text
    assert "| random-50 |" not in text
    assert load_comparison(tmp_path, "random-20").test("adapting-50", "rte").pairs == 2
    assert "Nothing to compare: no run has this label" in build_report([tmp_path])  # kd
    with pytest.raises(UserError, match='"randon-20" is none of the methods: did you mean "random-20"'):
        load_comparison(tmp_path, "randon-20")


def test_the_notes_name_two_runs_of_one_label_and_task_that_differ(tmp_path: Path) -> None:
    for task in METRICS:  # tuned for each
        run(tmp_path / f"lad-{task}", "lad", task, 0, 0.5, optim__lr=1e-4 * len(task))
    run(tmp_path / "other", "lad", "rte", 1, 0.5, optim__lr=2e-5, data__num_workers=2)
    expected = (
        f"* Runs of lad on rte differ: optim.lr is 0.0003 in {tmp_path}/lad-rte and 2e-05 in {tmp_path}/other. "
        "If these are two methods, give each a run.label."
    )
    assert build_report([tmp_path]).partition("## Notes\n\n")[2].splitlines() == [expected]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"objective__name": "kd"}, {"objective__name": "lad"}),
        ({"student__path": "runs/first-3/export"}, {"student__path": "runs/first-4/export"}),  # another run's seed
        ({"student__layers": [1, 2, 3]}, {"student__layers": [1, 2, 4]}),
        ({"compression": [{"name": "prune", "sparsity": 0.5}]}, {"compression": [{"name": "prune", "sparsity": 0.7}]}),
        ({"run__spike_sigma": 6.0}, {}),
    ],
)
def test_runs_of_one_label_that_differ(one: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    for seed, changes in enumerate((one, other)):
        run(tmp_path / str(seed), "kd", "rte", seed, 0.5, run__label="ours", **changes)
    assert method_names(tmp_path) == {"ours"}
    assert "* Runs of ours on rte differ: " in build_report([tmp_path])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"teacher__path": "a"}, {"teacher__path": "b"}),
        ({"teacher__path": "a", "student__path": "a"}, {"teacher__path": "b", "student__path": "b"}),
        ({"student__path": "runs/first-rte-0/export"}, {"student__path": "runs/first-rte-1/export"}),
        ({"student__path": "mini-1"}, {"student__path": "mini-1"}),
        ({"run__spike_sigma": 0.0}, {}),  # which an earlier version did not know
        ({"data__num_workers": 2, "run__eval_every": 5}, {}),
    ],
)
def test_runs_that_differ_in_teacher_and_seed_alone(one: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    for seed, changes in enumerate((one, other)):
        run(tmp_path / str(seed), "kd", "rte", seed, 0.5, **changes)
    assert "Runs of kd on rte differ" not in build_report([tmp_path])


def test_the_settings_of_each_method(tmp_path: Path) -> None:
    for norm in ("token", "sequence"):
        for task in METRICS:
            options = {"run__label": norm, "objective__norm": norm, "optim__lr": 1e-4 * len(task) * len(norm)}
            run(tmp_path / f"{norm}-{task}", "lad", task, 0, 0.5, **options)
    run(tmp_path / "kd", "kd", "rte", 0, 0.5)
    lines = build_report([tmp_path]).splitlines()
    assert "* kd: objective.name = kd, optim.lr = 0.0001" in lines
    settings = "objective.name = lad, objective.norm = token, optim.lr = 0.002 on cola; 0.0015 on rte"
    assert f"* token: {settings}" in lines


@given(paths=st.sets(st.text("ab/", min_size=1, max_size=6), min_size=1, max_size=6))
def test_suffixes_distinguish_paths(paths: set[str]) -> None:
    suffixes = distinct_suffixes(paths)
    assert set(suffixes) == paths
    assert len(set(suffixes.values())) == len(paths)
    assert all(path.endswith(suffix) for path, suffix in suffixes.items())
