"""The training loop: `fit`, `train_step` and `evaluate`. It knows no method, no task and no launcher.

What else happens between steps (logging, evaluation, saving, checks) is a `Hook`. What happens within a step can be
observed by its phases: "data", "teacher", "forward", "backward", "optimizer".
"""

import contextlib
import enum
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Batch
from lad_dist.core.step_state import StepState
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.data.loader import load_batches
from lad_dist.data.sampling import rank_share
from lad_dist.data.step_counts import with_step_counts
from lad_dist.distributed import processes, ranks
from lad_dist.training import optimization
from lad_dist.training.engine import reset_optimizer_state
from lad_dist.training.evaluation import Evaluation
from lad_dist.training.metrics import MetricAccumulator
from lad_dist.training.teacher import TeacherOutputs
from lad_dist.training.update_guard import UpdateGuard

# phase(name, step, micro_batch) is entered around each phase of a step. It must not wait for the device.
Phase = Callable[[str, int, int], contextlib.AbstractContextManager[Any]]


class RunStatus(enum.Enum):
    """How a training ended."""

    COMPLETED = "completed"
    STOPPED = "stopped"  # early, and saved: the same command goes on
    ROLLED_BACK = "rolled back"  # it goes on from an earlier checkpoint, now the newest


class Hook(NamedTuple):
    """A function that runs between steps, with the number of steps done; a status that it returns ends the training."""

    function: Callable[[int], RunStatus | None]
    every: int  # steps; 0 is never
    at_end: bool = False  # whether it runs after the last step: always, or never

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether it runs once `step` of `steps` steps are done."""
        return self.at_end if step == steps else self.every > 0 and step % self.every == 0


def unobserved(name: str, step: int, micro_batch: int) -> contextlib.AbstractContextManager[Any]:
    """Observe nothing of a phase."""
    return contextlib.nullcontext()


@dataclass(kw_only=True)
class Trainer:
    """Trains the distiller that an engine holds."""

    config: TrainConfig
    steps: int
    engine: Any  # DeepSpeed's
    guard: UpdateGuard  # runs backward, so that a bad loss changes no weight
    dataset: CorpusDataset | TaskDataset
    teacher_outputs: TeacherOutputs
    evaluation: Evaluation
    phase: Phase = unobserved
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)  # since the last row of the log

    def fit(self, first: int, hooks: Iterable[Hook]) -> RunStatus:
        """Train from step `first` to the last one, or until a hook ends the training."""
        with contextlib.closing(self.micro_batches(first)) as micro_batches:
            for step in self._steps(first):
                self.train_step(step, next(micro_batches))
                for hook in hooks:
                    status = hook.function(step + 1) if hook.is_due(step + 1, self.steps) else None
                    if status is not None:
                        return status
        return RunStatus.COMPLETED

    def train_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Make one optimizer step over this process's micro-batches. All processes call it together."""
        self._start_step(step)
        for index, batch in enumerate(with_step_counts(batches)):
            micro_batch = ranks.rank() + index * ranks.world_size()
            processes.seed_everything(self.config.run.seed, step, micro_batch)
            with self.phase("teacher", step, index):
                target = self.teacher_outputs(batch, step, micro_batch)
            with self.phase("forward", step, index):
                loss, terms = self.engine(batch, target)
            with self.phase("backward", step, index):
                self.guard.backward(loss)  # once per micro-batch: a second one would lose gradients under ZeRO
            with self.phase("optimizer", step, index):
                self.engine.step()  # updates the weights after the last micro-batch
            self.metrics.add(batch, {"loss": loss.detach(), **terms})
        self.engine.module.on_step_end()

    def evaluate(self) -> dict[str, float]:
        """Return the student's scores on what it does not train on."""
        return self.evaluation.student_scores()

    def micro_batches(self, first: int) -> Generator[list[Batch]]:
        """Yield this process's micro-batches of each step from `first` on, on the device, prepared ahead of it."""
        share = rank_share(self.dataset.micro_batches_per_step, ranks.rank(), ranks.world_size())
        steps = self._steps(first)
        loaded = load_batches(self.dataset, steps, share, self.config.data.num_workers)
        for step in steps:
            with self.phase("data", step, 0):
                batches = [batch.to(processes.device()) for batch in next(loaded)]
            yield batches

    def _steps(self, first: int) -> list[int]:
        """Return the steps to make: those from `first` on that the run does not skip."""
        skipped = set(self.guard.policy.skipped_steps)
        return [step for step in range(first, self.steps) if step not in skipped]

    def _start_step(self, step: int) -> None:
        """Set what is a function of the step: the learning rate, the schedules of objective and compressions, masks."""
        lr_factor = optimization.learning_rate_factor(step, self.steps, self.config.optim)
        optimization.set_learning_rate(self.engine.optimizer.param_groups, lr_factor)
        self.engine.train()
        distiller = self.engine.module
        distiller.on_step_start(StepState(step, self.steps, self.config.run.seed))
        reset_optimizer_state(self.engine, distiller.newly_pruned())
