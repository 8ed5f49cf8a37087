"""Which runs are one method, what the method is called, and which method is the baseline of another."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from complete_runs import METRICS, load_comparison, method_names, run
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.report.build import build_report
from lad_dist.report.grouping import distinct_suffixes


def test_a_key_that_an_earlier_version_did_not_know_makes_no_variant(tmp_path: Path) -> None:
    run(tmp_path / "old", "lad", "rte", 0, 0.5)
    run(tmp_path / "new", "lad", "rte", 1, 0.6, run__spike_sigma=0.0)
    assert method_names(tmp_path) == {"lad"}
    run(tmp_path / "other", "lad", "rte", 2, 0.6, run__spike_sigma=6.0)
    assert method_names(tmp_path) == {"lad spike_sigma=0", "lad spike_sigma=6"}


def test_the_fewest_keys_name_variants(tmp_path: Path) -> None:
    for seed in (0, 1):
        for norm in ("token", "sequence"):
            for task in METRICS:
                lr = 1e-4 * (1 + len(task)) * (1 + len(norm))  # tuned for each, which names nothing
                options = {"objective__norm": norm, "objective__affine": norm == "token", "optim__lr": lr}
                run(tmp_path / f"lad-{norm}-{task}-{seed}", "lad", task, seed, 0.5, **options)
        run(tmp_path / f"kd-{seed}", "kd", "rte", seed, 0.5)
    assert method_names(tmp_path) == {"kd", "lad norm=token", "lad norm=sequence"}
    text = build_report([tmp_path])
    assert "* kd: optim.lr = 0.0001" in text
    line = next(line for line in text.splitlines() if line.startswith("* lad norm=token: "))
    assert "objective.affine = true, objective.norm = token, optim.lr = 0.003 on cola; 0.0024 on rte" in line


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"optim__lr": 1e-4}, {"optim__lr": 2e-5}, {"kd lr=0.0001", "kd lr=2e-05"}),
        ({"optim__lr": 1e-4}, {"optim__lr": 1.00001e-4}, {"kd lr=0.0001", "kd lr=0.000100001"}),
        ({"student__path": "a/x/m"}, {"student__path": "a/y/m"}, {"kd path=x/m", "kd path=y/m"}),
        ({"student__layers": [1, 3]}, {"student__layers": [1, 2]}, {"kd layers=[1,3]", "kd layers=[1,2]"}),
        ({"student__layers": [1, 3]}, {}, {"kd layers=[1,3]", "kd layers=even"}),
        ({"student__dropout": 0.1}, {}, {"kd dropout=0.1", "kd dropout=none"}),
        ({"compression": [{"name": "low_rank", "keep": 0.5}]}, {}, {"kd name=low_rank", "kd name=none"}),
        ({"data__num_workers": 2, "run__eval_every": 5}, {}, {"kd"}),
    ],
)
def test_names_of_two_variants(one: dict[str, Any], other: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    run(tmp_path / "one", "kd", "rte", 0, 0.5, **one)
    run(tmp_path / "other", "kd", "rte", 1, 0.5, **other)
    assert method_names(tmp_path) == expected


def test_paths_that_follow_task_seed_and_teacher_are_one_method(tmp_path: Path) -> None:
    for task in METRICS:
        for seed in (1, 2):
            origins = {
                "first": f"runs/first-{task}-{seed}/export",
                "teacher": f"runs/teacher-{task}/export",
                "mini": "mini-1",
            }
            for name, origin in origins.items():
                run(tmp_path / f"{name}-{task}-{seed}", "kd", task, seed, 0.5, student__path=origin)
    assert method_names(tmp_path) == {"kd path=export", "kd path=teacher", "kd path=mini-1"}
    assert "student.path = runs/first-{task}-{seed}/export" in build_report([tmp_path])


def test_another_runs_seed_in_a_path_is_another_method(tmp_path: Path) -> None:
    for seed in (1, 2):
        for teacher in (1, 2):
            path = f"runs/teacher-{teacher}/export"
            run(tmp_path / f"{seed}-{teacher}", "kd", "rte", seed, 0.5, teacher__path=path)
    assert method_names(tmp_path) == {"kd path=teacher-1/export", "kd path=teacher-2/export"}


def test_a_variant_is_tested_against_the_baseline_of_equal_settings(tmp_path: Path) -> None:
    for seed in (0, 1):
        for path in ("a", "b"):
            for objective in ("kd", "lad"):
                run(tmp_path / f"{objective}-{path}-{seed}", objective, "rte", seed, 0.5, student__path=path)
        run(tmp_path / f"pkd-{seed}", "pkd", "rte", seed, 0.5, student__path="c")
    assert load_comparison(tmp_path).baselines == {"lad path=a": "kd path=a", "lad path=b": "kd path=b"}
    assert "Without a kd of the same settings: pkd." in build_report([tmp_path])
    baselines = load_comparison(tmp_path, "pkd").baselines
    assert set(baselines) == {"kd path=a", "kd path=b", "lad path=a", "lad path=b"}
    assert set(baselines.values()) == {"pkd"}
    assert "lad path=a" in load_comparison(tmp_path, "kd path=b").baselines


def test_a_baseline_may_be_a_word_of_the_names_that_a_search_gives(tmp_path: Path) -> None:
    for seed in (0, 1):
        for sparsity in ("20", "50"):
            for criterion in ("adapting", "random"):
                changes = pruned(criterion, float(sparsity) / 100)
                run(tmp_path / f"{criterion}-{sparsity}-rte-{seed}", "supervised", "rte", seed, 0.5, **changes)
    baselines = {f"adapting-{share}": f"random-{share}" for share in (20, 50)}
    assert load_comparison(tmp_path, "random").baselines == baselines
    assert load_comparison(tmp_path, "random-20").baselines.keys() == {*baselines, "random-50"}
    with pytest.raises(UserError, match='did you mean "random"'):
        load_comparison(tmp_path, "randon")


def test_names_of_runs_name_methods_of_several_keys_if_they_agree(tmp_path: Path) -> None:
    for task, seed, share in itertools.product(("rte", "cola"), (0, 1), (0.2, 0.5)):
        run(tmp_path / f"some_{share}-{task}-{seed}", "supervised", task, seed, 0.5, **pruned("random", share))
    run(tmp_path / "lad-low-rte-0", "lad", "rte", 0, 0.5)
    assert method_names(tmp_path) == {"supervised sparsity=0.2", "supervised sparsity=0.5", "lad"}
    run(tmp_path / "best-rte-0", "supervised", "rte", 0, 0.5, **pruned("movement", 0.5))
    assert method_names(tmp_path) == {"some_0.2", "some_0.5", "best", "lad-low"}
    run(tmp_path / "other-rte-2", "supervised", "rte", 2, 0.5, **pruned("movement", 0.5))
    row = "supervised criterion={} sparsity={}".format
    assert method_names(tmp_path) == {row("random", 0.2), row("random", 0.5), row("movement", 0.5), "lad"}


def pruned(criterion: str, sparsity: float) -> dict[str, Any]:
    return {"compression": [{"name": "prune", "criterion": criterion, "sparsity": sparsity}]}


def test_names_tell_which_of_an_objectives_variants_is_the_baseline(tmp_path: Path) -> None:
    for seed in (0, 1):
        for rate in (1e-4, 2e-4):
            for method, objective, soft in (("kd", "kd", 0.5), ("alone", "kd", 0.0), ("lad", "lad", 0.5)):
                name = f"{method}-{rate}-rte-{seed}"
                run(tmp_path / name, objective, "rte", seed, 0.5, optim__lr=rate, objective__soft=soft)
    assert load_comparison(tmp_path).baselines == {"lad-0.0001": "kd-0.0001", "lad-0.0002": "kd-0.0002"}


@given(paths=st.sets(st.text("ab/", min_size=1, max_size=6), min_size=1, max_size=6))
def test_suffixes_distinguish_paths(paths: set[str]) -> None:
    suffixes = distinct_suffixes(paths)
    assert set(suffixes) == paths
    assert len(set(suffixes.values())) == len(paths)
    assert all(path.endswith(suffix) for path, suffix in suffixes.items())
