"""Benchmark of a training step: real tokens per second, FLOP/s against the measured peak, and where the time goes.

The steps are those of the real Trainer, without evaluation or export. FLOPs are those of the linear maps, attention and
head over real tokens: one forward of the teacher, one of the student and twice that for its backward. The peak is the
best of several large matrix products on the same device, in the precision that trains, in the same run.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import torch

from lad_dist.benchmarks.measured_speed import MeasuredSpeed
from lad_dist.compression import footprint
from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Batch
from lad_dist.distributed import processes, ranks
from lad_dist.runs.run_folder import Run
from lad_dist.training.engine import check_precision, communication_seconds
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.teacher import ComputedOutputs
from lad_dist.training.train import build_trainer
from lad_dist.training.trainer import Trainer
from lad_dist.utils.text import command_line

WARM_UP = 3  # steps that are not counted


@dataclass
class Stopwatch:
    """Observes the phases of a training's steps: seconds by phase.

    It waits for the device at both ends of a phase, which costs some overlap.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, step: int, micro_batch: int) -> Iterator[None]:
        _wait()
        begin = time.perf_counter()
        yield
        _wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass
class StepFigures:
    """Figures of one step, all processes together.

    `phases` are seconds of the main process; `communication` happens within its backward and optimizer phases.
    """

    seconds: float
    tokens: float
    flops: float
    peak: float
    phases: dict[str, float]
    communication: float
    precision: str

    def measured_speed(self) -> MeasuredSpeed:
        """Return what `lad-dist plan` reads of the figures."""
        device = processes.device()
        on_gpu = device.type == "cuda"
        return MeasuredSpeed(
            device=processes.device_name(),
            precision=self.precision,
            processes=ranks.world_size(),
            flops_per_second=self.flops / self.seconds,
            peak_flops_per_second=self.peak,
            tokens_per_second=self.tokens / self.seconds,
            memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total,
            command=command_line(),
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Rows of a table for a person."""
        rate = self.flops / self.seconds
        phases = {**self.phases, "rest": self.seconds - sum(self.phases.values())}
        return [
            ("step", f"{self.seconds:.4f} s"),
            ("real tokens", f"{self.tokens / self.seconds:,.0f} /s"),
            ("arithmetic", f"{rate / 1e9:,.1f} GFLOP/s"),
            ("matrix-product peak", f"{self.peak / 1e9:,.1f} GFLOP/s"),
            ("share of peak", f"{rate / self.peak:.1%}"),
            *((name, f"{value:.4f} s  {value / self.seconds:.1%}") for name, value in phases.items()),
            ("communication (within)", f"{self.communication:.4f} s  {self.communication / self.seconds:.1%}"),
        ]


def measure(config: TrainConfig, steps: int = 10) -> StepFigures:
    """Time `steps` steps of the run that the config describes, after a warm-up."""
    deepspeed = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True}, **config.deepspeed}
    config = config.model_copy(update={"deepspeed": deepspeed})
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"dir": folder, "steps": WARM_UP + steps, "epochs": None})
        config = config.model_copy(update={"run": run})
        spec = resolve_run(config)
        check_precision(spec.precision)
        trainer = build_trainer(spec, Run(spec.config), stopwatch)
        seconds, communication = _time(trainer, stopwatch, steps)
    batches = [
        trainer.dataset.batch(step, index)
        for step in range(WARM_UP, WARM_UP + steps)
        for index in range(trainer.dataset.micro_batches_per_step)
    ]
    flops = _flops(trainer, batches)
    return StepFigures(
        seconds / steps,
        sum(batch.num_tokens for batch in batches) / steps,
        flops / steps,
        peak(trainer) * ranks.world_size(),
        {phase: total / steps for phase, total in stopwatch.seconds.items()},
        communication / steps,
        spec.precision,
    )


def _time(trainer: Trainer, stopwatch: Stopwatch, steps: int) -> tuple[float, float]:
    with contextlib.closing(trainer.micro_batches(0)) as micro_batches:
        for number in range(WARM_UP):
            trainer.train_step(number, next(micro_batches))
        stopwatch.seconds.clear()
        communication_seconds()
        processes.barrier()
        begin = time.perf_counter()
        for number in range(WARM_UP, WARM_UP + steps):
            trainer.train_step(number, next(micro_batches))
        processes.barrier()
        return time.perf_counter() - begin, communication_seconds()


def _flops(trainer: Trainer, batches: Sequence[Batch]) -> int:
    flops = 3 * sum(footprint.flops(trainer.engine.module.student, *batches).values())
    if isinstance(trainer.teacher_outputs, ComputedOutputs):
        flops += sum(footprint.flops(trainer.teacher_outputs.teacher.model, *batches).values())
    return flops


def peak(trainer: Trainer) -> float:
    """Return FLOP/s of a large matrix product on this process's device, in the student's precision: best of six."""
    device = processes.device()
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=trainer.engine.module.student.dtype) for _ in range(2))
    stopwatch = Stopwatch()
    for number in range(6):
        with stopwatch(str(number), step=0, micro_batch=0):
            a @ b
    return 2 * size**3 / min(stopwatch.seconds.values())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
