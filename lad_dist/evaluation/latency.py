"""Latency of a run's student: size and time of a forward beside the teacher's, both in every form that ships.

A form is compared with the same form of the teacher: quantizing makes the teacher faster too. The models are measured
in their compact form, by transformers' own attention, as they are served: a task's model with its head, a language
model without. All forms run on the CPU; PyTorch's also on a GPU, if there is one.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lad_dist.compression import compact, footprint
from lad_dist.config.errors import UserError
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TaskDataConfig, TrainConfig, train_schema
from lad_dist.core.batch import TEXT_HEADS, Batch
from lad_dist.core.collate import collate
from lad_dist.data.tasks.examples import TaskExamples, tokenize
from lad_dist.data.tasks.task import check_task, load_task
from lad_dist.data.tokenization.loading import load_tokenizer, tokenizer_of_teacher
from lad_dist.evaluation import evaluate, interleaved_timing, onnx_export
from lad_dist.evaluation.interleaved_timing import ModelForm
from lad_dist.evaluation.onnx_export import Session
from lad_dist.evaluation.predictor import padded_logits
from lad_dist.models.dims import max_positions
from lad_dist.models.frozen import InferenceModel
from lad_dist.models.heads import head_of_architectures, label_order, label_thresholds
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import check_weight_files
from lad_dist.runs import run_folder
from lad_dist.runs.latency_table import STUDENT, TEACHER, TORCH
from lad_dist.utils.text import command_line

CPU = torch.device("cpu")
BATCHES = (1, 32)
MIN_LENGTH = 2  # tokens, for which an exported model is valid
SINGLE_LENGTH = 128  # tokens of the sequence that `single_sequence_seconds` times


@dataclass(frozen=True)
class LatencyRequest:
    """The run to measure, in which forms and shapes.

    Attributes:
        folder: of a complete run.
        forms: in which student and teacher are exported and measured beside PyTorch; fp32 is one if there are others.
        batches: numbers of sequences at once.
        lengths: tokens of each sequence; default: median and maximum of the task's dev set, or data.max_length of a
            pre-training.
        rounds: of each shape; by default as many as fit into a fixed time.
        teacher: path of the teacher, if it is not the one in the run's config any longer.
    """

    folder: Path
    forms: Sequence[str] = ()
    batches: Sequence[int] = BATCHES
    lengths: Sequence[int] | None = None
    rounds: int | None = None
    teacher: str | None = None

    @property
    def export(self) -> Path:
        """The student's folder."""
        return self.folder / "export"


@dataclass(frozen=True)
class _DevSet:
    """The task's dev set in the tokens of a model, and the order of the task's labels among the model's outputs."""

    examples: TaskExamples
    order: list[int] | None


def measure(request: LatencyRequest) -> dict[str, Any]:
    """Measure a run's student and teacher, and return the table "latency" of results.json.

    Raises:
        UserError: the run, the teacher or the data cannot be read, or a model has no positions for a length; where
            possible before weights are read.
    """
    results = run_folder.read_results(request.folder)
    config = parse_config(train_schema(results["config"]), results["config"], str(request.folder / "results.json"))
    teacher_path = request.teacher or (config.teacher.path if config.teacher else None)
    paths = {**({TEACHER: teacher_path} if teacher_path else {}), STUDENT: str(request.export)}
    positions = _check(request, paths)
    dev_sets = _dev_sets(config, paths) if request.forms or request.lengths is None else {}
    lengths, origin = _lengths(request, config, dev_sets, positions)
    shapes = [(batch, length) for length in lengths for batch in request.batches]
    latency: dict[str, Any] = {
        "command": command_line(),
        "threads": torch.get_num_threads(),
        "devices": {"cpu": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})", **_gpu()},
        "versions": {name: version(name) for name in ("torch", "transformers", *["onnxruntime"][: len(request.forms)])},
        "lengths": origin,
        "quality": {},
    }
    models: dict[str, InferenceModel] = {}
    sessions: dict[ModelForm, Session] = {}
    with TemporaryDirectory(dir=request.folder, prefix="teacher-") as temporary:
        for name, path in paths.items():
            models[name] = InferenceModel(compact.load_compact(path))
            folder = request.export if name == STUDENT else Path(temporary)
            exported = _export(models[name], path, folder, request.forms)
            latency[name] = _sizes(models[name], lengths) | footprint.bytes_table(Path(path))
            latency[name] |= footprint.bytes_table(folder)
            if exported and name in dev_sets:
                latency["quality"][name] = _quality(name, models[name], exported, dev_sets[name])
            sessions |= {ModelForm(name, form): session for form, session in exported.items()}
        latency["timings"] = [asdict(timing) for timing in _timings(models, sessions, shapes, request.rounds)]
    # A low-rank map is two maps in the compact form: only the run knows the parameters of the merged student.
    latency[STUDENT]["parameters"] = results["student"]["parameters"]
    run_folder.add_to_results(request.folder, {"student": footprint.bytes_table(request.export), "latency": latency})
    return latency


def single_sequence_seconds(export: Path, rounds: int) -> float:
    """Return the median seconds of one sequence of SINGLE_LENGTH tokens through an exported student, on the CPU."""
    student = InferenceModel(compact.load_compact(export))
    length = min(SINGLE_LENGTH, max_positions(student.model.config))
    call = partial(student, **onnx_export.example_inputs(student, [length]))
    (timing,) = interleaved_timing.time_interleaved({ModelForm(STUDENT, TORCH): call}, CPU, (1, length), rounds)
    return timing.seconds


def _check(request: LatencyRequest, paths: Mapping[str, str]) -> int:
    """Return the number of tokens for which all models have positions."""
    if request.forms:
        onnx_export.check()
    if not request.export.is_dir():
        raise UserError(f"{request.export}: no such folder; a complete run exports the student to it")
    positions = {}
    for path in paths.values():
        check_weight_files(path)
        positions[path] = max_positions(load_hf_config(path))
    path = min(positions, key=positions.__getitem__)
    longest = max(request.lengths or (0,))
    if longest > positions[path]:
        raise UserError(f"latency: --length {longest}: {path} has positions for {positions[path]} tokens")
    return positions[path]


def _dev_sets(config: TrainConfig, paths: Mapping[str, str]) -> dict[str, _DevSet]:
    """Return for each model the task's dev set, on which forms are compared; none for pre-training."""
    if not isinstance(config.data, TaskDataConfig):
        return {}
    check_task(config.data)
    task = load_task(config.data)
    tokenizer = load_tokenizer(paths[STUDENT])
    token_level = None if task.kind in TEXT_HEADS else f'data.kind = "{task.kind}"'
    orders = {
        name: label_order(load_hf_config(path), path, task.kind, task.outputs, fixed_order=task.fixed_order)
        for name, path in paths.items()
    }
    encode = partial(tokenize, task, task.dev["dev"], data=config.data, description=f"{task.name}'s dev data")
    examples = encode(tokenizer)
    sets = {STUDENT: _DevSet(examples, orders[STUDENT])}
    if TEACHER in paths:
        teacher_tokenizer = tokenizer_of_teacher(paths[TEACHER], tokenizer, token_level)
        teacher_examples = examples if teacher_tokenizer is tokenizer else encode(teacher_tokenizer)
        sets[TEACHER] = _DevSet(teacher_examples, orders[TEACHER])
    return sets


def _lengths(
    request: LatencyRequest, config: TrainConfig, dev_sets: Mapping[str, _DevSet], positions: int
) -> tuple[list[int], str]:
    """Return the lengths to measure, shortest first, and in words where they come from."""
    if request.lengths is not None:
        return sorted(set(request.lengths)), "as asked for"
    if STUDENT in dev_sets:
        tokens = dev_sets[STUDENT].examples.lengths
        lengths, origin = [int(np.median(tokens)), int(tokens.max())], "median and maximum of the dev set"
    else:
        lengths, origin = [config.data.max_length], "data.max_length of the run"
    return sorted({min(max(length, MIN_LENGTH), positions) for length in lengths}), origin


def _export(model: InferenceModel, path: str, folder: Path, forms: Sequence[str]) -> dict[str, Session]:
    """Write the requested forms anew below a folder, and return their sessions."""
    if not forms:
        return {}
    files = onnx_export.export_forms(model, path, (folder / footprint.FORMS[footprint.ONNX]).parent, forms)
    return {form: Session(folder / name) for form, name in footprint.FORMS.items() if folder / name in files}


def _sizes(model: InferenceModel, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the footprint at the shortest length, and the FLOPs per token at each length."""
    batches = {length: _single_sequence(model, length) for length in lengths}
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
    models: Mapping[str, InferenceModel],
    sessions: Mapping[ModelForm, Session],
    shapes: Sequence[tuple[int, int]],
    rounds: int | None,
) -> list[interleaved_timing.Timing]:
    timings = []
    for device in [CPU, *(torch.device(name) for name in _gpu())]:
        for model in models.values():
            model.to(device)
        for batch, length in shapes:
            calls: dict[ModelForm, Callable[[], object]] = {}
            for name, model in models.items():
                inputs = onnx_export.example_inputs(model, [length] * batch)
                on_device = {key: x.to(device) for key, x in inputs.items()}
                calls[ModelForm(name, TORCH)] = partial(model, **on_device)
                if device == CPU:
                    calls |= {key: partial(session, inputs) for key, session in sessions.items() if key.model == name}
            timings += interleaved_timing.time_interleaved(calls, device, (batch, length), rounds)
    return timings


def _gpu() -> dict[str, str]:
    return {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _quality(
    name: str, model: InferenceModel, sessions: Mapping[str, Session], dev: _DevSet
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the task's metrics of a model in each form, and how far an exported form decides as the model in torch."""
    padding = model.model.config.pad_token_id or 0

    def logits_of(form: str, forward: Callable[[Mapping[str, Tensor]], Sequence[Any]]) -> Any:
        predictions = evaluate.predict(
            lambda x: padded_logits(forward, padding, x.to(CPU)), dev.examples.in_order(), f"{name} {form} on dev"
        )
        evaluate.check_finite(f"{name} in {form}", {"dev": predictions})
        return predictions.logits if dev.order is None else predictions.logits[:, dev.order]

    def scores(logits: Any) -> dict[str, float]:
        return dev.examples.score(logits) | dev.examples.tuned_score(logits, thresholds)

    thresholds = label_thresholds(model.model.config, dev.order)

    torch_logits = logits_of(TORCH, lambda inputs: model(**inputs))
    quality = {TORCH: {"metrics": scores(torch_logits)}}
    for form, session in sessions.items():
        logits = logits_of(form, session)
        quality[form] = {"metrics": scores(logits), "loyalty": dev.examples.loyalty(logits, torch_logits)}
    return quality
