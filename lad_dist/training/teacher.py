"""What a student learns from: outputs of a teacher by (batch, step, micro-batch), from a cache or a frozen model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

TeacherOutputs = Callable[[Batch, int, int], ModelOutputs | None]


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
    own_dataset: CorpusDataset | TaskDataset | None = None  # where the teacher's tokens are not the student's

    def __call__(self, batch: Batch, step: int, micro_batch: int) -> ModelOutputs:
        if self.own_dataset is not None:
            batch = self.own_dataset.batch(step, micro_batch).to(processes.device())
        return self.teacher(batch, self.output_spec)


def build_teacher_outputs(
    spec: RunSpec,
    run: Run,
    *,
    teacher: FrozenModel | None,
    teacher_dataset: CorpusDataset | TaskDataset,
    output_spec: OutputSpec,
) -> TeacherOutputs:
    """Return what gives the tensors that the objective reads of the teacher, after computing those that a cache lacks.

    The run folder holds the cache where teacher.cache names no folder.
    """
    if teacher is None or spec.config.teacher is None:
        return no_teacher
    use_cache, size = decide_cache(spec, output_spec, teacher_dataset)
    if use_cache:
        assert isinstance(teacher_dataset, TaskDataset)
        cache = TeacherCache(
            folder=Path(spec.config.teacher.cache or run.teacher_cache),
            teacher=teacher,
            examples=teacher_dataset.train,
            output_spec=output_spec,
            size=size,
        )
        return CachedOutputs(cache, teacher_dataset)
    if size:
        logger.warning(
            "%s: the teacher runs at each step, as a cache would take %.1f GB, more than teacher.cache_gb allows",
            run.folder,
            size / 1e9,
        )
    return ComputedOutputs(teacher, output_spec, None if spec.shares_tokens else teacher_dataset)
