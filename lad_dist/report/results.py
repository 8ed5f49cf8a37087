"""The results of the complete task runs below folders.

collect(folders)   returns LoadedRuns: the runs, and which folders were skipped and why
TaskRun            what a comparison reads of a run
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lad_dist.config.errors import UserError
from lad_dist.config.load import first_mistake, is_of_earlier_version, with_defaults
from lad_dist.config.schema import CHANGEABLE_KEYS, TEACHER_PATH, TaskConfig, default_label
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.tables import flatten
from lad_dist.utils.text import first_line

# Settings that identify a run and its task, and not its method.
IDENTITY_KEYS = {
    "run.name",
    "run.dir",
    "run.seed",
    "data.task",
    "data.dev",
    "data.kind",
} | CHANGEABLE_KEYS

LOYALTY = ("label_loyalty", "teacher_pearson")  # of decisions, of numbers


class _Lenient(BaseModel):
    """A table of results.json, as far as a report reads it."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _RunConfig(_Lenient):
    name: str
    dir: str
    seed: int
    label: str | None = None


class _DataConfig(_Lenient):
    task: str | None = None
    dev: str | None = None
    shards: str | None = None


class _NamedConfig(_Lenient):
    name: str


class _TeacherConfig(_Lenient):
    path: str


class _Config(_Lenient):
    run: _RunConfig
    data: _DataConfig
    objective: _NamedConfig
    compression: list[_NamedConfig] = []
    teacher: _TeacherConfig | None = None


class _Student(_Lenient):
    parameters: int
    forward_flops_per_token: float
    safetensors: float = Field(math.nan, alias="bytes/safetensors")
    compact: float = Field(math.nan, alias="bytes/compact")
    onnx: float = Field(math.nan, alias="bytes/onnx")
    int8: float = Field(math.nan, alias="bytes/onnx int8")

    @property
    def bytes(self) -> float:
        """Of the smaller form in fp32."""
        return self.safetensors if math.isnan(self.compact) else self.compact


class _Timing(_Lenient):
    form: str
    device: str
    batch: int
    length: int
    seconds: float


class _Quality(_Lenient):
    metrics: dict[str, float]


class _Sizes(_Lenient):
    safetensors: float = Field(math.nan, alias="bytes/safetensors")


class _Latency(_Lenient):
    threads: int
    devices: dict[str, str]
    timings: list[_Timing]
    quality: dict[str, _Quality] = {}
    teacher: _Sizes | None = None

    @property
    def _single_sequence(self) -> list[_Timing]:
        """Timings of one sequence on the CPU, of the shortest length."""
        single = [timing for timing in self.timings if timing.batch == 1 and timing.device == "cpu"]
        return [timing for timing in single if timing.length == min(other.length for other in single)]

    def milliseconds(self, form: str) -> float:
        """Return the milliseconds of one sequence; NaN where the form was not measured."""
        return next((1e3 * timing.seconds for timing in self._single_sequence if timing.form == form), math.nan)

    @property
    def conditions(self) -> str:
        """The conditions of the measurement, in words."""
        length = self._single_sequence[0].length if self._single_sequence else 0
        return f"{length} tokens, {self.devices.get('cpu', 'cpu')}, {self.threads} thread{'s' * (self.threads > 1)}"


class _Results(_Lenient):
    config: _Config
    metrics: dict[str, float] = Field(min_length=1)
    student: _Student
    teacher: dict[str, float]
    steps: int
    seconds: float
    tokens_per_second: float
    processes: int
    device: str
    latency: _Latency | None = None


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
        results: of the run.
        settings: all keys of the config that may tell methods apart, by dotted key.
    """

    folder: str
    task: str
    results: _Results
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """The method's name."""
        config = self.results.config
        return config.run.label or default_label(config.objective.name, [each.name for each in config.compression])

    @property
    def objective(self) -> str:
        """The objective's name."""
        return self.results.config.objective.name

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.results.config.run.seed

    @property
    def metric(self) -> str:
        """The main metric of the task."""
        return next(iter(self.results.metrics))

    @property
    def score(self) -> float:
        """The main metric's value."""
        return self.results.metrics[self.metric]

    @property
    def loyalty(self) -> float:
        """The loyalty to the teacher; NaN without one."""
        return next((self.results.metrics[name] for name in LOYALTY if name in self.results.metrics), math.nan)

    @property
    def teacher(self) -> str | None:
        """The teacher's path."""
        return self.results.config.teacher.path if self.results.config.teacher else None

    @property
    def forms(self) -> list[Form]:
        """The student as it was trained, and as `lad-dist latency` exported it."""
        student, latency = self.results.student, self.results.latency
        if latency is None:
            return [Form("student", self.score, math.nan, student.bytes)]
        forms = [Form("student", self.score, latency.milliseconds("student"), student.bytes)]
        for name, size in (("onnx", student.onnx), ("onnx int8", student.int8)):
            if name in latency.quality:
                score = latency.quality[name].metrics.get(self.metric, math.nan)
                forms.append(Form(name, score, latency.milliseconds(name), size))
        return forms

    @property
    def teacher_form(self) -> Form:
        """The teacher as it was measured beside the student."""
        latency, score = self.results.latency, self.results.teacher.get(self.metric, math.nan)
        if latency is None:
            return Form("teacher", score, math.nan, math.nan)
        size = latency.teacher.safetensors if latency.teacher else math.nan
        return Form("teacher", score, latency.milliseconds("teacher"), size)

    @property
    def export(self) -> str:
        """The path by which a config that goes on from this run names the export."""
        run = self.results.config.run
        return str(PurePath(run.dir, run.name, "export"))


@dataclass
class LoadedRuns:
    """The runs by folder, and the skipped folders by the reason for skipping them."""

    runs: list[TaskRun] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def collect(folders: Sequence[str | Path]) -> LoadedRuns:
    """Return the complete task runs below the folders, each once, whatever the order of the folders.

    Raises:
        UserError: a folder does not exist, a results.json is damaged, or there is no complete run.
    """
    loaded = LoadedRuns()
    for file in _files_below(folders, "results.json"):
        _load_run(file, loaded)
    for file in _files_below(folders, "config.toml"):
        if not (file.parent / "results.json").exists():
            loaded.skipped["not complete"].append(str(file.parent))
    _skip(loaded, "teachers of the others, with no teacher of their own", _are_teachers(loaded.runs))
    _skip(loaded, "the main metric is no number", [not math.isfinite(run.score) for run in loaded.runs])
    if not loaded.runs:
        paths = ", ".join(sorted({str(folder) for folder in folders}))
        reasons = "".join(f"; {reason}: {len(names)}" for reason, names in loaded.skipped.items())
        raise UserError(f"{paths}: no complete run on a task below{reasons}")
    return loaded


def _files_below(folders: Sequence[str | Path], name: str) -> list[Path]:
    """Return the files of this name, each by one path although folders may overlap."""
    paths: dict[Path, Path] = {}
    for folder in sorted({Path(folder) for folder in folders}, reverse=True):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        paths |= {path.resolve(): path for path in folder.rglob(name)}
    return sorted(paths.values())


def _load_run(file: Path, loaded: LoadedRuns) -> None:
    """Add a run to `loaded`."""
    tables = _read(file)
    # A search and the quickstart write a results.json of their own, without a config.
    if "config" not in tables:
        loaded.skipped["no run's results"].append(str(file.parent))
        return
    if isinstance(tables["config"], dict) and is_of_earlier_version(tables["config"]):
        loaded.skipped["of an earlier version of lad_dist"].append(str(file.parent))
        return
    try:
        results = _Results.model_validate(tables)
    except ValidationError as error:
        raise UserError(f"{file}: damaged ({first_mistake(error)}); remove it and run the run again") from None
    data = results.config.data
    task = data.task or data.dev
    if task is None:
        loaded.skipped["on a corpus"].append(str(file.parent))
        return
    leaves = flatten(with_defaults(TaskConfig, tables["config"]), into_lists=True)
    settings = {key: value for key, value in leaves.items() if key not in IDENTITY_KEYS and value != []}
    if results.config.teacher is not None and settings.get("student.path") == results.config.teacher.path:
        settings["student.path"] = TEACHER_PATH
    loaded.runs.append(TaskRun(str(file.parent), task, results, settings))


def _read(file: Path) -> dict[str, Any]:
    try:
        tables = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({first_line(error)}); remove it and run the run again") from None
    if not isinstance(tables, dict):
        raise UserError(f"{file}: damaged (not a JSON object); remove it and run the run again")
    return tables


def _are_teachers(runs: Sequence[TaskRun]) -> list[bool]:
    """Tell for each run whether it is a teacher of another run and has no teacher of its own."""
    teachers = {str(PurePath(run.teacher)) for run in runs if run.teacher is not None}
    return [run.teacher is None and run.export in teachers for run in runs]


def _skip(loaded: LoadedRuns, reason: str, is_skipped: Sequence[bool]) -> None:
    names = [run.folder for run, skip in zip(loaded.runs, is_skipped, strict=True) if skip]
    if names:
        loaded.skipped[reason] += names
        loaded.runs = [run for run, skip in zip(loaded.runs, is_skipped, strict=True) if not skip]
