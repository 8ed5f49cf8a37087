"""What `lad-dist latency` measured, as tables and sentences: for the terminal and for the model card.

Of each timing two ratios count. Against the teacher in the same form: what distilling gives. Against the teacher in
torch: what distilling and the form give together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lad_dist.compression.footprint import FLOPS, FP16, INT8, ONNX
from lad_dist.utils.text import plain_number

TEACHER, STUDENT = "teacher", "student"
TORCH = "torch"  # the form of the folder itself
NOTABLE = 0.01  # share of zeros, or of weights saved, from which on a remark mentions it
SHORT = 0.8  # share of the speed that FLOPs promise, below which a remark mentions it

Numbers = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]


def latency_of(results: Numbers) -> Numbers | None:
    """Return the table "latency" of results.json; None where nothing was measured, or by a version without models."""
    latency = results.get("latency")
    if isinstance(latency, Mapping) and any("model" not in timing for timing in latency.get("timings", [])):
        return None
    return latency


class Speedup(NamedTuple):
    """How many times as fast as the teacher; NaN where that was not measured."""

    same_form: float
    torch: float


def speedups(timings: Sequence[Numbers]) -> list[Speedup]:
    """Return for each timing how many times as fast as the teacher it is, on the same device, in the same shape."""
    teacher = {_key(timing): timing["seconds"] for timing in timings if timing["model"] == TEACHER}
    return [
        Speedup(*(teacher.get(_key(timing, form), math.nan) / timing["seconds"] for form in (timing["form"], TORCH)))
        for timing in timings
    ]


def _key(timing: Numbers, form: str | None = None) -> tuple[Any, ...]:
    return (form or timing["form"], timing["device"], timing["batch"], timing["length"])


def latency_tables(latency: Numbers) -> tuple[Table, Table]:
    """Return two tables: size and quality of each form, and its speed in each shape."""
    return _form_table(latency), _speed_table(latency)


def _form_table(latency: Numbers) -> Table:
    scores = {
        (model, form): {**each["metrics"], **{f"{name} to torch": x for name, x in each.get("loyalty", {}).items()}}
        for model, forms in latency["quality"].items()
        for form, each in forms.items()
    }
    names = list(dict.fromkeys(name for each in scores.values() for name in each))
    rows = []
    for model, form in dict.fromkeys((timing["model"], timing["form"]) for timing in latency["timings"]):
        quality = scores.get((model, form), {})
        rows.append(
            [model, form, *_sizes(latency[model], form), *(_number(quality.get(name, math.nan)) for name in names)]
        )
    return ["model", "form", "weights", "not zero", "MFLOP/token", "MB", *names], rows


def _sizes(model: Numbers, form: str) -> list[str]:
    """Return the cells of the sizes; a model in torch may have a file of its compact form."""
    size = model.get(f"bytes/{form}") or model.get("bytes/compact") or model.get("bytes/safetensors")
    flops = f"{model[FLOPS] / 1e6:.3g}"
    return [f"{model['stored']:,}", f"{model['nonzero']:,}", flops, f"{size / 1e6:,.1f}" if size else "-"]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else plain_number(value)


def _speed_table(latency: Numbers) -> Table:
    timings = latency["timings"]
    shapes = list(dict.fromkeys((timing["batch"], timing["length"]) for timing in timings))
    cells: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for timing, speedup in zip(timings, speedups(timings), strict=True):
        ratios = "" if math.isnan(speedup.torch) else "".join(f", {ratio:.2f}x" for ratio in speedup)
        cell = f"{plain_number(1e3 * timing['seconds'], digits=3)} ms{ratios}"
        row = cells.setdefault((timing["model"], timing["form"], timing["device"]), {})
        row[timing["batch"], timing["length"]] = cell
    rows = [[*name, *(row.get(shape, "-") for shape in shapes)] for name, row in cells.items()]
    return ["model", "form", "device", *(f"{batch} x {length}" for batch, length in shapes)], rows


def latency_conditions(latency: Numbers) -> str:
    """Return sentences about the conditions of the measurement."""
    count = latency["threads"]
    ratio = ", times the speed of the teacher in the same form, and of the teacher in torch" * (TEACHER in latency)
    return (
        f"Columns are sequences at once x tokens of each ({latency['lengths']}): milliseconds of a forward{ratio}. "
        f"Medians of rounds in which all forms took turns, on {', '.join(latency['devices'].values())}, "
        f"{count} thread{'s' * (count > 1)} of the CPU; a task's model with the head, others without."
    )


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
        remarks += [*_promised(latency), *_quantize_first(latency), *_not_faster(latency), *_fp16(latency)]
    return remarks


def _promised(latency: Numbers) -> list[str]:
    """Compare the speed-up that FLOPs promise with the measured one, in torch."""
    if TEACHER not in latency:
        return []
    promised = latency[TEACHER][FLOPS] / latency[STUDENT][FLOPS]
    timings, device = latency["timings"], latency["timings"][0]["device"]
    ratios = [
        speedup.torch
        for timing, speedup in zip(timings, speedups(timings), strict=True)
        if (timing["model"], timing["form"], timing["device"]) == (STUDENT, TORCH, device)
    ]
    low, high = min(ratios), max(ratios)
    text = f"It has 1/{promised:.2f} of the teacher's FLOPs per token and runs {_range(low, high)} times as fast"
    return [text + ("; not all that is saved on paper is saved in time." if low < SHORT * promised else ".")]


def _range(low: float, high: float) -> str:
    texts = dict.fromkeys(f"{ratio:.2f}" for ratio in (low, high))
    return " to ".join(texts)


def _quantize_first(latency: Numbers) -> list[str]:
    """Tell what quantizing gives without a student from what distilling adds, in the first shape."""
    if TEACHER not in latency:
        return []
    timings = latency["timings"]
    first = timings[0]["batch"], timings[0]["length"]
    int8 = {
        timing["model"]: speedup
        for timing, speedup in zip(timings, speedups(timings), strict=True)
        if timing["form"] == INT8 and (timing["batch"], timing["length"]) == first
    }
    if not int8:
        return ["Quantize first, then distil: --int8 shows what quantizing gives the teacher alone, and both together."]
    student = int8[STUDENT]
    return [
        f"Quantize first, then distil: at {first[0]} x {first[1]} the teacher in int8 runs {int8[TEACHER].torch:.2f} "
        f"times as fast as in torch. The student in int8 runs {student.same_form:.2f} times as fast as that teacher, "
        f"and {student.torch:.2f} times as fast as the teacher in torch."
    ]


def _ratios(latency: Numbers, slow: str, fast: str) -> dict[tuple[int, int], float]:
    """Return how many times as fast the student is on the CPU in one form as in another, by shape."""
    seconds: dict[str, dict[tuple[int, int], float]] = {slow: {}, fast: {}}
    for timing in latency["timings"]:
        if timing["model"] == STUDENT and timing["device"] == "cpu" and timing["form"] in seconds:
            seconds[timing["form"]][timing["batch"], timing["length"]] = timing["seconds"]
    return {shape: seconds[slow][shape] / time for shape, time in seconds[fast].items()}


def _not_faster(latency: Numbers) -> list[str]:
    """Name the shapes at which int8 is not faster than fp32."""
    ratios = _ratios(latency, ONNX, INT8)
    slow = [f"{batch} x {length} ({ratio:.2f}x)" for (batch, length), ratio in ratios.items() if ratio <= 1]
    return [f"int8 is smaller than fp32 and not faster at {', '.join(slow)}."] if slow else []


def _fp16(latency: Numbers) -> list[str]:
    """Tell that fp16 is a form for GPUs."""
    ratios = sorted(_ratios(latency, ONNX, FP16).values())
    if not ratios:
        return []
    return [f"fp16 is a form for GPUs: on this CPU it runs {_range(ratios[0], ratios[-1])} times as fast as fp32."]
