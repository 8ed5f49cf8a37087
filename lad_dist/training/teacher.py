"""What a student learns from: `teacher_outputs(batch, step, micro_batch)`, from a cache, a frozen teacher, or nothing.

build_teacher_outputs(...)   chooses one of them
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.data.datasets import CorpusDataset, TaskDataset
from lad_dist.distributed import processes
from lad_dist.distributed.logs import get_logger
from lad_dist.models.frozen import FrozenModel
from lad_dist.runs.run_folder import Run
from lad_dist.training.run_spec import RunSpec
from lad_dist.training.teacher_cache import TeacherCache, decide_cache

logger = get_logger(__name__)


class TeacherOutputs(Protocol):
    """The teacher's outputs for the batch of a micro-batch; None without a teacher."""

    def __call__(self, batch: Batch, step: int, micro_batch: int) -> ModelOutputs | None: ...


def no_teacher(batch: Batch, step: int, micro_batch: int) -> None:
    """Return None: the objective learns from labels alone."""


@dataclass
class CachedOutputs:
    """Reads the outputs from a cache, by the numbers of the examples."""

    cache: TeacherCache
    dataset: TaskDataset

    def __call__(self, batch: Batch, step: int, micro_batch: int) -> ModelOutputs:
        return self.cache(self.dataset.example_ids(step, micro_batch))


@dataclass
class ComputedOutputs:
    """Runs the teacher on the batch, or on the same examples in the teacher's own tokens."""

    teacher: FrozenModel
    output_spec: OutputSpec
    own_dataset: Any = None  # where the teacher's tokens are not the student's

    def __call__(self, batch: Batch, step: int, micro_batch: int) -> ModelOutputs:
        if self.own_dataset is not None:
            batch = self.own_dataset.batch(step, micro_batch).to(processes.device())
        return self.teacher(batch, self.output_spec)


def build_teacher_outputs(
    spec: RunSpec,
    run: Run,
    teacher: FrozenModel | None,
    *,
    dataset: CorpusDataset | TaskDataset,
    teacher_dataset: CorpusDataset | TaskDataset,
    output_spec: OutputSpec,
    steps: int,
) -> TeacherOutputs:
    """Return what gives the teacher's outputs, after computing those that a cache lacks.

    Args:
        spec: The resolved run.
        run: The run folder, which holds the cache where teacher.cache names no folder.
        teacher: The teacher.
        dataset: What the student reads.
        teacher_dataset: The same in the teacher's tokens.
        output_spec: The tensors that the objective reads.
        steps: The number of steps.
    """
    if teacher is None or spec.config.teacher is None:
        return no_teacher
    decision = decide_cache(spec, output_spec, teacher_dataset, steps)
    if decision.use:
        assert isinstance(teacher_dataset, TaskDataset)
        cache = TeacherCache(
            folder=Path(spec.config.teacher.cache or run.teacher_cache),
            teacher=teacher,
            teacher_identity=teacher.identity,
            examples=teacher_dataset.train,
            output_spec=output_spec,
            device=processes.device(),
            size=decision.size,
        )
        return CachedOutputs(cache, teacher_dataset)
    if decision.size:
        logger.warning(
            "%s: the teacher runs at each step, as a cache would take %.1f GB, more than teacher.cache_gb allows",
            run.folder,
            decision.size / 1e9,
        )
    return ComputedOutputs(teacher, output_spec, None if teacher_dataset is dataset else teacher_dataset)
