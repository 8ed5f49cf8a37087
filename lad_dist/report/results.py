"""The results of the complete task runs below folders."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import BaseModel, Field, ValidationError

from lad_dist.config.errors import UserError
from lad_dist.config.load import first_mistake, is_of_earlier_version, parse_config
from lad_dist.config.schema import CHANGEABLE_KEYS, TEACHER_PATH, TaskConfig, train_schema
from lad_dist.runs.latency_table import STUDENT, TEACHER, TORCH, latency_of
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.tables import flatten
from lad_dist.utils.text import first_line

# Settings that identify a run and its task, and not its method.
IDENTITY_KEYS = {"run.name", "run.dir", "run.seed", "data.task", "data.dev", "data.kind"} | CHANGEABLE_KEYS

Numbers = dict[str, int | float]


class _Latency(BaseModel):
    """What `lad-dist latency` adds to results.json, as far as a report reads it."""

    threads: int
    devices: dict[str, str]
    timings: list[dict[str, Any]]
    quality: dict[str, dict[str, dict[str, Numbers]]] = {}
    teacher: dict[str, Any] = {}

    @property
    def single_sequence(self) -> pd.DataFrame:
        """Timings of one sequence on the CPU, of the shortest length, by model and form."""
        timings = pd.DataFrame(self.timings, columns=["model", "form", "device", "batch", "length", "seconds"])
        timings = timings[(timings["batch"] == 1) & (timings["device"] == "cpu")].set_index(["model", "form"])
        return timings[timings["length"] == timings["length"].min()]

    def milliseconds(self, model: str, form: str) -> float:
        """Return the milliseconds of one sequence; NaN where the form was not measured."""
        return 1e3 * self.single_sequence["seconds"].get((model, form), math.nan)

    @property
    def conditions(self) -> str | None:
        """The conditions of the measurement, in words; None where there was none."""
        if not self.timings:
            return None
        length = max(self.single_sequence["length"], default=0)
        return f"{length} tokens, {self.devices.get('cpu', 'cpu')}, {self.threads} thread{'s' * (self.threads > 1)}"


_NOT_MEASURED = _Latency(threads=1, devices={}, timings=[])


class _Results(BaseModel):
    """A results.json, as far as a report reads it."""

    metrics: Numbers = Field(min_length=1)
    student: Numbers
    teacher: Numbers
    steps: int
    skipped_updates: int = 0
    seconds: float
    tokens_per_second: float
    processes: int
    device: str
    latency: _Latency = _NOT_MEASURED


class Form(NamedTuple):
    """A model as one may serve it: how good, how fast and how large; NaN for what was not measured."""

    name: str
    score: float
    latency: float  # milliseconds of one sequence
    bytes: float


@dataclass(frozen=True)
class TaskRun:
    """A complete run on a task.

    Attributes:
        folder: of the run.
        task: GLUE's name, or the path of the file with the dev set.
        config: of the run.
        results: of the run.
        settings: all keys of the config that may tell methods apart, by dotted key.
    """

    folder: str
    task: str
    config: TaskConfig
    results: _Results
    settings: dict[str, Any]

    @property
    def metric(self) -> str:
        """The main metric of the task."""
        return next(iter(self.results.metrics))

    @property
    def score(self) -> float:
        """The main metric's value."""
        return self.results.metrics[self.metric]

    @property
    def teacher(self) -> str | None:
        """The teacher's path."""
        return self.config.teacher.path if self.config.teacher else None

    @property
    def forms(self) -> list[Form]:
        """The student as it was trained, and as `lad-dist latency` exported it."""
        return self._forms(STUDENT, self.score, self.results.student)

    @property
    def teacher_forms(self) -> list[Form]:
        """The teacher in the same forms, as far as it was measured beside the student."""
        return self._forms(TEACHER, self.results.teacher.get(self.metric, math.nan), self.results.latency.teacher)

    def _forms(self, model: str, score: float, sizes: Mapping[str, Any]) -> list[Form]:
        """Return the form in torch, which has this score, and the exported ones."""
        latency = self.results.latency
        size = sizes.get("bytes/compact", sizes.get("bytes/safetensors", math.nan))
        forms = [Form(TORCH, score, latency.milliseconds(model, TORCH), size)]
        for name, scores in latency.quality.get(model, {}).items():
            if name != TORCH:
                milliseconds, size = latency.milliseconds(model, name), sizes.get(f"bytes/{name}", math.nan)
                forms.append(Form(name, scores["metrics"].get(self.metric, math.nan), milliseconds, size))
        return forms


def collect(folders: Sequence[str | Path]) -> tuple[list[TaskRun], dict[str, list[str]]]:
    """Return the complete task runs below the folders, and the skipped folders by the reason for skipping them.

    Each run is there once, whatever the order of the folders.

    Raises:
        UserError: a folder does not exist, a results.json is damaged, or there is no complete run.
    """
    runs: list[TaskRun] = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for file in _files_below(folders, "results.json"):
        tables = _read(file)
        reason = _reason_to_skip(tables.get("config"))
        if reason is None:
            runs.append(_task_run(file, tables))
        else:
            skipped[reason].append(str(file.parent))
    for file in _files_below(folders, "config.toml"):
        if not (file.parent / "results.json").exists():
            skipped["not complete"].append(str(file.parent))
    teachers = {Path(run.teacher) for run in runs if run.teacher is not None}
    compared = []
    for run in runs:
        if run.teacher is None and run.config.run.folder / "export" in teachers:
            skipped["teachers of the others, with no teacher of their own"].append(run.folder)
        elif not math.isfinite(run.score):
            skipped["the main metric is no number"].append(run.folder)
        else:
            compared.append(run)
    if not compared:
        paths = ", ".join(sorted({str(folder) for folder in folders}))
        reasons = "".join(f"; {reason}: {len(names)}" for reason, names in skipped.items())
        raise UserError(f"{paths}: no complete run on a task below{reasons}")
    return compared, skipped


def _files_below(folders: Sequence[str | Path], name: str) -> list[Path]:
    """Return the files of this name, each by one path although folders may overlap."""
    paths: dict[Path, Path] = {}
    for folder in sorted({Path(folder) for folder in folders}, reverse=True):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        paths |= {path.resolve(): path for path in folder.rglob(name)}
    return sorted(paths.values())


def _read(file: Path) -> dict[str, Any]:
    try:
        tables = parse_json(file.read_text(encoding="utf-8"))
        if isinstance(tables, dict):
            return tables
        reason = "not a JSON object"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise UserError(f"{file}: damaged ({reason}); remove it and run the run again")


def _reason_to_skip(config: Any) -> str | None:
    """Return why results with this config are no task run's; None where they are."""
    if not isinstance(config, dict):
        return "no run's results"  # a search and the quickstart write a results.json of their own, without a config
    if is_of_earlier_version(config):
        return "of an earlier version of lad_dist"
    return None if train_schema(config) is TaskConfig else "on a corpus"


def _task_run(file: Path, tables: dict[str, Any]) -> TaskRun:
    config = parse_config(TaskConfig, tables["config"], f"{file}: config")
    try:
        latency = latency_of(tables)
        results = _Results.model_validate(tables | {"latency": _NOT_MEASURED if latency is None else latency})
    except ValidationError as error:
        raise UserError(f"{file}: damaged ({first_mistake(error)}); remove it and run the run again") from None
    leaves = flatten(config.model_dump(exclude_none=True), into_lists=True)
    settings = {key: value for key, value in leaves.items() if key not in IDENTITY_KEYS and value != []}
    if config.teacher is not None and config.student.path == config.teacher.path:
        settings["student.path"] = TEACHER_PATH
    return TaskRun(str(file.parent), config.data.task or str(config.data.dev), config, results, settings)
