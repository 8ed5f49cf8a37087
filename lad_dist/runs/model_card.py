"""The model card of an export: use, quality, size and speed of a student, with the command that measured them."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lad_dist.compression import footprint
from lad_dist.models.heads import MODEL_CLASSES
from lad_dist.utils.text import markdown_table, megabytes, plain_number

PIPELINES = {  # by kind of task, as the hub sorts models
    "classification": "text-classification",
    "multilabel": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
    "question_answering": "question-answering",
}
BY_COMPONENT = {"stored": "weights", "nonzero": "not zero", footprint.FLOPS: "FLOPs per token"}
TEACHER, STUDENT, ONNX, INT8 = "teacher", "student", "onnx", "onnx int8"
NOTABLE = 0.01  # share of zeros, or of weights saved, from which on the card mentions it
SHORT = 0.8  # share of the speed that FLOPs promise, below which the card mentions it

Numbers = Mapping[str, Any]


def model_card(results: Numbers) -> str:
    """Return the card of a run, in Markdown."""
    config, latency = results["config"], results.get("latency")
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
        table = markdown_table(*latency_table(latency))
        measured = f"{latency_conditions(latency)} Measured by\n```\n{latency['command']}\n```\n"
        speed = f"\n## How fast\n\n{table}\n\n{measured}"
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


def latency_conditions(latency: Numbers) -> str:
    """Return a sentence about the conditions of the measurement."""
    count = latency["threads"]
    ratio = "; in brackets, how many times the teacher's speed" if TEACHER in latency else ""
    return (
        f"Columns are sequences at once x tokens of each: milliseconds of a forward, sequences per second{ratio}. "
        f"Medians of rounds in which all forms took turns, on {', '.join(latency['devices'].values())}, "
        f"{count} thread{'s' * (count > 1)} of the CPU, in fp32 but for int8; a task's model with the head, others "
        "without."
    )


def _seconds(latency: Numbers) -> dict[tuple[str, str], dict[tuple[int, int], float]]:
    """Return the median seconds of a forward by form and device, then by batch and length."""
    seconds: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for timing in latency["timings"]:
        shapes = seconds.setdefault((timing["form"], timing["device"]), {})
        shapes[timing["batch"], timing["length"]] = timing["seconds"]
    return seconds


def latency_table(latency: Numbers) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: form, device, sizes, and for each shape latency, throughput and ratio to the teacher."""
    seconds = _seconds(latency)
    shapes = [f"{batch} x {length}" for batch, length in next(iter(seconds.values()))]
    rows = []
    for (form, device), times in seconds.items():
        model = latency[TEACHER if form == TEACHER else STUDENT]
        teacher = {} if form == TEACHER else seconds.get((TEACHER, device), {})
        ratios = [f" ({teacher[shape] / time:.2f}x)" if shape in teacher else "" for shape, time in times.items()]
        paces = [
            f"{plain_number(1e3 * time, digits=3)} ms, {plain_number(batch / time, digits=3)}/s"
            for (batch, _), time in times.items()
        ]
        rows.append([form, device, *_sizes(model, form), *map("".join, zip(paces, ratios, strict=True))])
    return ["form", "device", "weights", "not zero", "MFLOP/token", "MB", *shapes], rows


def _sizes(model: Numbers, form: str) -> list[str]:
    """Return the cells of the sizes; the file of a teacher and of ordinary folders is model.safetensors."""
    compact = None if form == TEACHER else model.get(f"bytes/{form}") or model.get("bytes/compact")
    file = compact or model.get("bytes/safetensors")
    flops = f"{model[footprint.FLOPS] / 1e6:.3g}"
    return [f"{model['stored']:,}", f"{model['nonzero']:,}", flops, f"{file / 1e6:,.1f}" if file else "-"]


def latency_remarks(student: Numbers, latency: Numbers | None = None) -> list[str]:
    """Return sentences about what is smaller on paper and not faster, and what is faster."""
    remarks = []
    zeros, saved = 1 - student["nonzero"] / student["stored"], 1 - student["stored"] / student["parameters"]
    if zeros >= NOTABLE:
        remarks.append(
            f"{zeros:.0%} of the weights are zero. That makes a file smaller and nothing faster: with zeros in it a "
            "product takes as long."
        )
    if saved >= NOTABLE:
        remarks.append(
            f"The compact form (compact.safetensors) has {saved:.0%} fewer weights, and fewer products: smaller and "
            "faster. The ordinary folder keeps the model's shape: low-rank maps multiplied out, and zero rows and "
            "columns for pruned heads and units."
        )
    if latency is not None:
        remarks += [*_speed_up(latency), *_quantized(latency), *_quality(latency)]
    return remarks


def _speed_up(latency: Numbers) -> list[str]:
    """Compare the speed-up that FLOPs promise with the measured one."""
    if TEACHER not in latency:
        return []
    promised = latency[TEACHER][footprint.FLOPS] / latency[STUDENT][footprint.FLOPS]
    seconds, device = _seconds(latency), latency["timings"][0]["device"]
    student = seconds[STUDENT, device]
    ratios = [time / student[shape] for shape, time in seconds[TEACHER, device].items()]
    low, high = min(ratios), max(ratios)
    text = f"It has 1/{promised:.2f} of the teacher's FLOPs per token and runs {low:.2f} to {high:.2f} times as fast"
    return [text + ("; not all that is saved on paper is saved in time." if low < SHORT * promised else ".")]


def _quantized(latency: Numbers) -> list[str]:
    """Name the shapes at which int8 is not faster than fp32."""
    seconds = _seconds(latency)
    ratios = {shape: seconds[ONNX, "cpu"][shape] / time for shape, time in seconds.get((INT8, "cpu"), {}).items()}
    slow = [f"{batch} x {length} ({ratio:.2f}x)" for (batch, length), ratio in ratios.items() if ratio <= 1]
    return [f"int8 is smaller than fp32 and not faster at {', '.join(slow)}."] if slow else []


def _quality(latency: Numbers) -> list[str]:
    """Return scores of the forms other than the student, and how often they decide as the student."""
    remarks = []
    for form, scores in latency["quality"].items():
        metrics = ", ".join(f"{name} {plain_number(x)}" for name, x in scores["metrics"].items())
        loyalty = ", ".join(
            f"{name.removesuffix('_loyalty')} {plain_number(x)}" for name, x in scores["loyalty"].items()
        )
        remarks.append(f"{form} on the dev set: {metrics}; loyalty to the student: {loyalty}.")
    return remarks
