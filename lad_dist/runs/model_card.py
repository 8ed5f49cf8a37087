"""The model card of an export: use, quality, size and speed of a student, with the command that measured them."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lad_dist.compression import footprint
from lad_dist.runs.card_header import header
from lad_dist.runs.latency_table import (
    STUDENT,
    TEACHER,
    latency_conditions,
    latency_of,
    latency_remarks,
    latency_tables,
)
from lad_dist.runs.usage_code import usage_code
from lad_dist.utils.text import duration, markdown_table, megabytes, plain_number

BY_COMPONENT = {"stored": "weights", "nonzero": "not zero", footprint.FLOPS: "FLOPs per token"}

Numbers = Mapping[str, Any]


def model_card(results: Numbers) -> str:
    """Return the card of a run, in Markdown."""
    config, latency = results["config"], latency_of(results)
    student = latency[STUDENT] if latency else results["student"]
    remarks = "".join(f"\n* {remark}" for remark in latency_remarks(student, latency))
    speed = ""
    if latency is not None:
        tables = "\n\n".join(markdown_table(*table) for table in latency_tables(latency))
        measured = f"{latency_conditions(latency)} Measured by\n```\n{latency['command']}\n```\n"
        speed = f"\n## How fast\n\n{tables}\n\n{measured}"
    usage = "\n".join(f"```python\n{code}```\n" for code in usage_code(results))
    return (
        f"---\n{header(results)}\n---\n# {config['run']['name']}\n\n{_origin(results)}\n\n"
        f"## How to use\n\n{usage}\n## How good\n\n{_scores(results)}{_size(student)}{speed}{remarks}"
    ).rstrip("\n") + "\n"


def _origin(results: Numbers) -> str:
    """Return in words how the student was trained, and what its outputs mean."""
    config, labels = results["config"], results.get("export", {}).get("labels")
    teacher = f", taught by `{_shown_path(config['teacher']['path'])}`" if config.get("teacher") else ""
    names = ", ".join(f"`{label}`" for label in labels or ())
    outputs = f"\n\nLabels, in the order of the outputs: {names}." if labels else ""
    return f"A student trained with objective `{config['objective']['name']}`{teacher}.{outputs}"


def _shown_path(path: str) -> str:
    """Return a path without the folders of this machine."""
    return str(PurePath(*PurePath(path).parts[-2:])) if PurePath(path).is_absolute() else path


def _scores(results: Numbers) -> str:
    """Return sizes and scores of the student, the teacher's beside them, and how they came about."""
    teacher, columns = teacher_rows(results), ["measured", STUDENT, TEACHER]
    rows = [
        [name, plain_number(value), plain_number(teacher[name]) if name in teacher else ""]
        for name, value in student_rows(results).items()
    ]
    if not teacher:
        columns, rows = columns[:2], [row[:2] for row in rows]
    skipped, count = results.get("skipped_updates", 0), results["processes"]
    updates = f" ({skipped} without an update, as loss or gradient was not finite)" if skipped else ""
    return (
        f"{markdown_table(columns, rows)}\n\nMeasured by\n```\n{results['command']}\n```\n"
        f"in {duration(results['seconds'])} and {results['steps']:,} steps{updates} on {results['device']}, {count} "
        f"process{'es' * (count > 1)}; metrics are those of {scored_on(results)}.\n"
        f"{_selection(results)}{_thresholds(results)}"
    )


def _thresholds(results: Numbers) -> str:
    """Return a paragraph about the thresholds of labels; empty where there are none, as in earlier versions."""
    thresholds = results.get("thresholds", {}).get("student", {})
    listed = ", ".join(f"{label} {plain_number(value)}" for label, value in thresholds.items())
    return listed and (
        "\nA text gets every label whose probability, the sigmoid of the logit, reaches the threshold: "
        f"{listed} (`label_thresholds` in config.json). They were tuned on the dev set. Metrics named tuned are with "
        "these thresholds, the others with 0.5.\n"
    )


def _totals(student: Numbers) -> dict[str, Any]:
    """Return a student's numbers without those by component or by map, and without bytes."""
    left_out = {*BY_COMPONENT, "bytes"}
    return {name: x for name, x in student.items() if name.count("/") < 2 and name.split("/")[0] not in left_out}


def student_rows(results: Numbers) -> dict[str, Any]:
    """Return sizes and scores of a run's student by name; scores on a test set carry its name."""
    return {**_totals(results["student"]), **results["metrics"], **_test_scores(results, "student")}


def teacher_rows(results: Numbers) -> dict[str, Any]:
    """Return sizes and scores of a run's teacher by the names of `student_rows`, nothing where it has none."""
    return {**results["teacher"], **_test_scores(results, "teacher")}


def _test_scores(results: Numbers, role: str) -> dict[str, float]:
    """Return the scores on the test set; results of earlier versions have none."""
    return {f"test {name}": value for name, value in results.get("test", {}).get(role, {}).items()}


def scored_on(results: Numbers) -> str:
    """Return in words what a run's metrics were measured on."""
    if "shards" in results["config"]["data"]:
        return "held-out text"
    if results.get("test"):
        return "the dev set, also used for selection; those of the test set, which was scored once, are named test"
    return "the dev set, also used for selection"


def _selection(results: Numbers) -> str:
    """Return a sentence about the step that was exported, where it is not simply the last one."""
    if results["config"]["run"].get("best_metric") is None:
        return ""
    return f"Exported is the student of step {results['exported_step']:,}: {results['selection']}.\n"


def _size(student: Numbers) -> str:
    lines = [
        (component, *(f"{student[f'{name}/{component}']:,.0f}" for name in BY_COMPONENT))
        for component in footprint.COMPONENTS
    ]
    on_disk = {name.partition("/")[2]: size for name, size in student.items() if name.startswith("bytes/")}
    files = ", ".join(f"{form} {megabytes(size)}" for form, size in on_disk.items())
    return (
        f"\n## How small\n\n{markdown_table(('', *BY_COMPONENT.values()), lines)}\n\n"
        "Counted in the compact form: low-rank maps as pairs, layers without pruned heads and units. Weights that "
        "are zero count like the others.\n"
        f"On disk: {files}.\n"
    )
