"""train(config, report): the only way to train. Scripts, search trials and tests differ in `report` alone.

A step is `data.micro_batches_per_step` micro-batches, shared out over the processes. The content of a micro-batch, the
masks and the dropout are functions of (seed, step, micro-batch). So the number of processes changes who computes a
micro-batch and nothing else, and resuming needs one integer.
"""

import contextlib
import gc
from functools import partial

import torch

from lad_dist.config.errors import Fault
from lad_dist.config.schema import TrainConfig
from lad_dist.data.datasets import TaskDataset
from lad_dist.distributed import processes
from lad_dist.distributed.logs import get_logger
from lad_dist.distributed.watchdog import Watchdog
from lad_dist.runs.run_folder import Run
from lad_dist.training import engine, preflight
from lad_dist.training.best_model import BestModel, check_evaluations
from lad_dist.training.evaluation import CorpusEvaluation, Evaluation, TaskEvaluation
from lad_dist.training.metrics import MetricAccumulator
from lad_dist.training.reporting import Report, Reporter, silent
from lad_dist.training.results import RunResult, write_results
from lad_dist.training.resumption import Resumption
from lad_dist.training.run_spec import RunSpec, resolve_run
from lad_dist.training.teacher import build_teacher_outputs
from lad_dist.training.trainer import Hook, Phase, RunStatus, Trainer, unobserved
from lad_dist.training.update_guard import SkipPolicy, UpdateGuard

logger = get_logger(__name__)


def train(config: TrainConfig, report: Report = silent) -> RunResult:
    """Train, evaluate and export what the config describes.

    A partial run is resumed; the result of a complete run is returned as it is. `report` is called with every row of
    metrics, on every process.

    Raises:
        UserError: The config, the data or the machines do not allow the run; where possible before anything is
            written.
    """
    spec = resolve_run(config)
    run = Run(spec.config)
    if run.results is not None:
        return RunResult(run.folder, RunStatus.COMPLETED, run.results)
    engine.check_precision(spec.precision)
    processes.start()
    processes.catch_signals()
    with run.session(), Watchdog(run.folder / "stacks", spec.config.run.watchdog_timeout) as watchdog:
        results = processes.on_main(lambda: run.results)  # of an earlier session that this one waited for
        if results is not None:
            return RunResult(run.folder, RunStatus.COMPLETED, results)
        processes.on_main(run.checkpoints.cleanup)
        preflight.check(spec, run.folder)
        result = RunResult(run.folder, RunStatus.ROLLED_BACK)
        while result.status is RunStatus.ROLLED_BACK:
            gc.collect()  # the memory of the last attempt makes room for the next
            result = _train_from_checkpoint(spec, run, report, watchdog)
        return result


def _train_from_checkpoint(spec: RunSpec, run: Run, report: Report, watchdog: Watchdog) -> RunResult:
    """Train from the newest checkpoint to the end, to a stop, or until the run goes back to an earlier checkpoint."""
    with watchdog.paused():
        begins = processes.on_main(run.checkpoints.newest_name) is None
        trainer = build_trainer(spec, run, phase=partial(_mark, watchdog), check_teacher=begins)
        best = BestModel(spec.config.run.best_metric, spec.config.run.patience)
        resumption = Resumption(run=run, trainer=trainer, best=best, keep_alive=partial(watchdog.mark, phase="saving"))
        reporter = Reporter(run, report, trainer, watchdog, resumption.choose)
        first = resumption.resume()
        run.begin(first)
        reporter.start(first)
    hooks = (
        Hook(resumption.check_update, every=1, at_end=True),
        Hook(reporter.estimate, every=1),
        Hook(reporter.log, every=spec.config.run.log_every, at_end=True),
        Hook(reporter.evaluate, every=spec.config.run.eval_every),
        Hook(resumption.check_replicas, every=spec.config.run.replica_check_every),
        Hook(resumption.save, every=1),
        Hook(reporter.show_step, every=1),
    )
    trainer.metrics = MetricAccumulator()  # its clocks start with the steps, after the teacher's scores
    result = RunResult(run.folder, trainer.fit(first, hooks))
    if result.status is RunStatus.COMPLETED:
        last = best.last_step(trainer.steps)
        if run.skipped_updates() == last:
            raise Fault(f"{run.folder}: all {last} updates were skipped; skipped_steps.json says why")
        resumption.checkpointer.wait(last)
        with watchdog.paused():
            seconds, throughput = resumption.seconds, trainer.metrics.session.tokens_per_second()
            if best.metric is not None and last == trainer.steps:
                reporter.evaluate(last)
            resumption.load_best()
            scores, test_scores = trainer.evaluation.compare(), trainer.evaluation.compare_on_test()
            if best.metric is None:
                reporter.record_scores(last, scores["student"])
            result.results = write_results(
                trainer,
                spec,
                run,
                scores=scores,
                test_scores=test_scores,
                best=best,
                seconds=seconds,
                tokens_per_second=throughput,
            )
    engine.release(trainer.engine)
    return result


def _mark(watchdog: Watchdog, name: str, step: int, micro_batch: int) -> contextlib.AbstractContextManager[None]:
    watchdog.mark(step, name, micro_batch)
    return contextlib.nullcontext()


def build_trainer(spec: RunSpec, run: Run, phase: Phase = unobserved, *, check_teacher: bool = False) -> Trainer:
    """Build everything up to the first step: processes, data, teacher, student, engine.

    Raises:
        UserError: With `check_teacher`: the teacher is not worth learning from.
    """
    config = spec.config
    device = processes.start()
    if spec.precision == "bfloat16" and device.type == "cpu" and not _cpu_has_bf16():
        # It multiplies number by number, some forty times slower than fp32.
        logger.warning("this CPU has no bf16 arithmetic and is far faster with deepspeed.bf16.enabled=false")
    dataset, teacher = spec.dataset(), spec.teacher(device)
    distiller = spec.distiller(dataset).to(device)
    check_evaluations(config.run, distiller, spec.num_steps(dataset))
    teacher_dataset = spec.teacher_dataset(dataset)
    if isinstance(dataset, TaskDataset):
        assert isinstance(teacher_dataset, TaskDataset)
        evaluation: Evaluation = TaskEvaluation(
            distiller,
            teacher,
            dev=dataset.dev,
            teacher_dev=teacher_dataset.dev,
            test=dataset.test,
            teacher_test=teacher_dataset.test,
        )
    else:
        evaluation = CorpusEvaluation(distiller, teacher, dataset, teacher_has_head=spec.teacher_head == "mlm")
    if check_teacher and config.teacher is not None:
        evaluation.check_teacher(config.teacher.baseline_check)
    teacher_outputs = build_teacher_outputs(
        spec, run, teacher=teacher, teacher_dataset=teacher_dataset, output_spec=distiller.objective.teacher_spec
    )
    deepspeed_engine = engine.build_engine(distiller, config)
    policy = SkipPolicy(config.run.max_skips, config.run.spike_sigma, run.skipped_steps())
    return Trainer(
        config=config,
        steps=spec.num_steps(dataset),
        engine=deepspeed_engine,
        guard=UpdateGuard(deepspeed_engine, policy),
        dataset=dataset,
        teacher_outputs=teacher_outputs,
        evaluation=evaluation,
        phase=phase,
    )


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
