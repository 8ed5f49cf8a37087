"""The command evaluate."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lad_dist.cli.console import loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE
from lad_dist.config.evaluation_schema import EvaluateConfig

TABLES = ("classes", "confusion", "calibration", "temperature")  # of the result, beside its numbers
MAX_COLUMNS = 12  # classes of a confusion matrix that fits the terminal


def evaluate(config: EvaluateConfig) -> int:
    """Evaluate a model on a task's dev set; with a teacher, also the loyalty to it and the speed-up.

    A model is a folder, a run, an .onnx file, a compact.safetensors, or a hub name. Of a classification, also
    precision, recall and F1 by class, the confusion matrix, and how far the probabilities are calibrated.

    usage: lad-dist evaluate CONFIG [key=value …]
           deepspeed launch/evaluate.py CONFIG [key=value …]   (or torchrun, or srun python)

    example: lad-dist evaluate configs:task/evaluate_file.toml model.path=runs/small data.dev=test.csv out=test.json

    example: lad-dist evaluate configs:task/evaluate.toml data.task=rte model.path=runs/lad-rte/export \
teacher.path=runs/teacher-rte/export
    """
    with loading_libraries():
        from lad_dist.evaluation import evaluate as evaluation
        from lad_dist.evaluation.classification import TEMPERATURES

    scores = evaluation.evaluate(config)
    teacher = scores.get("teacher", {})
    rows = [(name, value, teacher.get(name, "")) for name, value in scores["model"].items() if name not in TABLES]
    print_table(config.model.path, ("", "model", "teacher"), rows)
    if "classes" in scores["model"]:
        for title, header, rows in classification_tables(scores["model"], teacher):
            print_table(title, header, rows)
    for name, scored in scores.items():
        if "temperature" in scored:
            say(temperature_remark(name, scored["temperature"]["value"], TEMPERATURES))
    if config.out is not None:
        say(f"{config.out}" + (", and pictures beside it" if "classes" in scores["model"] else ""))
    return EXIT_DONE


def temperature_remark(name: str, value: float, limits: tuple[float, float]) -> str:
    """Return what a fitted temperature means, and on what it was scored."""
    if not limits[0] * 1.01 < value < limits[1] / 1.01:
        return f"{name}: no temperature calibrates it: all decisions are right, or they are no better than chance"
    return (
        f"{name}: temperature {value:.4g} fits the whole dev set; the table scores each half of the dev set with the "
        f"temperature that fits the other half; lad-dist predict … temperature={value:.4g} applies it"
    )


def classification_tables(
    model: Mapping[str, Any], teacher: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[str], list[tuple[Any, ...]]]]:
    """Yield title, header and rows of the tables that say what a model and its teacher do with each class."""
    names = list(model["classes"])
    header = ["", "examples", "precision", "recall", "F1", *(["teacher's F1"] if teacher else [])]
    rows = [
        (name, *(each[key] for key in ("support", "precision", "recall", "f1")),
         *([teacher["classes"][name]["f1"]] if teacher else []))
        for name, each in model["classes"].items()
    ]  # fmt: skip
    yield "by class", header, rows
    if len(names) <= MAX_COLUMNS:
        counts = [(name, *row) for name, row in zip(names, model["confusion"], strict=True)]
        yield "label (rows) and prediction (columns)", ["", *names], counts
    else:
        mistakes = [
            (count, name, other)
            for name, row in zip(names, model["confusion"], strict=True)
            for other, count in zip(names, row, strict=True)
            if name != other and count
        ]
        most = sorted(mistakes, key=lambda mistake: -mistake[0])[:MAX_COLUMNS]
        yield "most frequent mistakes", ("examples", "label", "prediction"), most
    calibrations = [
        (f"{role}{suffix}", each["accuracy"], each["confidence"], each["ece"], each["nll"])
        for role, scores in (("model", model), ("teacher", teacher))
        for suffix, each in _calibrations(scores)
    ]
    yield "calibration", ("", "accuracy", "mean confidence", "ECE", "NLL"), calibrations


def _calibrations(scores: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    if "calibration" in scores:
        yield "", scores["calibration"]
    if "temperature" in scores:
        yield f", temperature {scores['temperature']['value']:.3g}", scores["temperature"]
