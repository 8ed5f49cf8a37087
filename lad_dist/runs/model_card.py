"""The model card of an export: use, quality, size and speed of a student, with the command that measured them."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lad_dist.compression import footprint
from lad_dist.models.heads import MODEL_CLASSES
from lad_dist.runs.latency_table import STUDENT, latency_conditions, latency_of, latency_remarks, latency_tables
from lad_dist.utils.text import markdown_table, megabytes, plain_number

PIPELINES = {  # by kind of task, as the hub sorts models
    "classification": "text-classification",
    "multilabel": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
    "question_answering": "question-answering",
}
BY_COMPONENT = {"stored": "weights", "nonzero": "not zero", footprint.FLOPS: "FLOPs per token"}

Numbers = Mapping[str, Any]


def model_card(results: Numbers) -> str:
    """Return the card of a run, in Markdown."""
    config, latency = results["config"], latency_of(results)
    student = latency[STUDENT] if latency else results["student"]
    remarks = "".join(f"\n* {remark}" for remark in latency_remarks(student, latency))
    teacher = f", taught by `{config['teacher']['path']}`" if config.get("teacher") else ""
    tags = "".join(f"- {tag}\n" for tag in ("lad_dist", config["objective"]["name"]))
    use = PIPELINES.get(config["data"].get("kind"), "feature-extraction")
    rows = [(name, plain_number(value)) for name, value in student_rows(results).items()]
    skipped = results.get("skipped_updates", 0)
    updates = f" ({skipped} without an update, as loss or gradient was not finite)" if skipped else ""
    speed = ""
    if latency is not None:
        tables = "\n\n".join(markdown_table(*table) for table in latency_tables(latency))
        measured = f"{latency_conditions(latency)} Measured by\n```\n{latency['command']}\n```\n"
        speed = f"\n## How fast\n\n{tables}\n\n{measured}"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {use}\ntags:\n{tags}---\n# {config['run']['name']}\n\n"
        f"A student trained with objective `{config['objective']['name']}`{teacher}.\n\n"
        f"```python\n{_usage(config)}```\n\n"
        f"{markdown_table(('measured', 'value'), rows)}\n\n"
        f"Measured by\n```\n{results['command']}\n```\n"
        f"in {results['seconds']:.0f} seconds and {results['steps']} steps{updates} on {results['processes']} "
        f"process(es), {results['device']}; metrics are those of {scored_on(results)}.\n"
        f"{_selection(results)}{_thresholds(results)}"
        f"{_size(student)}{speed}{remarks}" + "\n" * bool(remarks)
    )


def _usage(config: Numbers) -> str:
    """Return Python code that loads the student and calls it."""
    kind, folder = config["data"].get("kind"), PurePath(config["run"]["dir"], config["run"]["name"], "export")
    auto = MODEL_CLASSES[kind].__name__ if kind else "AutoModel"
    text = '"Who is asked?", "One is asked."' if kind == "question_answering" else '"Some text."'
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{folder}")\ntokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'outputs = model(**tokenizer({text}, truncation=True, return_tensors="pt"))\n'
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
