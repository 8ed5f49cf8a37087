"""Many runs as one comparison: hand-made results.json files whose means, deviations and p values are known by hand."""

import csv
import io
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sweep
import toy
from complete_runs import METRICS, load_comparison, method_names, run
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.config.errors import UserError
from lad_dist.report import pareto
from lad_dist.report.build import build_report


def grid(folder: Path) -> None:
    """Write runs of kd and lad on two tasks, three seeds each.

    lad - kd is 0.01, 0.02, 0.03 on rte and 0.1, 0.1, 0.4 on cola.
    """
    scores = {
        ("kd", "rte"): (0.60, 0.61, 0.62),
        ("lad", "rte"): (0.61, 0.63, 0.65),
        ("kd", "cola"): (0.2, 0.3, 0.1),
        ("lad", "cola"): (0.3, 0.4, 0.5),
    }
    for (objective, task), values in scores.items():
        for seed, score in enumerate(values):
            run(folder / f"{objective}-{task}-{seed}", objective, task, seed, score)


def cells_of(text: str, first_cell: str) -> list[str]:
    """Return the cells of the first table row with this first cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first_cell} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_deviations_sizes_and_order(tmp_path: Path) -> None:
    grid(tmp_path)
    text = build_report([tmp_path])
    assert cells_of(text, "method")[1:3] == ["cola matthews", "rte accuracy"]
    # sd: 0.01 and 0.1 for kd, 0.02 and 0.1 for lad; s.e. of the mean: sqrt(sd²/3 + sd²/3) / 2
    assert cells_of(text, "kd") == [
        "kd", "0.200 ± 0.100", "0.610 ± 0.010", "0.405 ± 0.029", "14.2M", "12.3M", "101"
    ]  # fmt: skip
    assert cells_of(text, "lad")[1:4] == ["0.400 ± 0.100", "0.630 ± 0.020", "0.515 ± 0.029"]
    assert cells_of(text, "teacher") == ["teacher", "0.750", "0.750", "0.750", "28M", "23M", ""]
    first_cells = re.findall(r"^\| (\w+) \|", text.partition("## ")[0], re.MULTILINE)
    assert first_cells == ["method", "teacher", "lad", "kd"]
    assert "mean ± sd over 3 seeds" in text


def test_the_paired_test(tmp_path: Path) -> None:
    grid(tmp_path)
    comparison = load_comparison(tmp_path)
    # differences 1, 2, 3: t = 2 sqrt(3); two-sided p of t with 2 degrees of freedom is 1 - t / sqrt(2 + t²)
    rte = comparison.test("lad", "rte")
    assert rte.pairs == 3
    assert rte.difference == pytest.approx(0.02)
    assert rte.p == pytest.approx(1 - math.sqrt(12 / 14))
    # differences 1, 1, 4: t = 2 / (sqrt(3) / sqrt(3)) = 2
    assert comparison.test("lad", "cola").p == pytest.approx(1 - 2 / math.sqrt(6))
    assert "+0.020, p 0.074 (3)" in cells_of(build_report([tmp_path]).partition("## Against kd")[2], "lad")


def test_over_all_tasks_every_task_counts_alike(tmp_path: Path) -> None:
    grid(tmp_path / "a")
    grid(tmp_path / "b")
    for file in (tmp_path / "b").glob("*-cola-*/results.json"):
        results = json.loads(file.read_text())
        results["metrics"]["matthews"] *= 1000
        file.write_text(json.dumps(results))
    small, large = (load_comparison(tmp_path / name).test_all("lad") for name in "ab")
    assert small == pytest.approx(large)
    scale = math.sqrt((0.01**2 + 0.02**2) / 2), 0.1
    assert small.difference == pytest.approx((0.06 / scale[0] + 0.6 / scale[1]) / 6)
    assert small.pairs == 6


def test_one_task_and_one_seed_are_a_short_report(tmp_path: Path) -> None:
    """No deviation, no test and no mean of one number."""
    run(tmp_path / "kd", "kd", "rte", 0, 0.625)
    alone = build_report([tmp_path])
    run(tmp_path / "lad", "lad", "rte", 0, 0.75)
    assert alone == (
        "# 1 method on 1 task\n\nDev sets: one seed.\n\n"
        "| method | rte accuracy | parameters | FLOPs per token | seconds |\n| --- | ---: | ---: | ---: | ---: |\n"
        "| teacher | 0.750 | 28M | 23M |  |\n| kd | 0.625 | 14.2M | 12.3M | 100 |\n\n"
        "## Loyalty to the teacher\n\n| method | rte |\n| --- | ---: |\n| kd | 0.900 |\n\n"
        "Dev sets: the share of decisions that are the teacher's, right or wrong; of numbers their correlation with "
        "the teacher's (Pearson).\n"
    )
    both = build_report([tmp_path])
    assert "Dev sets: one seed; best first.\n" in both
    tested = "## Against kd\n\n| method | rte |\n| --- | ---: |\n| lad | +0.125 |\n\nDifferences of scores of one seed."
    assert tested in both
    run(tmp_path / "kd-cola", "kd", "cola", 0, 0.5)
    assert cells_of(build_report([tmp_path]), "method")[1:4] == ["cola matthews", "rte accuracy", "mean"]


def test_one_task_and_several_seeds_have_no_column_of_all_tasks(tmp_path: Path) -> None:
    for seed in (0, 1):
        for name, score in (("kd", 0.5), ("lad", 0.75)):
            run(tmp_path / f"{name}-{seed}", name, "rte", seed, score + seed / 100)
    text = build_report([tmp_path])
    assert cells_of(text, "method")[1:3] == ["rte accuracy", "mean ± s.e."]
    assert "All tasks" not in text
    assert "all tasks" not in text


def test_pairs_have_the_same_seed(tmp_path: Path) -> None:
    for seed, score in ((0, 0.5), (1, 0.6), (2, 0.1)):
        run(tmp_path / f"kd-{seed}", "kd", "rte", seed, score)
    for seed, score in ((1, 0.7), (0, 0.55), (7, 0.99)):
        run(tmp_path / f"lad-{seed}", "lad", "rte", seed, score)
    result = load_comparison(tmp_path).test("lad", "rte")
    assert result.pairs == 2
    assert result.difference == pytest.approx(0.075)


@pytest.mark.parametrize(("seeds", "cell"), [((0,), "+0.100, no p (1)"), ((0, 1), "+0.100, no p (2)"), ((5,), "-")])
def test_without_pairs_or_variance_no_p_is_reported(seeds: tuple[int, ...], cell: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / f"kd-{seed}", "kd", "rte", seed, 0.5 + seed / 100)
    for seed in seeds:
        run(tmp_path / f"lad-{seed}", "lad", "rte", seed, 0.6 + seed / 100)
    assert cells_of(build_report([tmp_path]).partition("## Against")[2], "lad")[1] == cell


def test_the_table_shows_n_where_n_differs(tmp_path: Path) -> None:
    grid(tmp_path)
    shutil.rmtree(tmp_path / "lad-rte-2")
    shutil.rmtree(tmp_path / "lad-rte-1")
    text = build_report([tmp_path])
    assert cells_of(text, "lad")[1:4] == ["0.400 ± 0.100 (3)", "0.610 (1)", "0.505"]
    assert "seeds, their number in brackets" in text


def test_the_order_is_by_the_tasks_that_all_have(tmp_path: Path) -> None:
    grid(tmp_path)
    run(tmp_path / "pkd", "pkd", "rte", 0, 0.62)
    text = build_report([tmp_path])
    assert list(load_comparison(tmp_path).methods) == ["lad", "pkd", "kd"]
    assert "best first by the mean over rte, which all methods have" in text
    assert cells_of(text, "pkd")[1:4] == ["-", "0.620 (1)", "0.620"]
    run(tmp_path / "emd", "emd", "mrpc", 0, 0.99)
    text = build_report([tmp_path])
    assert "by name, as no task has runs of all methods" in text
    assert cells_of(text, "emd")[4] == "-"


def test_loyalty_stands_apart(tmp_path: Path) -> None:
    for seed, value in enumerate((0.8, 0.9, 1.0)):
        run(tmp_path / f"lad-rte-{seed}", "lad", "rte", seed, 0.6, results__metrics__label_loyalty=value)
    run(tmp_path / "lad-cola-0", "lad", "cola", 0, 0.3, results__metrics={"matthews": 0.3, "teacher_pearson": 0.7})
    run(tmp_path / "alone-rte-0", "kd", "rte", 0, 0.5, results__metrics={"accuracy": 0.5})
    scores, loyal = build_report([tmp_path]).split("## Loyalty to the teacher")
    assert cells_of(loyal, "lad") == ["lad", "0.700 (1)", "0.900 ± 0.100 (3)"]
    assert "| kd |" in scores
    assert "| kd |" not in loyal
    for file in tmp_path.glob("lad-*/results.json"):
        results = json.loads(file.read_text())
        del results["metrics"]["label_loyalty" if "label_loyalty" in results["metrics"] else "teacher_pearson"]
        file.write_text(json.dumps(results))
    assert "Loyalty" not in build_report([tmp_path])


def test_without_a_baseline_the_report_has_a_reason_and_no_test(tmp_path: Path) -> None:
    run(tmp_path / "lad", "lad", "rte", 0, 0.5)
    run(tmp_path / "pkd", "pkd", "rte", 0, 0.5)
    assert "Nothing to compare: no run has this label; give that of another method by --baseline." in build_report(
        [tmp_path]
    )
    assert "Against" not in build_report([tmp_path / "lad"], "lad")


def test_the_notes_list_teachers_that_differ(tmp_path: Path) -> None:
    grid(tmp_path)
    run(tmp_path / "pkd", "pkd", "rte", 0, 0.5, teacher__path="other", results__teacher__accuracy=0.8)
    text = build_report([tmp_path])
    assert cells_of(text, "teacher")[1:4] == ["0.750", "2 teachers, 0.750 to 0.800", "-"]
    assert "* Runs on rte had different teachers: other 0.800, runs/teacher-rte/export 0.750." in text


def test_the_notes_list_skipped_folders(tmp_path: Path) -> None:
    grid(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text("")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "results.json").write_text('{"trials": [], "failed": []}')
    run(tmp_path / "corpus", "mlm", "rte", 0, 0.5, data={"shards": "corpora/x", "max_length": 128})
    run(tmp_path / "teacher-rte", "supervised", "rte", 0, 0.75, teacher=None)
    run(tmp_path / "nan", "emd", "rte", 0, math.nan)
    run(tmp_path / "pkd", "pkd", "rte", 0, 0.5, teacher__path=str(tmp_path / "teacher-rte" / "export"))
    text = build_report([tmp_path])
    for reason, name in (
        ("not complete", "begun"),
        ("no run's results", "search"),
        ("on a corpus", "corpus"),
        ("teachers of the others, with no teacher of their own", "teacher-rte"),
        ("the main metric is no number", "nan"),
    ):
        assert f"* Left out, {reason}: 1 folder ({tmp_path / name})." in text
    assert method_names(tmp_path) == {"kd", "lad", "pkd"}


def test_students_without_a_teacher_have_no_teachers_row(tmp_path: Path) -> None:
    run(tmp_path / "alone", "supervised", "rte", 0, 0.5, teacher=None, results__teacher={})
    text = build_report([tmp_path])
    assert "| teacher |" not in text
    assert cells_of(text, "supervised")[1] == "0.500"


def test_a_repeated_run_counts_once(tmp_path: Path) -> None:
    grid(tmp_path)
    run(tmp_path / "again", "kd", "rte", 0, 0.63)
    text = build_report([tmp_path])
    assert cells_of(text, "kd")[2] == "0.615 ± 0.005"  # of 0.615, 0.61, 0.62
    assert "* 1 run more of a method, task and seed that has one: their mean counts as one seed." in text


def test_the_notes_list_different_machines(tmp_path: Path) -> None:
    grid(tmp_path)
    run(tmp_path / "fast", "kd", "rte", 7, 0.6, results__device="gpu", results__processes=2)
    assert "* Seconds are from different machines: cpu x 1, gpu x 2." in build_report([tmp_path])


def test_files_name_own_tasks(tmp_path: Path) -> None:
    for task in ("a", "b"):
        own = {"train": f"data/{task}/train.csv", "dev": f"data/{task}/dev.csv", "kind": "classification"}
        run(tmp_path / task, "kd", task, 0, 0.5, data=own)
    assert list(load_comparison(tmp_path).tasks) == ["a/dev.csv", "b/dev.csv"]
    assert method_names(tmp_path) == {"kd"}


def test_files_hold_everything_and_are_the_same_again(tmp_path: Path) -> None:
    grid(tmp_path / "runs")
    text = build_report([tmp_path / "runs"], out=tmp_path / "one")
    build_report(
        [tmp_path / "runs" / name.name for name in sorted((tmp_path / "runs").iterdir())], out=tmp_path / "two"
    )
    for name in ("report.md", "report.csv", "report.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "report.md").read_text() == text
    assert (tmp_path / "one" / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "one" / "report.csv").read_text())))
    assert len(rows) == 12
    first = rows[0]
    assert (first["method"], first["task"], first["seed"], first["metric"]) == ("lad", "cola", "0", "matthews")
    assert float(first["score"]) == float(first["dev/matthews"]) == 0.3
    assert float(first["teacher/matthews"]) == 0.75
    assert float(first["dev/label_loyalty"]) == 0.9
    assert first["folder"] == str(tmp_path / "runs" / "lad-cola-0")


@settings(max_examples=sweep.examples(5, 15))
@given(order=st.permutations(["a", "b", "c"]), with_duplicates=st.booleans(), seed=st.integers(0, 99))
def test_the_order_of_folders_changes_nothing(
    order: list[str], with_duplicates: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, chance = tmp_path_factory.mktemp("runs"), random.Random(seed)
    for number in range(9):
        run_folder = folder / "abc"[number % 3] / str(number)
        lr = chance.choice([1e-4, 2e-4])
        task = chance.choice(list(METRICS))
        run(run_folder, chance.choice(["kd", "lad"]), task, number % 4, chance.random(), optim__lr=lr)
    folders = [folder / name for name in order]
    expected = build_report(sorted(folders))
    assert build_report([*folders, *folders] if with_duplicates else folders) == expected
    assert build_report([folder, folders[0]] if with_duplicates else [folder]) == expected


def latency_table(seconds: float, **options: Any) -> dict[str, Any]:
    """Return what `lad-dist latency` adds to results.json, as far as a report reads it."""
    paces = {
        ("teacher", "torch", "cpu"): 2.0,
        ("teacher", "onnx int8", "cpu"): 0.6,
        ("student", "torch", "cpu"): 1.0,
        ("student", "onnx int8", "cpu"): 0.5,
        ("student", "torch", "cuda"): 0.1,
    }
    timings = [
        {"model": m, "form": form, "device": device, "batch": b, "length": s, "seconds": seconds * pace * b * s / 128}
        for (m, form, device), pace in paces.items()
        for b, s in ((32, 128), (1, 512), (1, 128))
    ]
    quality = {
        model: {"torch": {"metrics": {"accuracy": 1.0}}, "onnx int8": {"metrics": {"accuracy": score}}}
        for model, score in (("teacher", 0.7), ("student", 0.4))
    }
    table = {"threads": 1, "devices": {"cpu": "x86_64"}, "timings": timings, "quality": quality}
    return {**table, "teacher": {"bytes/safetensors": 4e6, "bytes/onnx int8": 1e6}, **options}


def test_the_table_has_bytes_and_latencies_if_runs_have_them(tmp_path: Path) -> None:
    for seed, seconds in enumerate((0.010, 0.020)):
        small = {"results__student__bytes/safetensors": 2e6, "results__student__bytes/compact": 1e6}
        run(tmp_path / f"kd-{seed}", "kd", "rte", seed, 0.5, results__latency=latency_table(seconds), **small)
    run(tmp_path / "lad", "lad", "rte", 0, 0.6)
    text = build_report([tmp_path], out=tmp_path / "out")
    assert cells_of(text, "method")[3:] == ["parameters", "FLOPs per token", "bytes", "ms per sequence", "seconds"]
    assert cells_of(text, "kd")[5:7] == ["1M", "15"]
    assert cells_of(text, "lad")[5:7] == ["-", "-"]
    assert cells_of(text, "teacher")[5:7] == ["4M", "30"]
    assert (
        "* Milliseconds per sequence are those of one sequence at a time in torch: 128 tokens, x86_64, 1 thread. Q"
        in text
    )
    assert (tmp_path / "out" / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "report.csv").read_text())))
    assert [row["latency"] for row in rows if row["method"] == "kd"] == ["10.0", "20.0"]
    shutil.rmtree(tmp_path / "out")
    other = latency_table(0.01, threads=4)
    run(tmp_path / "emd", "emd", "rte", 0, 0.6, results__latency=other)
    text = build_report([tmp_path])
    assert (
        "of different conditions, those of one sequence at a time in torch: 128 tokens, x86_64, 1 thread; 128" in text
    )


def test_quality_against_cost(tmp_path: Path) -> None:
    size = {"results__student__bytes/safetensors": 2e6, "results__student__bytes/onnx int8": 5e5}
    run(tmp_path / "kd", "kd", "rte", 0, 0.5, results__latency=latency_table(0.010), **size)
    run(
        tmp_path / "lad", "lad", "rte", 0, 0.6, results__latency=latency_table(0.020), **size
    )  # on a machine of half the speed
    run(tmp_path / "pkd", "pkd", "rte", 0, 0.6)  # not measured
    without = latency_table(0.020)
    without["timings"] = [timing for timing in without["timings"] if timing["model"] != "teacher"]
    del without["quality"]["teacher"]
    run(tmp_path / "emd", "emd", "rte", 0, 0.55, results__latency=without, **size)
    old = {"threads": 1, "devices": {}, "timings": [{"form": "onnx"}], "quality": {"onnx": {"metrics": {"f1": 1.0}}}}
    run(tmp_path / "alp", "alp", "rte", 0, 0.6, results__latency=old)  # measured by an earlier version
    points = pareto.points(load_comparison(tmp_path))
    values = {
        (row["method"], row["form"]): (row["score"], row["latency"], row["bytes"]) for row in points.to_dict("records")
    }
    assert values == {
        ("kd", "torch"): (0.5, pytest.approx(15), 2e6),
        ("kd", "onnx int8"): (0.4, pytest.approx(7.5), 5e5),
        ("lad", "torch"): (0.6, pytest.approx(15), 2e6),
        ("lad", "onnx int8"): (0.4, pytest.approx(7.5), 5e5),
        ("emd", "torch"): (0.55, pytest.approx(20), 2e6),
        ("emd", "onnx int8"): (0.4, pytest.approx(10), 5e5),
        ("teacher", "torch"): (0.75, pytest.approx(30), 4e6),
        ("teacher", "onnx int8"): (0.7, pytest.approx(9), 1e6),
    }
    run(tmp_path / "other", "kd", "mrpc", 0, 0.5)
    figure = pareto.figure(load_comparison(tmp_path))
    assert figure is not None
    latencies = {axes.get_title(): axes for axes in figure.axes[::2]}
    assert [text.get_text() for text in latencies["mrpc"].texts] == [pareto.UNMEASURED]
    assert pareto.UNMEASURED not in [text.get_text() for text in latencies["rte"].texts]
    front = [line.get_xdata().tolist() for line in latencies["rte"].lines if line.get_marker() in ("", "None")]
    assert front == [[pytest.approx(7.5), pytest.approx(9), pytest.approx(30)]]
    for name in ("kd", "lad", "emd"):
        shutil.rmtree(tmp_path / name)
    assert pareto.figure(load_comparison(tmp_path)) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_no_other_point_beats_the_front(points: list[tuple[int, int]]) -> None:
    front = pareto.front(pd.DataFrame(points, columns=["bytes", "score"]), "bytes")
    beaten = {(c, s) for c, s in points if any((d <= c and t >= s) and (d, t) != (c, s) for d, t in points)}
    assert set(front.itertuples(index=False, name=None)) == set(points) - beaten


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:100], "damaged ("),
        (lambda text: json.dumps(json.loads(text) | {"metrics": {}}), "damaged (metrics: "),
        (lambda _: "[]", "damaged (not a JSON object)"),
        (
            lambda text: json.dumps(json.loads(text) | {"latency": {"devices": {}, "timings": []}}),
            "damaged (latency.threads: ",
        ),
    ],
)
def test_a_damaged_result_is_named(damage: Callable[[str], str], reason: str, tmp_path: Path) -> None:
    grid(tmp_path)
    file = tmp_path / "kd-rte-1" / "results.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError) as caught:
        build_report([tmp_path], out=tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / 'kd-rte-1' / 'results.json'}: {reason}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path: Path) -> None:
    grid(tmp_path / "runs")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text("")
    (tmp_path / "file").write_text("")
    run(tmp_path / "other" / "kd", "kd", "rte", 0, 0.5, results__metrics={"f1": 0.5})
    for folders, options, message in (
        (["nowhere"], {}, "nowhere: no such folder"),
        (["begun"], {}, "begun: no complete run on a task below; not complete: 1"),
        (["runs"], {"baseline": "kdd"}, '--baseline "kdd" is none of the methods: did you mean "kd"?'),
        (["runs"], {"out": tmp_path / "file"}, "file: cannot be written (File exists); give --out another folder"),
        (["runs", "other"], {}, "measures rte by "),
    ):
        with pytest.raises(UserError) as caught:
            build_report([tmp_path / name for name in folders], **options)
        assert message in str(caught.value)


def test_real_runs(world: World, tmp_path: Path) -> None:
    from lad_dist.training.train import train

    for objective in ("kd", "lad"):
        options = toy.task_config(tmp_path, world.files, world.teacher, world.pretrained, objective={"name": objective})
        result = train(toy.parsed(options, {"run.name": objective, "run.steps": 2, "data.num_workers": 0}))
        assert result.results is not None
    text = build_report([tmp_path], out=tmp_path / "out")
    for objective in ("kd", "lad"):
        results = json.loads((tmp_path / objective / "results.json").read_text())
        assert cells_of(text, objective)[1] == f"{results['metrics']['accuracy']:.3f}"
    assert cells_of(text, "teacher")[1] == f"{results['teacher']['accuracy']:.3f}"
    assert cells_of(text, "method")[1] == "dev.jsonl accuracy"
    assert "Differences of scores of one seed." in text
    assert "## Notes" not in text
