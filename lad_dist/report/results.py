"""Finding: the complete task runs below folders.

collect(folders)   -> Found: the runs, and what was left out and why
TaskRun            what a comparison reads of a run
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lad_dist.config.errors import UserError
from lad_dist.config.load import with_defaults
from lad_dist.config.schema import TaskConfig
from lad_dist.runs.run_folder import CHANGEABLE_KEYS
from lad_dist.utils.strict_json import parse_json

# What says which run it is, and on which task, not by which method.
PLACE = {"run.name", "run.dir", "run.seed", "data.task", "data.dev", "data.kind", "objective.name"} | CHANGEABLE_KEYS

LOYALTY = ("label_loyalty", "teacher_pearson")  # of decisions, of numbers

Settings = dict[str, Hashable]


class _Lenient(BaseModel):
    """A part of results.json: what a report reads of it."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Place(_Lenient):
    name: str
    dir: str
    seed: int


class _Data(_Lenient):
    task: str | None = None
    dev: str | None = None
    shards: str | None = None


class _Name(_Lenient):
    name: str


class _Path(_Lenient):
    path: str


class _Config(_Lenient):
    run: _Place
    data: _Data
    objective: _Name
    teacher: _Path | None = None


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


class _Ledger(_Lenient):
    threads: int
    devices: dict[str, str]
    timings: list[_Timing]
    quality: dict[str, _Quality] = {}
    teacher: _Sizes | None = None

    @property
    def _single(self) -> list[_Timing]:
        """Of one sequence on the CPU, of the shortest length."""
        ones = [timing for timing in self.timings if timing.batch == 1 and timing.device == "cpu"]
        return [timing for timing in ones if timing.length == min(one.length for one in ones)]

    def latency(self, form: str) -> float:
        """Milliseconds of one sequence; NaN where it was not measured."""
        return next((1e3 * timing.seconds for timing in self._single if timing.form == form), math.nan)

    @property
    def conditions(self) -> str:
        length = self._single[0].length if self._single else 0
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
    ledger: _Ledger | None = None


class Form(NamedTuple):
    """A model as one may serve it: how good, how fast and how large; NaN for what was not measured."""

    name: str
    score: float
    latency: float  # milliseconds of one sequence
    bytes: float


@dataclass(frozen=True)
class TaskRun:
    """A complete run on a task. `task` is GLUE's name or the path of the file that it is scored on; `settings` are all
    keys of its config that may make a variant."""

    folder: str
    task: str
    results: _Results
    settings: Settings

    @property
    def name(self) -> str:
        return self.results.config.run.name

    @property
    def objective(self) -> str:
        return self.results.config.objective.name

    @property
    def seed(self) -> int:
        return self.results.config.run.seed

    @property
    def metric(self) -> str:
        return next(iter(self.results.metrics))

    @property
    def score(self) -> float:
        return self.results.metrics[self.metric]

    @property
    def loyalty(self) -> float:
        """To its teacher; NaN without one."""
        return next((self.results.metrics[name] for name in LOYALTY if name in self.results.metrics), math.nan)

    @property
    def teacher(self) -> str | None:
        return self.results.config.teacher.path if self.results.config.teacher else None

    @property
    def forms(self) -> list[Form]:
        """The student as it was trained, and as launch/ledger.py exported it."""
        student, ledger = self.results.student, self.results.ledger
        forms = [Form("student", self.score, math.nan, student.bytes)]
        if ledger is None:
            return forms
        forms = [forms[0]._replace(latency=ledger.latency("student"))]
        for name, size in (("onnx", student.onnx), ("onnx int8", student.int8)):
            if name in ledger.quality:
                score = ledger.quality[name].metrics.get(self.metric, math.nan)
                forms.append(Form(name, score, ledger.latency(name), size))
        return forms

    @property
    def teacher_form(self) -> Form:
        results = self.results
        ledger, score = results.ledger, results.teacher.get(self.metric, math.nan)
        if ledger is None:
            return Form("teacher", score, math.nan, math.nan)
        return Form(
            "teacher", score, ledger.latency("teacher"), ledger.teacher.safetensors if ledger.teacher else math.nan
        )

    @property
    def export(self) -> str:
        """Where a config that goes on from this run finds it."""
        place = self.results.config.run
        return str(PurePath(place.dir, place.name, "export"))


@dataclass
class LoadedRuns:
    """`runs` by folder; `left_out` are folders by the reason for leaving them out."""

    runs: list[TaskRun] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def collect(folders: Sequence[str | Path]) -> LoadedRuns:
    """The complete task runs below the folders, each once, whatever the order of the folders. Raises UserError."""
    found = LoadedRuns()
    for file in _below(folders, "results.json"):
        _take(file, found)
    for file in _below(folders, "config.toml"):
        if not (file.parent / "results.json").exists():
            found.left_out["not complete"].append(str(file.parent))
    _drop(found, "teachers of the others, with no teacher of their own", _is_their_teacher(found.runs))
    _drop(found, "the main metric is no number", [not math.isfinite(run.score) for run in found.runs])
    if not found.runs:
        where = ", ".join(sorted({str(folder) for folder in folders}))
        rest = "".join(f"; {reason}: {len(names)}" for reason, names in found.left_out.items())
        raise UserError(f"{where}: no complete run on a task below{rest}")
    return found


def _below(folders: Sequence[str | Path], name: str) -> list[Path]:
    """The files of this name, each by one path although folders may overlap."""
    paths: dict[Path, Path] = {}
    for folder in sorted({Path(folder) for folder in folders}, reverse=True):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        paths |= {path.resolve(): path for path in folder.rglob(name)}
    return sorted(paths.values())


def _take(file: Path, found: LoadedRuns) -> None:
    """A run into `found`. A search and the quickstart write a results.json of their own, without a config."""
    tables = _read(file)
    if "config" not in tables:
        found.left_out["no run's results"].append(str(file.parent))
        return
    try:
        results = _Results.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: damaged ({place}: {first['msg']}); remove it and run the run again") from None
    data = results.config.data
    task = data.task or data.dev
    if task is None:
        found.left_out["on a corpus"].append(str(file.parent))
        return
    settings = {key: value for key, value in _leaves(with_defaults(TaskConfig, tables["config"])) if key not in PLACE}
    found.runs.append(TaskRun(str(file.parent), task, results, settings))


def _read(file: Path) -> dict[str, Any]:
    try:
        tables = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: damaged ({reason}); remove it and run the run again") from None
    if not isinstance(tables, dict):
        raise UserError(f"{file}: damaged (not a JSON object); remove it and run the run again")
    return tables


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Hashable]]:
    """What stands in nested tables and lists of tables, by dotted keys; other lists as tuples."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}.{number}")
    elif value != []:
        yield prefix, tuple(map(str, value)) if isinstance(value, list) else value


def _is_their_teacher(runs: Sequence[TaskRun]) -> list[bool]:
    taught_by = {str(PurePath(run.teacher)) for run in runs if run.teacher is not None}
    return [run.teacher is None and run.export in taught_by for run in runs]


def _drop(found: LoadedRuns, reason: str, which: Sequence[bool]) -> None:
    names = [run.folder for run, drop in zip(found.runs, which, strict=True) if drop]
    if names:
        found.left_out[reason] += names
        found.runs = [run for run, drop in zip(found.runs, which, strict=True) if not drop]
