"""How a run goes on: from its newest checkpoint after a stop or a crash, from an earlier one after bad updates.

A checkpoint holds the state of the engine, and as metadata what else the run needs. All randomness is a function of the
seed and the step, so the step is all that there is of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.async_save import AsyncCheckpointer, Files, SaveFailed
from lad_dist.checkpointing.store import read_metadata
from lad_dist.config.errors import Fault, UserError
from lad_dist.core.step_state import StepState
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.replica_check import divergent_ranks
from lad_dist.runs.run_folder import Run
from lad_dist.training.best_model import BestModel
from lad_dist.training.engine import snapshot
from lad_dist.training.trainer import RunStatus, Trainer
from lad_dist.training.update_guard import UpdateAction


@dataclass(kw_only=True)
class Resumption:
    """Loads and saves the state of a training. The methods that take the number of steps done are hooks."""

    run: Run
    trainer: Trainer
    best: BestModel
    # Called with the number of steps before a save, and now and then while training waits for the disk.
    keep_alive: Callable[[int], None]
    earlier_seconds: float = 0.0  # of earlier sessions

    def resume(self) -> int:
        """Load the newest valid checkpoint, if any; return the step to begin with.

        Raises:
            UserError: The data or the tokenizer is not that of the checkpoint.
        """
        checkpoint = self.run.newest_checkpoint()
        if checkpoint is None:
            return 0
        metadata = read_metadata(checkpoint)
        if metadata["data"] != self.trainer.dataset.fingerprint:
            raise UserError(
                f"{checkpoint}: the data or the tokenizer changed since it was saved, and the run cannot continue; "
                "restore them, or choose another run.name"
            )
        self._load(checkpoint, metadata)
        if metadata.get("best") is not None:
            self.best.load_state_dict(metadata["best"])
        self.trainer.guard.policy.load_state_dict(metadata["skip_policy"])
        self.earlier_seconds = metadata["seconds"]
        self.checkpointer.start_at(metadata["step"])
        return int(metadata["step"])

    def _load(self, checkpoint: Path, metadata: dict[str, Any]) -> None:
        reshard.load_checkpoint(self.trainer.engine, checkpoint, metadata["layout"], self._layout)

    def choose(self, step: int, scores: Mapping[str, float]) -> RunStatus | None:
        """Save the student of an evaluation that is the best so far; end the training where patience has run out.

        Raises:
            SaveFailed: It cannot be saved.
        """
        trainer = self.trainer
        state = StepState(step - 1, trainer.steps, trainer.config.run.seed)
        if step < trainer.steps and not trainer.engine.module.is_final(state):
            return None
        if self.best.update(step, scores) and step < trainer.steps:
            self.checkpointer.save_and_wait(step)
            self._check_saves()
        return RunStatus.COMPLETED if self.best.ends_training else None

    def load_best(self) -> None:
        """Load the student to export, after the last step.

        Raises:
            NoValidCheckpoint: The checkpoint is damaged.
        """
        if self.best.step in (0, self.trainer.steps):
            return  # the engine holds it
        checkpoint = processes.on_main(partial(self.run.checkpoints.verified, self.best.step))
        self._load(checkpoint, read_metadata(checkpoint))

    def check_update(self, step: int) -> RunStatus | None:
        """Record a skipped update, and go back to an earlier checkpoint after too many in a row.

        Raises:
            Fault: Going back does not help.
        """
        guard, dataset, skipped = self.trainer.guard, self.trainer.dataset, step - 1
        action = guard.action(skipped)
        if action is UpdateAction.PROCEED:
            return None
        samples = [dataset.samples(skipped, index) for index in range(dataset.micro_batches_per_step)]
        self.run.record_skip({"step": skipped, "why": guard.reason, "samples": samples}, guard.policy.skipped_steps)
        if action is UpdateAction.GIVE_UP:
            raise Fault(f"{self.run.folder}: update after update was skipped up to step {skipped} ({guard.reason})")
        if action is UpdateAction.ROLL_BACK:
            self.checkpointer.go_back(skipped, guard.policy.rollback_step)
            self.run.go_back(guard.policy.rollback_step)
            return RunStatus.ROLLED_BACK
        return None

    def check_replicas(self, step: int) -> None:
        """Raise Fault where processes hold other weights than most."""
        if not _has_replicas(self._layout):
            return
        if divergent := divergent_ranks(self.trainer.engine.module.named_parameters()):
            ranks = ", ".join(map(str, divergent))
            raise Fault(
                f"{self.run.folder}: after step {step} the weights of rank {ranks} are not those of the others: a "
                "device or a memory may be broken; the newest checkpoint is from before this"
            )

    def save(self, step: int) -> RunStatus | None:
        """Save where due, or where the run was asked to stop. All processes stop after the same step.

        Raises:
            SaveFailed: The last saves failed, one after the other.
        """
        stop = processes.stop_requested() or self.run.stop_requested()
        stop, busy = processes.any_of_each(stop, self.checkpointer.busy)
        self.keep_alive(step)
        self.checkpointer.on_step_end(step, busy)
        if stop:
            self.checkpointer.save_and_wait(step)
            self.run.clear_stop_request()
        self._check_saves()
        return RunStatus.STOPPED if stop else None

    def _check_saves(self) -> None:
        if self.checkpointer.gave_up:
            raise SaveFailed(
                f"{self.run.folder}: stopped, as saving failed again and again ({self.checkpointer.reason})"
            )

    @cached_property
    def checkpointer(self) -> AsyncCheckpointer:
        return AsyncCheckpointer(
            checkpoints=self.run.checkpoints,
            every=self.trainer.config.run.save_every,
            snapshot=self._snapshot,
            metadata=self._metadata,
            keep_alive=self.keep_alive,
        )

    @property
    def seconds(self) -> float:
        """The seconds of all sessions."""
        return self.earlier_seconds + self.trainer.metrics.session.seconds

    def _snapshot(self, step: int, folder: Path) -> Files:
        """Copy the state; raise Fault where replicas differ, so that no checkpoint holds a broken device's weights."""
        self.check_replicas(step)
        return snapshot(self.trainer.engine, folder)

    def _metadata(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "seconds": self.seconds,
            "layout": self._layout,
            "data": self.trainer.dataset.fingerprint,
            "skip_policy": self.trainer.guard.policy.state_dict(),
            "best": self.best.state_dict() if self.best.step else None,
            "config": self.trainer.config.model_dump(mode="json", exclude_none=True),
        }

    @property
    def _layout(self) -> dict[str, int]:
        return {"processes": ranks.world_size(), "zero": self.trainer.config.zero_stage}


def _has_replicas(layout: reshard.Layout) -> bool:
    """Return whether several processes hold the same weights."""
    return layout["processes"] > 1 and layout["zero"] < 3
