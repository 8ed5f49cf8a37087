"""Latency of a run's student: size and time of a forward beside the teacher's, in every form that ships.

The student is measured in its compact form, by transformers' own attention, as it is served: a task's model with its
head, a language model without. All forms run on the CPU; PyTorch's forms also on a GPU, if there is one.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lad_dist.compression import compact, footprint
from lad_dist.config.errors import UserError
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TaskDataConfig, TrainConfig, train_schema
from lad_dist.core.batch import Batch
from lad_dist.core.collate import collate
from lad_dist.data.tasks.examples import TaskExamples, tokenize
from lad_dist.data.tasks.task import check_task, load_task
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import evaluate, interleaved_timing, onnx_export
from lad_dist.evaluation.onnx_export import Session
from lad_dist.evaluation.predictor import padded_logits
from lad_dist.models import loading
from lad_dist.models.dims import max_positions
from lad_dist.models.frozen import InferenceModel
from lad_dist.models.heads import head_of_architectures, label_thresholds
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import check_weight_files
from lad_dist.runs import run_folder
from lad_dist.runs.model_card import INT8, ONNX, STUDENT, TEACHER
from lad_dist.utils import progress
from lad_dist.utils.text import command_line

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LatencyRequest:
    """The run to measure, and in which forms.

    Attributes:
        folder: of a complete run.
        onnx: also export and measure the fp32 form.
        int8: also export and measure the int8 form.
        rounds: of each shape; by default as many as fit into a fixed time.
        teacher: path of the teacher, if it is not the one in the run's config any longer.
    """

    folder: Path
    onnx: bool = False
    int8: bool = False
    rounds: int | None = None
    teacher: str | None = None

    @property
    def export(self) -> Path:
        """The student's folder."""
        return self.folder / "export"


def measure(request: LatencyRequest) -> dict[str, Any]:
    """Measure a run's student, and return the table "latency" of results.json.

    Raises:
        UserError: the run, the teacher or the data cannot be read; where possible before weights are read.
    """
    results = run_folder.read_results(request.folder)
    config = parse_config(train_schema(results["config"]), results["config"], str(request.folder / "results.json"))
    teacher_path = request.teacher or (config.teacher.path if config.teacher else None)
    shapes = interleaved_timing.batch_shapes(_check(request, teacher_path))
    dev = _dev_examples(config, request) if request.onnx or request.int8 else None
    student = InferenceModel(compact.load_compact(request.export))
    sessions = _export_forms(request, student)
    forms = {STUDENT: student}
    if teacher_path is not None:
        head = head_of_architectures([type(student.model).__name__])
        teacher = loading.load_model(teacher_path, head, require_head=head != "none")
        forms = {TEACHER: InferenceModel(teacher), STUDENT: student}
    latency: dict[str, Any] = {
        "command": command_line(),
        "threads": torch.get_num_threads(),
        "devices": {"cpu": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})", **_gpu()},
        "versions": {name: version(name) for name in ("torch", "transformers", *(["onnxruntime"] if sessions else []))},
        **{form: _sizes(model, shapes) for form, model in forms.items()},
        "quality": {} if dev is None else _quality(dev, student, sessions),
        "timings": [asdict(timing) for timing in _timings(forms, sessions, shapes, request.rounds)],
    }
    # A low-rank map is two maps in the compact form: only the run knows the parameters of the merged student.
    latency[STUDENT] |= {"parameters": results["student"]["parameters"], **footprint.bytes_table(request.export)}
    if teacher_path is not None:
        latency[TEACHER] |= footprint.bytes_table(Path(teacher_path))
    tables = {"student": footprint.bytes_table(request.export), "latency": latency}
    run_folder.add_to_results(request.folder, tables)
    return latency


def single_sequence_seconds(export: Path, rounds: int) -> float:
    """Return the median seconds of one sequence of the shortest length through an exported student, on the CPU."""
    student = InferenceModel(compact.load_compact(export))
    shape = min(interleaved_timing.batch_shapes(max_positions(student.model.config)))
    inputs = onnx_export.example_inputs(student, [shape[1]] * shape[0])
    (timing,) = interleaved_timing.time_interleaved({STUDENT: partial(student, **inputs)}, CPU, shape, rounds)
    return timing.seconds


def _check(request: LatencyRequest, teacher: str | None) -> int:
    """Return the number of tokens for which all models have positions."""
    if request.onnx or request.int8:
        onnx_export.check()
    if not request.export.is_dir():
        raise UserError(f"{request.export}: no such folder; a complete run exports the student to it")
    paths = [str(request.export), *([teacher] if teacher else [])]
    for path in paths:
        check_weight_files(path)
    return min(max_positions(load_hf_config(path)) for path in paths)


def _dev_examples(config: TrainConfig, request: LatencyRequest) -> TaskExamples | None:
    """Return the task's dev set, on which forms are compared; None for pre-training."""
    if not isinstance(config.data, TaskDataConfig):
        return None
    check_task(config.data)
    task = load_task(config.data)
    tokenizer = load_tokenizer(request.export)
    return tokenize(task, task.dev["dev"], tokenizer, config.data, f"{task.name}'s dev data")


def _export_forms(request: LatencyRequest, student: InferenceModel) -> dict[str, Session]:
    """Write the requested forms anew and return their sessions; int8 is quantized from fp32."""
    files = {}
    if request.onnx or request.int8:
        files[ONNX] = request.export / footprint.FORMS[ONNX]
        with progress.waiting(f"exporting {files[ONNX]}"):
            onnx_export.export(student, files[ONNX])
    if request.int8:
        files[INT8] = request.export / footprint.FORMS[INT8]
        with progress.waiting(f"quantizing to {files[INT8]}"):
            onnx_export.quantize(files[ONNX], files[INT8])
    return {form: Session(file) for form, file in files.items()}


def _sizes(model: InferenceModel, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the footprint at the shortest length, and the FLOPs per token at each length."""
    batches = {length: _single_sequence(model, length) for length in sorted({length for _, length in shapes})}
    sizes = footprint.footprint(model.model, next(iter(batches.values())))
    for length, batch in batches.items():
        sizes[f"{footprint.FLOPS}/at {length}"] = sum(footprint.flops(model.model, batch).values()) / length
    return sizes


def _single_sequence(model: InferenceModel, length: int) -> Batch:
    """Return a batch of one sequence; heads of tokens read all of it, others the first token."""
    reads_tokens = head_of_architectures([type(model.model).__name__]) in ("tagging", "question_answering")
    head_positions = np.arange(length if reads_tokens else 1)
    tokens = np.zeros(length, dtype=np.int64)
    labels = np.zeros(len(head_positions), dtype=np.int64)
    return collate([tokens], [tokens.astype(np.uint8)], head_positions, labels)


def _timings(
    forms: Mapping[str, InferenceModel],
    sessions: Mapping[str, Session],
    shapes: Sequence[tuple[int, int]],
    rounds: int | None,
) -> list[interleaved_timing.Timing]:
    timings = []
    for device in [CPU, *(torch.device(name) for name in _gpu())]:
        for model in forms.values():
            model.to(device)
        for batch, length in shapes:
            calls: dict[str, Callable[[], object]] = {}
            for form, model in forms.items():
                inputs = onnx_export.example_inputs(model, [length] * batch)
                calls[form] = partial(model, **{name: x.to(device) for name, x in inputs.items()})
            if device == CPU:
                inputs = onnx_export.example_inputs(forms[STUDENT], [length] * batch)
                calls |= {form: partial(session, inputs) for form, session in sessions.items()}
            timings += interleaved_timing.time_interleaved(calls, device, (batch, length), rounds)
    return timings


def _gpu() -> dict[str, str]:
    return {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _quality(dev: TaskExamples, student: InferenceModel, sessions: Mapping[str, Session]) -> dict[str, Any]:
    """Return the task's metrics of each exported form, and how far the form decides as the student does."""
    padding = student.model.config.pad_token_id or 0

    def predict(form: str, forward: Callable[[Mapping[str, Tensor]], Sequence[Any]]) -> Any:
        predictions = evaluate.predict(lambda x: padded_logits(forward, padding, x.to(CPU)), dev.in_order())
        evaluate.check_finite(form, {"dev": predictions})
        return predictions.logits

    student_logits = predict(STUDENT, lambda inputs: student(**inputs))
    quality = {}
    for form, session in sessions.items():
        form_logits = predict(form, session)
        metrics = dev.score(form_logits) | dev.tuned_score(form_logits, label_thresholds(student.model.config))
        quality[form] = {"metrics": metrics, "loyalty": dev.loyalty(form_logits, student_logits)}
    return quality
