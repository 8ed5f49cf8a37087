"""Base class of compressions, and what a compression may use.

Compression          a student -> a smaller student, before it trains
CompressionContext   what `apply` may use beside the student
RunSettings          what `check` is given: the config, and the student's head and labels
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from lad_dist.config.schema import TrainConfig
from lad_dist.core.batch import Batch, Head
from lad_dist.models.loading import PreTrainedModel

ModuleKind = Literal["products", "masks", "gates", "blocks", "quantized"]


class RunSettings(Protocol):
    """What a compression is checked against. RunSpec is one."""

    @property
    def config(self) -> TrainConfig:
        """The config of the run."""
        ...

    @property
    def head(self) -> Head:
        """The head of the student."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The outputs of a task's head."""
        ...


def _no_batches() -> Sequence[Batch]:
    raise ValueError("no calibration batches: the model is compressed without training data")


@dataclass(frozen=True)
class CompressionContext:
    """What `Compression.apply` may use beside the student.

    Attributes:
        calibration_batches: Returns the first batches of the training data, the same on all processes. By default it
            raises ValueError.
        report: Puts measured values, by name, into the first row and the results of the run.
    """

    calibration_batches: Callable[[], Sequence[Batch]] = _no_batches
    report: Callable[[Mapping[str, float]], None] = lambda _: None


NO_DATA = CompressionContext()


class Compression:
    """Base class of compressions: a student -> a smaller student, before it trains.

    A subclass is a keyword-only dataclass. Its fields are the options of a config's `[[compression]]`, and their types
    are checked. What changes while the student trains is a CompressedModule that `apply` puts into it.

    Attributes:
        name: Name in configs and messages; by default the name of the class.
        inserts: Kinds of compressed modules that it puts into the student.
        may_follow: Kinds of compressed modules that the student may have when it is applied.
        supports_zero3: Whether it runs where ZeRO stage 3 shares out the weights.
    """

    name: ClassVar[str]
    inserts: ClassVar[frozenset[ModuleKind]] = frozenset()
    may_follow: ClassVar[frozenset[ModuleKind]] = frozenset()
    supports_zero3: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__)

    def check(self, spec: RunSettings) -> None:
        """Check the options against the rest of the config, before any weight is read.

        Raises:
            UserError: They do not go together.
        """

    def apply(self, model: PreTrainedModel, context: CompressionContext = NO_DATA) -> PreTrainedModel:
        """Compress a model.

        On the meta device a model has shapes and no numbers. There it reads no batches and reports nothing.

        Args:
            model: The student, which may be changed in place.
            context: What it may use beside the student.

        Returns:
            The compressed student.

        Raises:
            UserError: The compression does not fit the model.
        """
        raise NotImplementedError
