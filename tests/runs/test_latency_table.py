"""Ratios, tables and sentences about timings that are given."""

import math
from typing import Any

import numpy as np
import pytest

from lad_dist.compression import footprint
from lad_dist.runs.latency_table import (
    latency_conditions,
    latency_of,
    latency_remarks,
    latency_tables,
    speedups,
)

SECONDS = {  # of one sequence and of 32
    ("teacher", "torch"): (0.008, 0.060),
    ("teacher", "onnx"): (0.006, 0.050),
    ("teacher", "onnx int8"): (0.002, 0.040),
    ("student", "torch"): (0.004, 0.040),
    ("student", "onnx"): (0.003, 0.020),
    ("student", "onnx fp16"): (0.006, 0.080),
    ("student", "onnx int8"): (0.001, 0.025),
}


def timings(device: str = "cpu", **changed: Any) -> list[dict[str, Any]]:
    return [
        {"model": model, "form": form, "device": device, "batch": batch, "length": 48, "seconds": both[number]}
        for number, batch in enumerate((1, 32))
        for (model, form), both in SECONDS.items()
        if model not in changed.get("without", ())
    ]


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    student = {"parameters": 100, "stored": 100, "nonzero": 100, footprint.FLOPS: 1e6}
    metrics = {"accuracy": 0.5}
    quality = {"torch": {"metrics": metrics}, "onnx int8": {"metrics": metrics, "loyalty": {"label_loyalty": 0.99}}}
    return {
        "threads": 1,
        "devices": {"cpu": "x86_64"},
        "lengths": "as asked for",
        "teacher": {**student, footprint.FLOPS: 4e6, "bytes/safetensors": 4e6, "bytes/onnx int8": 1e6},
        "student": student,
        "quality": {"teacher": quality, "student": quality},
        "timings": rows,
    }


def test_a_timing_is_compared_with_the_teacher_in_the_same_form_and_in_torch() -> None:
    rows = timings()
    ratios = {(x["model"], x["form"], x["batch"]): y for x, y in zip(rows, speedups(rows), strict=True)}
    assert ratios["teacher", "torch", 1] == (1, 1)
    assert ratios["teacher", "onnx int8", 1] == (1, 4)
    assert ratios["student", "torch", 1] == (2, 2)
    assert ratios["student", "onnx", 32] == pytest.approx((2.5, 3))
    assert ratios["student", "onnx int8", 1] == (2, 8)
    same_form, torch_ratio = ratios["student", "onnx fp16", 32]
    assert math.isnan(same_form)
    assert torch_ratio == 0.75


def test_ratios_are_those_of_one_device() -> None:
    rows = timings() + [row | {"seconds": row["seconds"] / 100} for row in timings("cuda")]
    assert np.ravel(speedups(rows)[14:]) == pytest.approx(np.ravel(speedups(rows[14:])), nan_ok=True)
    assert all(math.isnan(ratio) for each in speedups(timings(without=["teacher"])) for ratio in each)


def test_one_table_of_forms_and_one_of_speed() -> None:
    (form_header, forms), (header, rows) = latency_tables(table(timings()))
    assert form_header == [
        "model", "form", "weights", "not zero", "MFLOP/token", "MB", "accuracy", "label_loyalty to torch"
    ]  # fmt: skip
    assert forms[0] == ["teacher", "torch", "100", "100", "4", "4.0", "0.5", "-"]
    assert forms[2] == ["teacher", "onnx int8", "100", "100", "4", "1.0", "0.5", "0.99"]
    assert forms[4] == ["student", "onnx", "100", "100", "1", "-", "-", "-"]
    assert header == ["model", "form", "device", "1 x 48", "32 x 48"]
    assert rows[2] == ["teacher", "onnx int8", "cpu", "2 ms, 1.00x, 4.00x", "40 ms, 1.00x, 1.50x"]
    assert rows[6] == ["student", "onnx int8", "cpu", "1 ms, 2.00x, 8.00x", "25 ms, 1.60x, 2.40x"]
    alone = table(timings(without=["teacher"]))
    del alone["teacher"]
    assert latency_tables(alone)[1][1][0] == ["student", "torch", "cpu", "4 ms", "40 ms"]
    assert "teacher" not in latency_conditions(alone)
    assert "sequences at once x tokens of each (as asked for)" in latency_conditions(alone)


def test_the_remarks_tell_quantizing_from_distilling() -> None:
    measured = table(timings())
    assert latency_remarks(measured["student"], measured) == [
        "It has 1/4.00 of the teacher's FLOPs per token and runs 1.50 to 2.00 times as fast; not all that is saved on "
        "paper is saved in time.",
        "Quantize first, then distil: at 1 x 48 the teacher in int8 runs 4.00 times as fast as in torch. The student "
        "in int8 runs 2.00 times as fast as that teacher, and 8.00 times as fast as the teacher in torch.",
        "int8 is smaller than fp32 and not faster at 32 x 48 (0.80x).",
        "fp16 is a form for GPUs: on this CPU it runs 0.25 to 0.50 times as fast as fp32.",
    ]
    torch_alone = table([row for row in timings() if row["form"] == "torch"])
    assert latency_remarks(torch_alone["student"], torch_alone)[1:] == [
        "Quantize first, then distil: --int8 shows what quantizing gives the teacher alone, and both together."
    ]


def test_a_measurement_of_a_version_without_models_does_not_count() -> None:
    current = table(timings())
    old = {"timings": [{"form": "onnx", "seconds": 1.0}]}
    assert latency_of({"latency": current}) is current
    assert latency_of({"latency": old}) is None
    assert latency_of({}) is None
