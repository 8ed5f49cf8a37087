"""The training loop: steps, evaluation, saving, resuming, and the export at the end.

It knows steps, an engine, batches and `report`; it knows no method, no task and no launcher.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.async_save import AsyncCheckpointer, Files, SaveFailed
from lad_dist.checkpointing.store import read_metadata
from lad_dist.compression import compact, footprint
from lad_dist.config.errors import Fault, UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelOutputs
from lad_dist.core.step_state import StepState
from lad_dist.data.datasets import TaskDataset
from lad_dist.data.loader import load_batches
from lad_dist.data.sampling import rank_share
from lad_dist.data.tokenization.loading import save_beside_model
from lad_dist.distributed import processes
from lad_dist.distributed.replica_check import divergent_ranks
from lad_dist.distributed.watchdog import Watchdog
from lad_dist.evaluation import evaluate
from lad_dist.models.dims import uses_segments
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import FrozenModel
from lad_dist.models.loading import PreTrainedModel, save_model
from lad_dist.runs.run_folder import Run
from lad_dist.training import optimization, run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.engine import VERSION as DEEPSPEED_VERSION
from lad_dist.training.engine import gathered_parameters, reset_optimizer_state, snapshot
from lad_dist.training.metrics import MetricAccumulator
from lad_dist.training.teacher_cache import TeacherCache
from lad_dist.training.update_guard import UpdateAction, UpdateGuard

Row = dict[str, Any]
Report = Callable[[Row], None]
Clock = Callable[[str], contextlib.AbstractContextManager[Any]]


def silent(row: Row) -> None:
    """Report nothing: the run folder has all rows."""


def untimed(phase: str) -> contextlib.AbstractContextManager[Any]:
    """Measure nothing."""
    return contextlib.nullcontext()


@dataclass
class RunResult:
    """The result of a run. `results` is the content of results.json, None for a run that was stopped early."""

    folder: Path
    results: dict[str, Any] | None


@dataclass
class Trainer:
    """The loop of one run."""

    spec: run_spec.RunSpec
    run: Run
    engine: Any
    guard: UpdateGuard
    distiller: Distiller
    dataset: Any
    teacher: FrozenModel | None
    teacher_dataset: Any
    teacher_cache: TeacherCache | None
    steps: int
    report: Report
    clock: Clock
    watchdog: Watchdog
    seconds: float = 0.0  # of earlier sessions of this run
    tokens: int = 0  # of this session and this process
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> TrainConfig:
        """The config of the run."""
        return self.spec.config

    def fit(self) -> RunResult | None:
        """Train to the end; return None where the run has to go back to an earlier checkpoint, now the newest one."""
        with self.watchdog.paused():
            first = self._resume()
        self.run.begin(first)
        if first == 0 and self.distiller.initial_values:
            self._report({"step": 0, **self.distiller.initial_values})
        averages = MetricAccumulator()
        with contextlib.closing(self.batches(first)) as batches:
            for step in self._steps(first):
                self.train_step(step, next(batches), averages)
                action = self._check_update(step)
                if action is UpdateAction.ROLL_BACK:
                    return None
                done = step + 1
                if done % self.config.run.log_every == 0 or done == self.steps:
                    self._report({"step": done, **averages.row(), **self._optimizer_metrics()})
                if done == self.steps:
                    break
                if _due(done, self.config.run.eval_every):
                    with self.watchdog.paused():
                        self._report({"step": done, **_prefixed("dev", self._evaluate())})
                if self._save_or_stop(done):
                    return RunResult(self.run.folder, None)
        self.checkpointer.wait(self.steps)
        with self.watchdog.paused():
            return self._finish()

    def _steps(self, first: int) -> list[int]:
        skipped = set(self.guard.policy.skipped_steps)
        return [step for step in range(first, self.steps) if step not in skipped]

    def _check_update(self, step: int) -> UpdateAction:
        """Return how the run continues, and record a skipped update. Raise Fault where the run gives up."""
        action = self.guard.action(step)
        if action is UpdateAction.PROCEED:
            return action
        policy = self.guard.policy
        samples = [self.dataset.samples(step, index) for index in range(self.dataset.micro_batches_per_step)]
        self.run.record_skip({"step": step, "why": self.guard.reason, "samples": samples}, policy.skipped_steps)
        if action is UpdateAction.GIVE_UP:
            raise Fault(f"{self.run.folder}: update after update was skipped up to step {step} ({self.guard.reason})")
        if action is UpdateAction.ROLL_BACK:
            self.checkpointer.go_back(step, policy.rollback_step)
            self.run.go_back(policy.rollback_step)
        return action

    def _save_or_stop(self, done: int) -> bool:
        """Save where due; return whether the run was asked to stop, the same on all processes. Raise SaveFailed."""
        stop = processes.stop_requested() or self.run.stop_requested()
        stop, busy = processes.any_of_each(stop, self.checkpointer.busy)
        if _due(done, self.config.run.replica_check_every):
            self._check_replicas(done)
        self.watchdog.mark(done, "saving")
        self.checkpointer.on_step_end(done, busy)
        if stop:
            self.checkpointer.save_and_wait(done)
            self.run.clear_stop_request()
        if self.checkpointer.gave_up:
            raise SaveFailed(
                f"{self.run.folder}: stopped, as saving failed again and again ({self.checkpointer.reason})"
            )
        return stop

    def _check_replicas(self, done: int) -> None:
        """Raise Fault where processes hold other weights than most."""
        if not _has_replicas(self.config):
            return
        divergent = divergent_ranks(self.distiller.parameters())
        if divergent:
            ranks = ", ".join(map(str, divergent))
            raise Fault(
                f"{self.run.folder}: after step {done} the weights of rank {ranks} are not those of the others: a "
                "device or a memory may be broken; the newest checkpoint is from before this"
            )

    def train_step(self, step: int, batches: list[Batch], averages: MetricAccumulator) -> None:
        """Make one optimizer step over this process's micro-batches."""
        lr_factor = optimization.learning_rate_factor(step, self.steps, self.config.optim)
        optimization.set_learning_rate(self.engine.optimizer.param_groups, lr_factor)
        device = processes.device()
        self.engine.train()
        self.distiller.on_step_start(StepState(step, self.steps, self.config.run.seed))
        reset_optimizer_state(self.engine, self.distiller.newly_pruned())
        for index, batch in enumerate(batches):
            micro_batch = processes.rank() + index * processes.world_size()
            self.watchdog.mark(step, "forward", index)
            processes.seed_everything(self.config.run.seed, step, micro_batch)
            with self.clock("data"):
                batch = batch.to(device)
            with self.clock("teacher"):
                target = self._teacher_outputs(batch, step, micro_batch)
            with self.clock("forward"):
                loss, terms = self.engine(batch, target)
            self.watchdog.mark(step, "backward", index)
            with self.clock("backward"):
                self.guard.backward(loss)  # once per micro-batch: a second one would lose gradients under ZeRO
            self.watchdog.mark(step, "update", index)
            with self.clock("optimizer"):
                self.engine.step()
            averages.add(batch, {"loss": loss.detach(), **terms})
            self.tokens += batch.num_tokens
        self.distiller.on_step_end()

    def _teacher_outputs(self, batch: Batch, step: int, micro_batch: int) -> ModelOutputs | None:
        """Return the teacher's outputs for a micro-batch, None without a teacher."""
        if self.teacher_cache is not None:
            return self.teacher_cache(self.teacher_dataset.example_ids(step, micro_batch))
        if self.teacher is None:
            return None
        if self.teacher_dataset is not self.dataset:
            batch = self.teacher_dataset.batch(step, micro_batch).to(processes.device())
        return self.teacher(batch, self.distiller.objective.teacher_spec)

    def batches(self, first: int) -> Generator[list[Batch]]:
        """Yield this process's micro-batches of each step, prepared ahead of it."""
        micro_batches = rank_share(self.dataset.micro_batches_per_step, processes.rank(), processes.world_size())
        loaded = load_batches(self.dataset, self._steps(first), micro_batches, self.config.data.num_workers)
        while True:
            with self.clock("data"):
                batches = next(loaded, None)
            if batches is None:
                return
            yield batches

    def _optimizer_metrics(self) -> dict[str, float]:
        rates = {group["name"]: group["lr"] for group in self.engine.optimizer.param_groups}
        norm = self.engine.get_global_grad_norm()
        return {f"lr/{name}": rate for name, rate in rates.items()} | (
            {} if norm is None else {"grad_norm": float(norm)}
        )

    def _report(self, row: Row) -> None:
        self.run.record(row)
        self.report(row | {"steps": self.steps})

    def _evaluate(self) -> dict[str, float]:
        self.engine.eval()
        if isinstance(self.dataset, TaskDataset):
            dev = self.dataset.dev
            predictions = {name: evaluate.predict(self._logits, dev[name].in_order()) for name in dev}
            return evaluate.task_scores(dev, predictions)
        return evaluate.mean_terms(self._terms, self.dataset.held_out)

    def _logits(self, batch: Batch) -> Tensor:
        logits = compute_outputs(self.distiller.student, batch, evaluate.LOGITS).logits
        assert logits is not None
        return logits

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        target = self.teacher(batch, self.distiller.objective.teacher_spec) if self.teacher else None
        loss, terms = self.distiller(batch, target)
        return {"loss": loss, **terms}

    def _resume(self) -> int:
        """Load the newest valid checkpoint, if any; return the step to begin with."""
        checkpoint = self.run.newest_checkpoint()
        if checkpoint is None:
            return 0
        metadata = read_metadata(checkpoint)
        self._check_same_data(checkpoint, metadata)
        reshard.load_checkpoint(self.engine, checkpoint, metadata["layout"], self._layout())
        self.guard.policy.load_state_dict(metadata["skip_policy"])
        self.seconds = metadata["seconds"]
        self.checkpointer.start_at(metadata["step"])
        return int(metadata["step"])

    def _check_same_data(self, checkpoint: Path, metadata: Mapping[str, Any]) -> None:
        if metadata["data"] != self.dataset.fingerprint:
            raise UserError(
                f"{checkpoint}: the data or the tokenizer changed since it was saved, and the run cannot continue; "
                "restore them, or choose another run.name"
            )

    @cached_property
    def checkpointer(self) -> AsyncCheckpointer:
        every, keep_alive = self.config.run.save_every, partial(self.watchdog.mark, phase="saving")
        return AsyncCheckpointer(self.run.checkpoints, every, self._snapshot, self._metadata, keep_alive)

    def _snapshot(self, step: int, folder: Path) -> Files:
        """Copy the state; raise Fault where replicas differ, so that no checkpoint holds a broken device's weights."""
        self._check_replicas(step)
        return snapshot(self.engine, folder)

    def _metadata(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint holds beside the engine. All randomness is a function of the seed and the step."""
        return {
            "step": step,
            "seconds": self._elapsed(),
            "layout": self._layout(),
            "data": self.dataset.fingerprint,
            "skip_policy": self.guard.policy.state_dict(),
            "config": self.config.model_dump(mode="json", exclude_none=True),
        }

    def _layout(self) -> dict[str, int]:
        return {"processes": processes.world_size(), "zero": self.config.zero_stage}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started_at

    def _tokens_per_second(self) -> float:
        """Return the tokens of all processes per second of this session, without padding."""
        tokens = torch.tensor(float(self.tokens), device=processes.device())
        return processes.means({"": tokens})[""] * processes.world_size() / (time.perf_counter() - self.started_at)

    def _finish(self) -> RunResult:
        seconds, tokens_per_second = self._elapsed(), self._tokens_per_second()
        scores = self._compare()
        metrics = scores["student"]
        self._report({"step": self.steps, **_prefixed("dev", metrics)})
        with gathered_parameters(self.distiller, self.config.zero_stage):
            size = self._size(self.distiller.student)  # before compressed modules are merged
            packed = compact.pack(self.distiller.student) if processes.is_main() else None
            student = self.distiller.export()
            results: dict[str, Any] = {
                "command": shlex.join(["python", *sys.argv]),
                "config": self.config.model_dump(mode="json", exclude_none=True),
                "metrics": metrics,
                "student": size | self.distiller.initial_values,
                "teacher": {
                    **(self._size(self.teacher.model) if self.teacher else {}),
                    **scores.get("teacher", {}),
                },
                "steps": self.steps,
                "seconds": seconds,
                "tokens_per_second": tokens_per_second,
                "processes": processes.world_size(),
                "device": processes.device_name(),
                "versions": {"torch": torch.__version__, "deepspeed": DEEPSPEED_VERSION},
            }
            if packed is not None:
                save_model(student, self.run.export)
                packed.save(self.run.export, self.config.student.path, self.spec.layers)
                save_beside_model(self.spec.tokenizer, self.run.export, uses_segments(student.config))
        results["student"] |= processes.on_main(lambda: footprint.bytes_table(self.run.export))
        self.run.finish(results)
        return RunResult(self.run.folder, results)

    def _compare(self) -> dict[str, dict[str, float]]:
        self.engine.eval()
        if not isinstance(self.dataset, TaskDataset):
            return {"student": evaluate.mean_terms(self._terms, self.dataset.held_out)}
        teacher = partial(evaluate.logits_of, self.teacher) if self.teacher else None
        return evaluate.compare(self.dataset.dev, self._logits, teacher, self.teacher_dataset.dev)

    def _size(self, model: PreTrainedModel) -> dict[str, float]:
        return footprint.footprint(model, self.dataset.batch(0, 0))


def _has_replicas(config: TrainConfig) -> bool:
    """Return whether several processes hold the same weights."""
    return processes.world_size() > 1 and config.zero_stage < 3


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
