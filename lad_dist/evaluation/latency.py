"""The ledger of a run: what its student weighs and how long it takes, beside its teacher, in every form that ships.

    measure(asked)   exports what is asked for, measures, and writes the run's results.json and model card anew

The student is measured in its compact form, by transformers' own attention, as it is served; with its head where that
is of a task, without where it is of words. On the CPU; PyTorch's forms also on a GPU, where there is one.
"""

import platform
import shlex
import sys
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
from lad_dist.models import loading
from lad_dist.models.dims import max_positions
from lad_dist.models.frozen import InferenceModel
from lad_dist.models.heads import head_of_architectures
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import PreTrainedModel, check_weight_files
from lad_dist.runs import run_folder
from lad_dist.runs.model_card import INT8, ONNX, STUDENT, TEACHER

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LatencyRequest:
    """`onnx`, `int8`: forms to export and measure too; `rounds`: of each shape, by default as many as fit in a while;
    `teacher`: where it lies now."""

    folder: Path
    onnx: bool = False
    int8: bool = False
    rounds: int | None = None
    teacher: str | None = None

    @property
    def export(self) -> Path:
        return self.folder / "export"


def measure(asked: LatencyRequest) -> dict[str, Any]:
    """The ledger. Raises UserError before weights are read where that is possible."""
    results = run_folder.read_results(asked.folder)
    config = parse_config(train_schema(results["config"]), results["config"], str(asked.folder / "results.json"))
    taught_by = asked.teacher or (config.teacher.path if config.teacher else None)
    room = _check(asked, taught_by)
    dev = _dev(config, asked) if asked.onnx or asked.int8 else None
    student = InferenceModel(compact.load_compact(asked.export))
    teacher = None if taught_by is None else InferenceModel(_teacher(taught_by, student))
    sessions = _sessions(asked, student)
    forms = {STUDENT: student} if teacher is None else {TEACHER: teacher, STUDENT: student}
    ledger: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        "devices": {"cpu": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})", **_gpu()},
        "versions": {name: version(name) for name in ("torch", "transformers", *(["onnxruntime"] if sessions else []))},
        **{form: _sizes(served, interleaved_timing.shapes(room)) for form, served in forms.items()},
        "quality": {} if dev is None else _quality(dev, student, sessions),
        "timings": [
            asdict(timing) for timing in _timings(forms, sessions, interleaved_timing.shapes(room), asked.rounds)
        ],
    }
    # What runs holds its pairs as two maps each: only the run knows what they are folded.
    ledger[STUDENT] |= {"parameters": results["student"]["parameters"], **footprint.table_on_disk(asked.export)}
    if taught_by is not None:
        ledger[TEACHER] |= footprint.table_on_disk(Path(taught_by))
    run_folder.add_to_results(asked.folder, {"student": footprint.table_on_disk(asked.export), "ledger": ledger})
    return ledger


def _check(asked: LatencyRequest, teacher: str | None) -> int:
    """Tokens that all models have positions for."""
    if asked.onnx or asked.int8:
        onnx_export.check()
    if not asked.export.is_dir():
        raise UserError(f"{asked.export}: no such folder; a run that is complete has its student there")
    paths = [str(asked.export), *([teacher] if teacher else [])]
    for path in paths:
        check_weight_files(path)
    return min(max_positions(load_hf_config(path)) for path in paths)


def _dev(config: TrainConfig, asked: LatencyRequest) -> TaskExamples | None:
    """The task's dev set, for what is to be compared; None of a pre-training."""
    if not isinstance(config.data, TaskDataConfig):
        return None
    check_task(config.data)
    task = load_task(config.data)
    tokenizer = load_tokenizer(asked.export)
    return tokenize(task, task.dev["dev"], tokenizer, config.data, f"{task.name}'s dev data")


def _teacher(path: str, student: InferenceModel) -> PreTrainedModel:
    """With a head of the student's kind."""
    head = head_of_architectures([type(student.model).__name__])
    return loading.load_model(path, head, whole=head != "none")


def _sessions(asked: LatencyRequest, student: InferenceModel) -> dict[str, Session]:
    """The files that are asked for, written anew. int8 is made of fp32."""
    wanted = [form for form, wish in ((ONNX, asked.onnx or asked.int8), (INT8, asked.int8)) if wish]
    files = {form: asked.export / footprint.FORMS[form] for form in wanted}
    if ONNX in files:
        onnx_export.export(student, files[ONNX])
    if INT8 in files:
        onnx_export.quantize(files[ONNX], files[INT8])
    return {form: Session(file) for form, file in files.items()}


def _sizes(served: InferenceModel, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """At the shortest length, and the FLOPs per token at each."""
    lengths = sorted({length for _, length in shapes})
    batches = {length: _one(served, length) for length in lengths}
    at = {
        f"{footprint.FLOPS}/at {length}": sum(footprint.flops(served.model, batch).values()) / length
        for length, batch in batches.items()
    }
    return {**footprint.footprint(served.model, batches[lengths[0]]), **at}


def _one(served: InferenceModel, length: int) -> Batch:
    """A sequence of that length; heads of tokens read all of it."""
    whole = head_of_architectures([type(served.model).__name__]) in ("tagging", "question_answering")
    rows = np.arange(length if whole else 1)
    tokens = np.zeros(length, dtype=np.int64)
    return collate([tokens], [tokens.astype(np.uint8)], rows, np.zeros(len(rows), dtype=np.int64))


def _timings(
    forms: Mapping[str, InferenceModel],
    sessions: Mapping[str, Session],
    shapes: Sequence[tuple[int, int]],
    rounds: int | None,
) -> list[interleaved_timing.Timing]:
    found = []
    for device in [CPU, *(torch.device(name) for name in _gpu())]:
        for served in forms.values():
            served.to(device)
        for batch, length in shapes:
            calls = {form: _call(served, batch, length, device) for form, served in forms.items()}
            if device == CPU:
                given = onnx_export.example_inputs(forms[STUDENT], [length] * batch)
                calls |= {form: partial(session, given) for form, session in sessions.items()}
            found += interleaved_timing.interleaved(calls, device, (batch, length), rounds)
    return found


def _call(served: InferenceModel, batch: int, length: int, device: torch.device) -> Callable[[], object]:
    given = {name: x.to(device) for name, x in onnx_export.example_inputs(served, [length] * batch).items()}
    return partial(served, **given)


def _gpu() -> dict[str, str]:
    return {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _quality(dev: TaskExamples, student: InferenceModel, sessions: Mapping[str, Session]) -> dict[str, Any]:
    """Of each exported form, the task's metrics, and how far it decides as the student does."""

    def answers(run: Callable[[dict[str, Tensor]], Sequence[Any]]) -> Any:
        return evaluate.predict(lambda batch: _logits(run, student, batch.to(CPU)), dev.in_order()).logits

    ours = answers(lambda inputs: student(**inputs))
    found = {}
    for form, session in sessions.items():
        its = answers(session)
        found[form] = {"metrics": dev.score(its), "agreement": dev.loyalty(its, ours)}
    return found


def _logits(run: Callable[[dict[str, Tensor]], Sequence[Any]], served: InferenceModel, batch: Batch) -> Tensor:
    """[R, V] of a padded forward."""
    longest = int(batch.lengths.max())
    real = torch.arange(longest) < batch.lengths[:, None]
    padding = served.model.config.pad_token_id or 0
    given = {
        "input_ids": torch.full(real.shape, padding).masked_scatter(real, batch.input_ids),
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros(real.shape, dtype=torch.long).masked_scatter(real, batch.token_type_ids.long()),
    }
    outputs = [torch.as_tensor(x) for x in run({name: given[name] for name in served.inputs})]
    found = torch.stack(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
    return found if len(found.shape) == 2 else found[real].index_select(0, batch.head_positions)
