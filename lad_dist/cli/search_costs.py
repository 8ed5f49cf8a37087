"""What a training or a search costs, for `lad-dist plan`."""

import argparse
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lad_dist.benchmarks.measured_speed import FILE, MeasuredSpeed, read_measured_speed
from lad_dist.config.errors import UserError
from lad_dist.config.load import dump_config
from lad_dist.config.schema import CorpusDataConfig, StudentConfig, TeacherConfig, TrainConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.data.shards.reader import Shards
from lad_dist.search.plan import SearchPlan
from lad_dist.search.record import TrialState
from lad_dist.search.trial import Trial
from lad_dist.search.trials import TrialBuilder, is_ready
from lad_dist.training import cost_model
from lad_dist.training.cost_model import DEVICES, CostEstimate
from lad_dist.utils.suggest import did_you_mean, nearest
from lad_dist.utils.text import byte_size, si_number

ASSUMED_MFU = 0.3


@dataclass(frozen=True)
class RunCost:
    """What a training costs.

    Attributes:
        config: of the training.
        costs: The estimate.
        speed: FLOP/s of a GPU, in which precision, and where the number is from.
        seconds: from start to end.
        gpu_hours: The same times the GPUs that it takes.
    """

    config: TrainConfig
    costs: CostEstimate
    speed: str
    seconds: float
    gpu_hours: float

    @property
    def num_checkpoints(self) -> int:
        """How many checkpoints stay."""
        return cost_model.num_checkpoints(self.config.run)

    @property
    def checkpoints(self) -> float:
        """Bytes of the checkpoints that stay and of one being written."""
        return float((self.num_checkpoints + 1) * self.costs.checkpoint)


@dataclass(frozen=True)
class Machine:
    """What a training runs on.

    Attributes:
        gpu: name of the GPUs or CPUs, one of DEVICES; of measured ones their own name.
        processes: of the training.
        nodes: that they are spread over.
        share: GPUs of each process.
        mfu: fraction of the peak that is reached; None where it is not set.
        measured: The speed that `lad-dist benchmark step` measured, in place of a data sheet.
    """

    gpu: str
    processes: int
    nodes: int = 1
    share: float = 1.0
    mfu: float | None = None
    measured: MeasuredSpeed | None = None

    @property
    def memory(self) -> int:
        """Bytes that a process has of a GPU."""
        memory = self.measured.memory if self.measured else DEVICES[self.gpu].memory
        return int(memory * min(1.0, self.share))

    def speed(self, precision: str) -> tuple[float, str]:
        """Return the FLOP/s that one GPU reaches in this precision, and where the number is from.

        Raises:
            UserError: The GPU has no such precision, or was measured in another.
        """
        if self.measured is not None:
            if self.measured.precision != precision:
                raise UserError(
                    f"the measured speed is of {self.measured.precision}, the run computes in {precision}; measure it: "
                    "lad-dist benchmark step CONFIG"
                )
            return self.measured.flops_per_process, "as measured by lad-dist benchmark step"
        device = DEVICES[self.gpu]
        if precision == "bfloat16" and not device.has_bf16:
            raise UserError(
                f"--gpu {self.gpu}: has no bf16; add deepspeed.bf16.enabled=false deepspeed.fp16.enabled=true"
            )
        origin = "as set" if self.mfu else "assumed: small micro-batches reach less, --mfu sets another"
        mfu = self.mfu or ASSUMED_MFU
        return device.peak(precision) * mfu, f"an MFU of {mfu:g}, {origin}"

    def estimate(self, config: TrainConfig) -> RunCost:
        """Return what a training costs; raise UserError where it does not fit.

        A step takes as long as its arithmetic, and no less than the optimizer takes to move its numbers.
        """
        spec, costs = cost_model.estimate_run(config, self.processes)
        speed, origin = self.speed(spec.precision)
        share = min(1.0, self.share)  # a process uses one GPU at most
        seconds = costs.flops / (speed * self.processes * share)
        if self.measured is None:
            bandwidth = DEVICES[self.gpu].bandwidth * share
            seconds = max(seconds, costs.steps * costs.memory.step_traffic / bandwidth)
        gpu_hours = seconds / 3600 * self.processes * self.share
        return RunCost(config, costs, f"{si_number(speed)}FLOP/s in {spec.precision}, {origin}", seconds, gpu_hours)

    def check_memory(self, costs: CostEstimate) -> None:
        """Raise UserError where a GPU cannot hold the training."""
        if costs.memory.total > self.memory:
            raise UserError(
                f"{self.gpu}: {byte_size(costs.memory.total)} do not fit into {byte_size(self.memory)}; make "
                "data.micro_batch_tokens or micro_batch_size smaller with more data.micro_batches_per_step, or raise "
                "the ZeRO stage"
            )


def find_machine(options: argparse.Namespace, runs: Path) -> Machine:
    """Return what the options of plan name, or this machine as it was measured in the folder of runs.

    Raises:
        UserError: The GPU is unknown, or this machine was not measured.
    """
    if options.gpu is not None:
        if options.gpu not in DEVICES:
            near = did_you_mean(options.gpu, DEVICES) if nearest(options.gpu, DEVICES) else "none is like it"
            raise UserError(f'--gpu "{options.gpu}" is unknown: {near} Known are {", ".join(DEVICES)}')
        return Machine(options.gpu, options.gpus, options.nodes, mfu=options.mfu)
    file = options.measured or runs / FILE
    if options.measured is None and not file.exists():
        raise UserError(
            "plan: name the GPU by --gpu (l4, cpu-avx2, …), or measure this machine: lad-dist benchmark step CONFIG"
        )
    measured = read_measured_speed(file)
    return Machine(measured.device, options.gpus, options.nodes, measured=measured)


@dataclass(frozen=True)
class PlannedTrial:
    """A trial of a search.

    Attributes:
        runs: The name of each stage's run; trials with the same name share the run.
        trial: The configs of the stages; in a space those of the base config.
    """

    runs: Mapping[str, str]
    trial: Trial


def wall_seconds(trials: Iterable[Sequence[str]], seconds: Mapping[str, float], at_once: int) -> float:
    """Return the seconds of trials, each a sequence of runs, `at_once` side by side; a run that is shared runs once."""
    free = [0.0] * at_once
    end_of: dict[str, float] = {}
    for runs in trials:
        now = heapq.heappop(free)
        for run in runs:
            end_of.setdefault(run, now + seconds[run])
            now = max(now, end_of[run])  # who shares a run waits for the end of it
        heapq.heappush(free, now)
    return max(free)


def trial_rounds(search: SearchPlan) -> tuple[list[list[PlannedTrial]], list[str]]:
    """Return the trials of a search, those with further seeds apart, and stages that the base config lacks."""
    if search.space is None:
        trials = [
            PlannedTrial({name: str(stage.run.folder) for name, stage in trial.stages.items()}, trial)
            for trial in search.trials
        ]
        return [trials], []
    base = search.build(TrialState("trial-000", {}))
    drawn, missing = stages_that_vary(search, base)
    options = search.config.search

    def planned(sample: int, seed: int) -> PlannedTrial:
        return PlannedTrial(
            {stage: f"{stage}-{sample if stage in drawn else 'shared'}-{seed}" for stage in base.stages}, base
        )

    samples = [planned(sample, 0) for sample in range(options.num_samples)]
    finalists = range(min(options.finalists, options.num_samples))
    repetitions = [planned(sample, seed) for sample in finalists for seed in range(1, options.num_seeds)]
    return [samples, *([repetitions] if repetitions else [])], missing


def stages_that_vary(search: SearchPlan, base: Trial) -> tuple[set[str], list[str]]:
    """Return the stages whose runs samples do not share, and those that the base config lacks."""
    builder = TrialBuilder(search.config)
    assert search.space is not None
    varying, missing = {list(base.stages)[-1]}, []
    for corner in search.space.corners():
        stages = builder.build(base.name, corner.choices, corner.changes.items()).stages
        missing += [stage for stage in stages if stage not in base.stages and stage not in missing]
        varying |= {
            stage
            for stage, config in base.stages.items()
            if stage not in stages or stages[stage].run.folder != config.run.folder
        }
    return varying, missing


class StageEstimator:
    """Estimates the trainings of trials; of those that differ in name, label and seed alone, one."""

    def __init__(self, config: SearchConfig, machine: Machine):
        self._folder = config.search.folder
        self._machine = machine
        self._runs: dict[str, RunCost | str] = {}

    def estimate(self, trial: Trial) -> dict[str, RunCost | str]:
        """Return by stage what it costs, or why that is not known."""
        result: dict[str, RunCost | str] = {}
        exports: dict[str, tuple[str, TrainConfig]] = {}
        for name, stage in trial.stages.items():
            if is_ready(stage, self._folder):
                result[name], resolved = self._estimate(stage), stage
            else:
                result[name], resolved = self._estimate_without_export(stage, exports)
            exports[str(stage.run.folder / "export")] = name, resolved
        return result

    def _estimate(self, config: TrainConfig, doubt: str | None = None) -> RunCost | str:
        """Return the costs of a training; with a doubt about the config, that and the mistake where there is one."""
        run = config.run.model_copy(update={"name": "", "dir": "", "label": None, "seed": 0})
        text = dump_config(config.model_copy(update={"run": run}))
        if text not in self._runs:
            try:
                self._runs[text] = self._machine.estimate(config)
            except UserError as error:
                if doubt is None:
                    raise
                self._runs[text] = f"{doubt} ({error})"
        return self._runs[text]

    def _estimate_without_export(
        self, stage: TrainConfig, exports: Mapping[str, tuple[str, TrainConfig]]
    ) -> tuple[RunCost | str, TrainConfig]:
        """Return what a stage costs that begins with what others export, and the config that stands for it."""
        paths = [stage.student.path, stage.teacher.path if stage.teacher else None]
        names = dict.fromkeys(exports[path][0] for path in paths if path is not None and path in exports)
        doubt = f"it begins with what {' and '.join(names)} exports"
        try:
            resolved = with_sources(stage, {path: source for path, (_, source) in exports.items()})
        except UserError as error:
            return f"{doubt} ({error})", stage
        return self._estimate(resolved, doubt), resolved


def with_sources(stage: TrainConfig, exports: Mapping[str, TrainConfig]) -> TrainConfig:
    """Return the config with models of the sizes that its stages export, in place of what they export.

    Raises:
        UserError: The size of what a stage exports is not that of a model that is there.
    """
    changes: dict[str, StudentConfig | TeacherConfig] = {}
    if stage.student.path is not None and stage.student.path in exports:
        changes["student"] = exported_student(exports[stage.student.path], stage.student)
    if stage.teacher is not None and stage.teacher.path in exports:
        source = exports[stage.teacher.path]
        teacher = source.student
        if teacher.path is None or teacher.num_hidden_layers or teacher.is_narrowed or source.compression:
            raise UserError("the teacher is a new or a smaller model")
        changes["teacher"] = stage.teacher.model_copy(update={"path": teacher.path})
    return stage.model_copy(update=changes)


def exported_student(source: TrainConfig, student: StudentConfig) -> StudentConfig:
    """Return a student as large as one that is cut from what another training exports."""
    if source.compression:
        raise UserError("compressions change what it exports")
    cut = student.model_dump(include={"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"})
    cut = {name: size for name, size in cut.items() if size is not None}
    if isinstance(student.layers, list):
        cut["num_hidden_layers"] = len(student.layers)
    if cut and source.student.path is None:
        raise UserError("it cuts a new model")
    if "num_hidden_layers" in cut:
        cut["layers"] = "even"
    values = student.model_dump(include={"dropout", "attention_dropout"})
    tokenizer = student.tokenizer or source.student.tokenizer
    if tokenizer is None and source.student.path is None and isinstance(source.data, CorpusDataConfig):
        tokenizer = str(Shards(source.data.shards).tokenizer_folder)
    return source.student.model_copy(update={**values, **cut, "tokenizer": tokenizer})
