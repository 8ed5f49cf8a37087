"""train(config, report): the only loop. Scripts, search trials and tests all call it; they differ in `report` alone.

It knows steps, an engine, batches and `report`; it knows no method, no task and no launcher.

A step is `data.micro_batches_per_step` micro-batches, shared out over the processes. What is in a slot, its masks and its dropout are
functions of (seed, step, slot), so the number of processes changes who computes a slot and nothing else, and resuming
needs one integer.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch

from lad_dist.config.schema import TrainConfig
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.datasets import TaskDataset
from lad_dist.distributed import processes
from lad_dist.distributed.watchdog import Watchdog
from lad_dist.models.frozen import FrozenModel
from lad_dist.runs.run_folder import Run
from lad_dist.training import engine as engines
from lad_dist.training import preflight, run_spec
from lad_dist.training.teacher_cache import TeacherCache, cache_bytes, worth_caching
from lad_dist.training.trainer import Clock, Report, RunResult, Trainer, silent, untimed
from lad_dist.training.update_guard import SkipPolicy, UpdateGuard


def train(config: TrainConfig, report: Report = silent, clock: Clock = untimed) -> RunResult:
    """Trains, evaluates and exports what the config describes, resuming a partial run; a complete one is returned as
    it is. `report` gets every row on every process; `clock(phase)` is entered around the phases of a step. Raises
    UserError before anything is taken where that is possible."""
    config = run_spec.resolve_options(config)
    run = Run(config)
    if run.results is not None:
        return RunResult(run.folder, run.results)
    made = check(config)
    processes.start()
    processes.catch_signals()
    with run.session(), Watchdog(run.folder / "stacks", config.run.watchdog_timeout) as watch:
        ended = processes.on_main(lambda: run.results)  # by a life that was waited for
        if ended is not None:
            return RunResult(run.folder, ended)
        processes.on_main(run.checkpoints.cleanup)
        preflight.check(made, run.folder)
        while (outcome := _attempt(made, run, report, clock, watch)) is None:
            gc.collect()  # what it trained makes room for the next
        return outcome


def check(config: TrainConfig) -> run_spec.RunSpec:
    """All that can be known to be wrong before anything is taken. Raises UserError."""
    made = run_spec.resolve_run(config)
    engines.check_deepspeed_config(config.deepspeed)
    return made


def _attempt(made: run_spec.RunSpec, run: Run, report: Report, clock: Clock, watch: Watchdog) -> RunResult | None:
    """None when the run has to go back to an earlier checkpoint."""
    with watch.paused():
        loop = prepare(made, run, report, clock, watch)
    outcome = loop.fit()
    engines.release(loop.engine)
    return outcome


def prepare(
    made: run_spec.RunSpec, run: Run, report: Report = silent, clock: Clock = untimed, watch: Watchdog | None = None
) -> "Trainer":
    """Everything up to the first step: processes, data, teacher, student, engine."""
    config = made.config
    device = processes.start()
    _warn_of_slow_precision(made, device)
    feed = made.dataset()
    teacher = made.teacher(device)
    method = made.distiller(feed).to(device)
    steps = config.run.steps or max(1, round((config.run.epochs or 0) * feed.steps_per_epoch))
    teacher_feed = made.teacher_dataset(feed)
    answers = _answers(made, run, teacher_feed, teacher, method.objective.teacher_outputs, steps)
    engine = engines.build_engine(method, config)
    guard = UpdateGuard(engine, SkipPolicy(config.run.max_skips, config.run.spike_sigma, run.skipped_steps()))
    watch = watch or Watchdog(run.folder / "stacks")
    return Trainer(made, run, engine, guard, method, feed, teacher, teacher_feed, answers, steps, report, clock, watch)


def _warn_of_slow_precision(made: run_spec.RunSpec, device: torch.device) -> None:
    """A CPU that multiplies no bf16 does so number by number, some forty times as slowly as in fp32."""
    half = made.precision == "bfloat16"
    if half and device.type == "cpu" and processes.is_main() and not _cpu_has_bf16():
        print("this CPU has no bf16 arithmetic and is far faster with deepspeed.bf16.enabled=false", file=sys.stderr)


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _answers(
    made: run_spec.RunSpec, run: Run, feed: Any, teacher: FrozenModel | None, needs: OutputSpec, steps: int
) -> TeacherCache | None:
    """The teacher's, where they are worth keeping."""
    words = made.config.teacher
    if words is None or teacher is None or not isinstance(feed, TaskDataset):
        return None
    assert made.teacher_dims is not None
    if not worth_caching(words, steps, feed.steps_per_epoch):
        return None
    size = cache_bytes(needs, made.teacher_dims, feed.train, teacher.model.dtype)
    if size > words.cache_gb * 1e9:
        if processes.is_main():
            print(f"{run.folder}: the teacher is asked anew at each step; {_too_large(size)}", file=sys.stderr)
        return None
    folder = run.teacher_cache if words.cache is None else Path(words.cache)
    return TeacherCache(folder, teacher, teacher.identity, feed.train, needs, processes.device(), size)


def _too_large(size: int) -> str:
    return f"its answers would take {size / 1e9:.1f} GB, more than teacher.cache_gb allows"
