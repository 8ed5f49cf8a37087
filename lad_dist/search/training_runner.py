"""The trainings of a trial one after another, in the process that Tune starts for it, and what they report."""

import ctypes
import gc
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from ray.exceptions import RayError

from lad_dist.cluster.workers import Report, WorkerGroup, ignore
from lad_dist.config.errors import EXIT_USER_ERROR, Fault, UserError
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TrainConfig, train_schema
from lad_dist.config.search_schema import SearchOptions
from lad_dist.runs.run_folder import CRASHES, RunOccupied
from lad_dist.search.metrics import LATENCY, final_values, scores_of
from lad_dist.search.trial import Trial, TrialRunner
from lad_dist.utils.text import one_line

LATENCY_ROUNDS = 20


class TrainingRunner(TrialRunner):
    """Trains the stages of trials."""

    def run(self, trial: Trial, report: Report) -> None:
        os.chdir(self.folder)
        if not self.options.gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"  # Ray hides no GPU from a trial that uses none
        try:
            values, step = self._train_all(trial, report)
            outcome: dict[str, Any] = {"status": "completed", "values": values, "step": step}
            if not values.keys() & set(self.metrics):
                outcome = {"status": "failed", "error": f"{self.metrics[0]} is not a number in the end"}
        except RayError:
            raise
        except Exception as error:  # of whatever kind: other trials go on
            # Where the training has not begun, other trials would fail alike.
            is_mistake = isinstance(error, UserError) and error.code == EXIT_USER_ERROR and not _has_begun(trial)
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            outcome = {"status": "mistake" if is_mistake else "failed", "error": f"{name}{one_line(error)}"}
        finally:
            _free_memory()
        report(outcome)

    def _train_all(self, trial: Trial, report: Report) -> tuple[dict[str, float], int]:
        """Return the values and the number of steps of the last stage."""

        def report_scores(row: Mapping[str, Any]) -> None:
            scores = {name: value for name, value in scores_of(row, self.metrics).items() if math.isfinite(value)}
            if scores:
                report({"step": row["step"], "values": scores})

        group = self._workers() if self.options.processes > 1 else None
        try:
            for name, config in trial.stages.items():
                is_last = config is trial.config
                results = self._train(group, config, report_scores if is_last else ignore, shared=not is_last)
                if not is_last:
                    report({"stage": name})
        finally:
            if group is not None:
                group.close()
        latency = _latency(trial.config) if LATENCY in self.metrics else None
        return final_values(results, latency), results["steps"]

    def _workers(self) -> WorkerGroup:
        options, threads = self.options, str(max(1, int(self.options.cpus)))
        variables = {"OMP_NUM_THREADS": threads} | ({} if options.gpus else {"DS_ACCELERATOR": "cpu"})
        return WorkerGroup(options.processes, options.cpus, options.gpus, variables)

    def _train(self, group: WorkerGroup | None, config: TrainConfig, report: Report, *, shared: bool) -> dict[str, Any]:
        """Train in this process, or in the workers; return the content of results.json."""
        tables = config.model_dump(mode="json", exclude_none=True)
        if group is None:
            return train_stage(self.options, tables, shared, report=report)
        rows = group.run(train_stage, self.options, tables, shared)
        while True:
            try:
                report(next(rows))
            except StopIteration as end:
                return dict(end.value)


def train_stage(options: SearchOptions, tables: dict[str, Any], shared: bool, report: Report) -> dict[str, Any]:
    """Train one config in this process, or in this process and its peers; return the content of results.json."""
    from lad_dist.training.train import RunStatus, train  # noqa: PLC0415 (deepspeed: not in the driver)

    threads = max(1, int(options.cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the driver's may be that of a whole node
    torch.set_num_threads(threads)
    if 0 < options.gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(options.gpus)
    config = parse_config(train_schema(tables), tables, "trial")
    (config.run.folder / CRASHES).unlink(missing_ok=True)  # search.retries counts, and a lost machine is no crash
    while True:
        try:
            result = train(config, report=report)
            break
        except RunOccupied:
            if not shared:
                raise
    if result.status is RunStatus.STOPPED:
        raise Fault(f"{config.run.name} was asked to stop: the last evaluation of a stopped trial is no result")
    assert result.results is not None
    return result.results


def _has_begun(trial: Trial) -> bool:
    return any((config.run.folder / "metrics.jsonl").exists() for config in trial.stages.values())


def _latency(config: TrainConfig) -> float:
    """Return the seconds of one short sequence on the CPU, without the teacher."""
    from lad_dist.evaluation.latency import single_sequence_seconds  # noqa: PLC0415

    return single_sequence_seconds(config.run.folder / "export", LATENCY_ROUNDS)


def _free_memory() -> None:
    """Return the memory of a trial to the system.

    The C library keeps for its process what is freed, and the next trial, in a thread of its own, takes other memory.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
