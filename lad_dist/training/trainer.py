"""None"""

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
from lad_dist.core.outputs import ModelOutputs, OutputSpec
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
from lad_dist.training import engine as engines
from lad_dist.training import optimization, run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.metrics import MetricAccumulator
from lad_dist.training.teacher_cache import TeacherCache
from lad_dist.training.update_guard import UpdateAction, UpdateGuard

Row = dict[str, Any]
Report = Callable[[Row], None]
Clock = Callable[[str], contextlib.AbstractContextManager[Any]]
Taught = Callable[[Batch, OutputSpec], Any]


def silent(row: Row) -> None:
    """A report to nobody: the run folder has it all."""


def untimed(phase: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


@dataclass
class RunResult:
    """`results` is what results.json holds, None for a run that was stopped early."""

    folder: Path
    results: dict[str, Any] | None


@dataclass
class Trainer:
    made: run_spec.RunSpec
    run: Run
    engine: Any
    guard: UpdateGuard
    method: Distiller
    feed: Any
    teacher: FrozenModel | None
    teacher_feed: Any
    answers: TeacherCache | None
    steps: int
    report: Report
    clock: Clock
    watch: Watchdog
    seconds: float = 0.0  # of earlier stretches of this run
    tokens: int = 0  # of this stretch, this process
    began: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> TrainConfig:
        return self.made.config

    def run_to_end(self) -> RunResult | None:
        """None when the run has to go back to an earlier checkpoint, which is then the newest one."""
        with self.watch.paused():
            first = self._resume()
        self.run.begin(first)
        if first == 0 and self.method.found:
            self._report({"step": 0, **self.method.found})
        averages = MetricAccumulator()
        with contextlib.closing(self.batches(first)) as batches:
            for step in self._steps(first):
                self.step(step, next(batches), averages)
                fate = self._judge(step)
                if fate is UpdateAction.ROLL_BACK:
                    return None
                done = step + 1
                if done % self.config.run.log_every == 0 or done == self.steps:
                    self._report({"step": done, **averages.row(), **self._pace()})
                if done == self.steps:
                    break
                if _due(done, self.config.run.eval_every):
                    with self.watch.paused():
                        self._report({"step": done, **_prefixed("dev", self._evaluate())})
                if self._stops(done):
                    return RunResult(self.run.folder, None)
        self.saver.wait(self.steps)
        with self.watch.paused():
            return self._finish()

    def _steps(self, first: int) -> list[int]:
        left_out = set(self.guard.judge.left_out)
        return [step for step in range(first, self.steps) if step not in left_out]

    def _judge(self, step: int) -> UpdateAction:
        """What became of the update, told where it is not what was asked for. Raises Fault."""
        fate = self.guard.verdict(step)
        if fate is UpdateAction.PROCEED:
            return fate
        judge = self.guard.judge
        slots = range(self.feed.slots)
        row = {"step": step, "why": self.guard.why, "samples": [self.feed.samples(step, slot) for slot in slots]}
        self.run.skipped(row, judge.left_out)
        if fate is UpdateAction.GIVE_UP:
            raise Fault(f"{self.run.folder}: update after update was skipped up to step {step} ({self.guard.why})")
        if fate is UpdateAction.ROLL_BACK:
            self.saver.go_back(step, judge.back_to)
            self.run.go_back(judge.back_to)
        return fate

    def _stops(self, done: int) -> bool:
        """Saves when due. Whether the run was asked to end here: all processes agree. Raises Unsaved."""
        asked = processes.stop_requested() or self.run.asked_to_stop()
        asked, busy = processes.any_of_each(asked, self.saver.busy)
        if _due(done, self.config.run.check_every):
            self._check_agreement(done)
        self.watch.mark(done, "saving")
        self.saver.after(done, busy)
        if asked:
            self.saver.now(done)
            self.run.stopped()
        if self.saver.gave_up:
            raise SaveFailed(f"{self.run.folder}: stopped, as saving failed again and again ({self.saver.why})")
        return asked

    def _check_agreement(self, done: int) -> None:
        """Raises Fault where processes hold other weights than the rest."""
        if not _has_replicas(self.config):
            return
        wrong = divergent_ranks(self.method.parameters())
        if wrong:
            ranks = ", ".join(map(str, wrong))
            raise Fault(
                f"{self.run.folder}: after step {done} the weights of rank {ranks} are not those of the others: a "
                "device or its memory may be broken; the newest checkpoint is from before"
            )

    def step(self, step: int, batches: list[Batch], averages: MetricAccumulator) -> None:
        """One optimizer step over this process's micro-batches."""
        share = optimization.learning_rate_factor(step, self.steps, self.config.optim)
        optimization.set_learning_rate(self.engine.optimizer.param_groups, share)
        device = processes.device()
        self.engine.train()
        self.method.at(StepState(step, self.steps, self.config.run.seed))
        engines.reset_optimizer_state(self.engine, self.method.pruned())
        for index, batch in enumerate(batches):
            slot = processes.rank() + index * processes.world_size()
            self.watch.mark(step, "forward", index)
            processes.seed_everything(self.config.run.seed, step, slot)
            with self.clock("data"):
                batch = batch.to(device)
            with self.clock("teacher"):
                target = self._target(batch, step, slot)
            with self.clock("forward"):
                loss, terms = self.engine(batch, target)
            self.watch.mark(step, "backward", index)
            with self.clock("backward"):
                self.guard.backward(loss)  # once per micro-batch: a second one would lose gradients under ZeRO
            self.watch.mark(step, "update", index)
            with self.clock("optimizer"):
                self.engine.step()
            averages.add(batch, {"loss": loss.detach(), **terms})
            self.tokens += batch.tokens

    def _target(self, batch: Batch, step: int, slot: int) -> ModelOutputs | None:
        """What the teacher says of a micro-batch."""
        if self.answers is not None:
            return self.answers(self.teacher_feed.numbers(step, slot))
        if self.teacher is None:
            return None
        if self.teacher_feed is not self.feed:
            batch = self.teacher_feed.batch(step, slot).to(processes.device())
        return self.teacher(batch, self.method.objective.teacher_needs)

    def batches(self, first: int) -> Generator[list[Batch]]:
        """This process's slots of each step, made ahead of it."""
        mine = rank_share(self.feed.slots, processes.rank(), processes.world_size())
        loaded = load_batches(self.feed, self._steps(first), mine, self.config.data.workers)
        while True:
            with self.clock("data"):
                batches = next(loaded, None)
            if batches is None:
                return
            yield batches

    def _pace(self) -> dict[str, float]:
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
        if isinstance(self.feed, TaskDataset):
            dev = self.feed.dev
            predictions = {name: evaluate.predict(self._logits, dev[name].in_order()) for name in dev}
            return evaluate.task_scores(dev, predictions)
        return evaluate.mean_terms(self._terms, self.feed.held_out)

    def _logits(self, batch: Batch) -> Tensor:
        logits = compute_outputs(self.method.student, batch, evaluate.LOGITS).logits
        assert logits is not None
        return logits

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        target = self.teacher(batch, self.method.objective.teacher_needs) if self.teacher else None
        loss, terms = self.method(batch, target)
        return {"loss": loss, **terms}

    def _resume(self) -> int:
        """The step to begin with: 0, or where the newest valid checkpoint stands."""
        checkpoint = self.run.newest()
        if checkpoint is None:
            return 0
        facts = read_metadata(checkpoint)
        self._check_same_data(checkpoint, facts)
        reshard.load_checkpoint(self.engine, checkpoint, facts["layout"], self._layout())
        self.guard.judge.restore(facts["judge"])
        self.seconds = facts["seconds"]
        self.saver.start_at(facts["step"])
        return int(facts["step"])

    def _check_same_data(self, checkpoint: Path, facts: Mapping[str, Any]) -> None:
        if facts["data"] != self.feed.fingerprint:
            raise UserError(
                f"{checkpoint}: the data or the tokenizer changed since it was saved, so that it cannot go on where it "
                "was; bring them back, or choose another run.name"
            )

    @cached_property
    def saver(self) -> AsyncCheckpointer:
        every, alive = self.config.run.save_every, partial(self.watch.mark, phase="saving")
        return AsyncCheckpointer(self.run.checkpoints, every, self._snapshot, self._facts, alive)

    def _snapshot(self, step: int, folder: Path) -> Files:
        """Of weights that are alike: no checkpoint keeps what a broken device made. Raises Fault."""
        self._check_agreement(step)
        return engines.snapshot(self.engine, folder)

    def _facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds beside the engine. All that is random is a function of the seed and the step."""
        return {
            "step": step,
            "seconds": self._elapsed(),
            "layout": self._layout(),
            "data": self.feed.fingerprint,
            "judge": self.guard.judge.state(),
            "config": self.config.model_dump(mode="json", exclude_none=True),
        }

    def _layout(self) -> dict[str, int]:
        return {"processes": processes.world_size(), "zero": self.config.zero_stage}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def _tokens_per_second(self) -> float:
        """Real tokens of all processes by the wall clock, over this stretch."""
        tokens = torch.tensor(float(self.tokens), device=processes.device())
        return processes.means({"": tokens})[""] * processes.world_size() / (time.perf_counter() - self.began)

    def _finish(self) -> RunResult:
        trained, pace = self._elapsed(), self._tokens_per_second()
        found = self._compare()
        metrics = found["student"]
        self._report({"step": self.steps, **_prefixed("dev", metrics)})
        with engines.gathered_parameters(self.method, self.config.zero_stage):
            size = self._size(self.method.student)  # before its Parts are folded
            packed = compact.pack(self.method.student) if processes.is_main() else None
            student = self.method.export()
            results: dict[str, Any] = {
                "command": shlex.join(["python", *sys.argv]),
                "config": self.config.model_dump(mode="json", exclude_none=True),
                "metrics": metrics,
                "student": size | self.method.found,
                "teacher": {
                    **(self._size(self.teacher.model) if self.teacher else {}),
                    **found.get("teacher", {}),
                },
                "steps": self.steps,
                "seconds": trained,
                "tokens_per_second": pace,
                "processes": processes.world_size(),
                "device": processes.device_name(),
                "versions": {"torch": torch.__version__, "deepspeed": engines.VERSION},
            }
            if packed is not None:
                save_model(student, self.run.export)
                packed.save(self.run.export, self.config.student.path, self.made.layers)
                save_beside_model(self.made.tokenizer, self.run.export, uses_segments(student.config))
        results["student"] |= processes.on_main(lambda: footprint.table_on_disk(self.run.export))
        self.run.finish(results)
        return RunResult(self.run.folder, results)

    def _compare(self) -> dict[str, dict[str, float]]:
        self.engine.eval()
        if not isinstance(self.feed, TaskDataset):
            return {"student": evaluate.mean_terms(self._terms, self.feed.held_out)}
        teacher = partial(evaluate.logits_of, self.teacher) if self.teacher else None
        return evaluate.compare(self.feed.dev, self._logits, teacher, self.teacher_feed.dev)

    def _size(self, model: PreTrainedModel) -> dict[str, float]:
        return footprint.footprint(model, self.feed.batch(0, 0))


def _has_replicas(config: TrainConfig) -> bool:
    """Whether several processes hold the same weights."""
    return processes.world_size() > 1 and config.zero_stage < 3


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
