"""train(config, report): the only way to train. Scripts, search trials and tests differ in `report` alone.

A step is `data.micro_batches_per_step` micro-batches, shared out over the processes. The content of a micro-batch, the
masks and the dropout are functions of (seed, step, micro-batch). So the number of processes changes who computes a
micro-batch and nothing else, and resuming needs one integer.
"""

import gc
from pathlib import Path

import torch

from lad_dist.config.schema import TrainConfig
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.distributed import processes
from lad_dist.distributed.logs import get_logger
from lad_dist.distributed.watchdog import Watchdog
from lad_dist.models.frozen import FrozenModel
from lad_dist.runs.run_folder import Run
from lad_dist.training import engine, preflight, run_spec
from lad_dist.training.teacher_cache import TeacherCache, decide_cache
from lad_dist.training.trainer import Clock, Report, RunResult, Trainer, silent, untimed
from lad_dist.training.update_guard import SkipPolicy, UpdateGuard

logger = get_logger(__name__)


def train(config: TrainConfig, report: Report = silent, clock: Clock = untimed) -> RunResult:
    """Train, evaluate and export what the config describes.

    A partial run is resumed; the result of a complete run is returned as it is.

    Args:
        config: The config.
        report: Called with every row of metrics, on every process.
        clock: `clock(phase)` is entered around the phases of a step.

    Raises:
        UserError: The config, the data or the machines do not allow the run; where possible before anything is
            written.
    """
    spec = check(config)
    config = spec.config
    run = Run(config)
    if run.results is not None:
        return RunResult(run.folder, run.results)
    processes.start()
    processes.catch_signals()
    with run.session(), Watchdog(run.folder / "stacks", config.run.watchdog_timeout) as watchdog:
        results = processes.on_main(lambda: run.results)  # of an earlier session that this one waited for
        if results is not None:
            return RunResult(run.folder, results)
        processes.on_main(run.checkpoints.cleanup)
        preflight.check(spec, run.folder)
        while (result := _train_once(spec, run, report, clock, watchdog)) is None:
            gc.collect()  # the memory of the last attempt makes room for the next
        return result


def check(config: TrainConfig) -> run_spec.RunSpec:
    """Raise UserError for every mistake that can be known before anything is written; return the resolved run."""
    spec = run_spec.resolve_run(config)
    engine.check_deepspeed_config(config.deepspeed)
    return spec


def _train_once(spec: run_spec.RunSpec, run: Run, report: Report, clock: Clock, watchdog: Watchdog) -> RunResult | None:
    """Train to the end; return None where the run has to go back to an earlier checkpoint."""
    with watchdog.paused():
        trainer = prepare(spec, run, report, clock, watchdog)
    result = trainer.fit()
    engine.release(trainer.engine)
    return result


def prepare(
    spec: run_spec.RunSpec, run: Run, report: Report = silent, clock: Clock = untimed, watchdog: Watchdog | None = None
) -> Trainer:
    """Build everything up to the first step: processes, data, teacher, student, engine."""
    config = spec.config
    device = processes.start()
    _warn_of_slow_precision(spec, device)
    dataset = spec.dataset()
    teacher = spec.teacher(device)
    distiller = spec.distiller(dataset).to(device)
    steps = spec.num_steps(dataset)
    teacher_dataset = spec.teacher_dataset(dataset)
    cache = _teacher_cache(spec, run, teacher_dataset, teacher, distiller.objective.teacher_spec, steps)
    deepspeed_engine = engine.build_engine(distiller, config)
    policy = SkipPolicy(config.run.max_skips, config.run.spike_sigma, run.skipped_steps())
    return Trainer(
        spec=spec,
        run=run,
        engine=deepspeed_engine,
        guard=UpdateGuard(deepspeed_engine, policy),
        distiller=distiller,
        dataset=dataset,
        teacher=teacher,
        teacher_dataset=teacher_dataset,
        teacher_cache=cache,
        steps=steps,
        report=report,
        clock=clock,
        watchdog=watchdog or Watchdog(run.folder / "stacks"),
    )


def _warn_of_slow_precision(spec: run_spec.RunSpec, device: torch.device) -> None:
    """Warn where the CPU has no bf16 arithmetic: it multiplies number by number, some forty times slower than fp32."""
    if spec.precision == "bfloat16" and device.type == "cpu" and not _cpu_has_bf16():
        logger.warning("this CPU has no bf16 arithmetic and is far faster with deepspeed.bf16.enabled=false")


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _teacher_cache(
    spec: run_spec.RunSpec,
    run: Run,
    dataset: CorpusDataset | TaskDataset,
    teacher: FrozenModel | None,
    output_spec: OutputSpec,
    steps: int,
) -> TeacherCache | None:
    """Return the cache of the teacher's outputs, where the run uses one."""
    cache = decide_cache(spec, output_spec, dataset, steps)
    if not cache.use:
        if cache.size:
            logger.warning(
                "%s: the teacher runs at each step, as a cache would take %.1f GB, more than teacher.cache_gb allows",
                run.folder,
                cache.size / 1e9,
            )
        return None
    assert teacher is not None
    assert spec.config.teacher is not None
    assert isinstance(dataset, TaskDataset)
    folder = run.teacher_cache if spec.config.teacher.cache is None else Path(spec.config.teacher.cache)
    identity, device = teacher.identity, processes.device()
    return TeacherCache(folder, teacher, identity, dataset.train, output_spec, device, cache.size)
