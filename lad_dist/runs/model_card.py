"""The model card of an export: how to use it, how good, how small, how fast and how faithful, with the command that
measured it.

card(results)     the whole of it, in Markdown, from what results.json holds
speed(ledger)     a ledger's forms and how fast they are, as header and rows
remarks(...)      what the numbers do not say by themselves: what is smaller and no faster
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lad_dist.compression import footprint
from lad_dist.models.heads import MODEL_CLASSES

PIPELINES = {  # by kind of task, as the hub sorts models
    "classification": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
    "question_answering": "question-answering",
}
BY_COMPONENT = {"stored": "weights", "nonzero": "not zero", footprint.FLOPS: "FLOPs per token"}
TEACHER, STUDENT, ONNX, INT8 = "teacher", "student", "onnx", "onnx int8"
NOTABLE = 0.01  # share of zeros, or of weights saved, from which on it is said
SHORT = 0.8  # of what FLOPs promise, below which it is said

Numbers = Mapping[str, Any]


def model_card(results: Numbers) -> str:
    config, ledger = results["config"], results.get("ledger")
    student = ledger[STUDENT] if ledger else results["student"]
    said = latency_remarks(student, ledger)
    taught = f", taught by `{config['teacher']['path']}`" if config.get("teacher") else ""
    tags = "".join(f"- {tag}\n" for tag in ("lad_dist", config["objective"]["name"]))
    use = PIPELINES.get(config["data"].get("kind"), "feature-extraction")
    rows = [(name, number(value)) for name, value in {**totals(results["student"]), **results["metrics"]}.items()]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {use}\ntags:\n{tags}---\n# {config['run']['name']}\n\n"
        f"A student trained with objective `{config['objective']['name']}`{taught}.\n\n"
        f"```python\n{_usage(config)}```\n\n"
        f"{_grid(('measured', 'value'), rows)}\n\n"
        f"Measured by\n```\n{results['command']}\n```\n"
        f"in {results['seconds']:.0f} seconds and {results['steps']} steps on {results['processes']} process(es), "
        f"{results['device']}; metrics are those of the dev set, or of held-out text.\n"
        f"{_size(student)}{_speed(ledger) if ledger else ''}{_list(said)}"
    )


def _usage(config: Numbers) -> str:
    """How to load it and ask it something, in Python."""
    kind, folder = config["data"].get("kind"), PurePath(config["run"]["dir"], config["run"]["name"], "export")
    auto = MODEL_CLASSES[kind].__name__ if kind else "AutoModel"
    asked = '"Who is asked?", "One is asked."' if kind == "question_answering" else '"Some text."'
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{folder}")\ntokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'outputs = model(**tokenizer({asked}, return_tensors="pt"))\n'
    )


def totals(student: Numbers) -> dict[str, Any]:
    """A student's numbers without those by component or by map, and without bytes."""
    parted = {name: name.split("/") for name in student}
    return {
        name: student[name] for name, (first, *rest) in parted.items()
        if first not in (*BY_COMPONENT, "bytes") and len(rest) < 2
    }  # fmt: skip


def _size(student: Numbers) -> str:
    lines = [(part, *(_of(student, name, part) for name in BY_COMPONENT)) for part in footprint.COMPONENTS]
    on_disk = {name.partition("/")[2]: size for name, size in student.items() if name.startswith("bytes/")}
    files = ", ".join(f"{form} {megabytes(size)} MB" for form, size in on_disk.items())
    return (
        f"\n## How small\n\n{_grid(('', *BY_COMPONENT.values()), lines)}\n\n"
        "Counted as the model computes: low-rank maps as their pairs, weights that are zero like the others.\n"
        f"On disk: {files}.\n"
    )


def _of(student: Numbers, name: str, part: str) -> str:
    return f"{student[f'{name}/{part}']:,.0f}"


def _speed(ledger: Numbers) -> str:
    table = _grid(*latency_table(ledger))
    return f"\n## How fast\n\n{table}\n\n{conditions(ledger)} Measured by\n```\n{ledger['command']}\n```\n"


def _list(lines: Sequence[str]) -> str:
    return "".join(f"\n* {line}" for line in lines) + "\n" * bool(lines)


def conditions(ledger: Numbers) -> str:
    """Under which its latencies were measured."""
    count = ledger["threads"]
    taught = "; in brackets, how many times the teacher's speed" if TEACHER in ledger else ""
    return (
        f"Columns are sequences at once x tokens of each: milliseconds of a forward, sequences per second{taught}. "
        f"Medians of rounds in which all forms took turns, on {', '.join(ledger['devices'].values())}, "
        f"{count} thread{'s' * (count > 1)} of the CPU, in fp32 but for int8; a task's model with its head, others "
        "without."
    )


def latency_table(ledger: Numbers) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a form on a device, its sizes, and each shape's latency, throughput and ratio to the teacher."""
    shapes = list(dict.fromkeys((x["batch"], x["length"]) for x in ledger["timings"]))
    header = ["form", "device", "weights", "not zero", "MFLOP/token", "MB", *(f"{b} x {s}" for b, s in shapes)]
    rows = []
    for form, device in dict.fromkeys((x["form"], x["device"]) for x in ledger["timings"]):
        model = ledger[TEACHER if form == TEACHER else STUDENT]
        cells = [_timing(ledger, form, device, shape) for shape in shapes]
        rows.append([form, device, *_sizes(model, form), *cells])
    return header, rows


def _sizes(model: Numbers, form: str) -> list[str]:
    """Of a teacher and of ordinary folders, the file is model.safetensors."""
    smaller = None if form == TEACHER else model.get(f"bytes/{form}") or model.get("bytes/compact")
    file = smaller or model.get("bytes/safetensors")
    flops = f"{model[footprint.FLOPS] / 1e6:.3g}"
    return [f"{model['stored']:,}", f"{model['nonzero']:,}", flops, megabytes(file) if file else "-"]


def _timing(ledger: Numbers, form: str, device: str, shape: tuple[int, int]) -> str:
    seconds = median_seconds(ledger, form, device, shape)
    ratio = (median_seconds(ledger, TEACHER, device, shape) or 0.0) / seconds if seconds else 0.0
    if not seconds:
        return "-"
    against = f" ({ratio:.2f}x)" if ratio and form != TEACHER else ""
    return f"{_digits(1e3 * seconds)} ms, {_digits(shape[0] / seconds)}/s{against}"


def median_seconds(ledger: Numbers, form: str, device: str, shape: tuple[int, int]) -> float | None:
    wanted = (form, device, *shape)
    found = [x["seconds"] for x in ledger["timings"] if (x["form"], x["device"], x["batch"], x["length"]) == wanted]
    return found[0] if found else None


def latency_remarks(student: Numbers, ledger: Numbers | None = None) -> list[str]:
    """What is smaller on paper and no faster, and what is."""
    said = []
    zeros, saved = 1 - student["nonzero"] / student["stored"], 1 - student["stored"] / student["parameters"]
    if zeros >= NOTABLE:
        said.append(
            f"{zeros:.0%} of its weights are zero. That makes a file smaller and nothing faster: with zeros in it a "
            "product takes as long."
        )
    if saved >= NOTABLE:
        said.append(f"Low rank saves {saved:.0%} of its weights, and their products: smaller and faster.")
    if ledger is not None:
        said += [*_promised(ledger), *_quantized(ledger), *_quality(ledger)]
    return said


def _promised(ledger: Numbers) -> list[str]:
    """By its FLOPs, and what came of it."""
    if TEACHER not in ledger:
        return []
    promised = ledger[TEACHER][footprint.FLOPS] / ledger[STUDENT][footprint.FLOPS]
    device = ledger["timings"][0]["device"]
    measured = {}
    for shape in dict.fromkeys((x["batch"], x["length"]) for x in ledger["timings"]):
        theirs, its = (median_seconds(ledger, form, device, shape) for form in (TEACHER, STUDENT))
        measured[shape] = (theirs or 0.0) / (its or 1.0)
    low, high = min(measured.values()), max(measured.values())
    text = f"It has 1/{promised:.2f} of the teacher's FLOPs per token and runs {low:.2f} to {high:.2f} times as fast"
    return [text + ("; not all that is saved on paper is saved in time." if low < SHORT * promised else ".")]


def _quantized(ledger: Numbers) -> list[str]:
    """Where int8 is no faster than fp32."""
    cells = {(x["batch"], x["length"]): x["seconds"] for x in ledger["timings"] if x["form"] == INT8}
    ratios = {shape: (median_seconds(ledger, ONNX, "cpu", shape) or 0.0) / its for shape, its in cells.items()}
    slow = [f"{batch} x {length} ({ratio:.2f}x)" for (batch, length), ratio in ratios.items() if ratio <= 1]
    return [f"int8 is smaller than fp32 and not faster at {', '.join(slow)}."] if slow else []


def _quality(ledger: Numbers) -> list[str]:
    """What forms other than the student answer."""
    said = []
    for form, found in ledger["quality"].items():
        metrics = ", ".join(f"{name} {number(x)}" for name, x in found["metrics"].items())
        same = ", ".join(f"{name.removesuffix('_loyalty')} {number(x)}" for name, x in found["agreement"].items())
        said.append(f"{form} on the dev set: {metrics}; agreement with the student: {same}.")
    return said


def _digits(value: float) -> str:
    """Three, and no powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
