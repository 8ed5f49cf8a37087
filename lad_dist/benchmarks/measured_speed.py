"""The speed of this machine, as `lad-dist benchmark step` measures it and `lad-dist plan` reads it."""

from pathlib import Path

from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

from lad_dist.config.errors import UserError
from lad_dist.config.load import first_mistake
from lad_dist.utils.atomic_io import write_text

FILE = "benchmark.json"  # in the folder of the runs


class MeasuredSpeed(BaseModel):
    """What training steps reached.

    Attributes:
        device: name of the GPU, or "cpu".
        precision: The data type that the student computed in.
        processes: that trained together.
        flops_per_second: of all processes, over whole steps.
        peak_flops_per_second: of large matrix products, all processes together.
        tokens_per_second: of all processes, without padding.
        memory: bytes of one GPU, or of the machine.
        command: that measured it.
    """

    device: str
    precision: str
    processes: PositiveInt
    flops_per_second: PositiveFloat
    peak_flops_per_second: PositiveFloat
    tokens_per_second: PositiveFloat
    memory: PositiveInt
    command: str

    @property
    def flops_per_process(self) -> float:
        """FLOP/s of one process."""
        return self.flops_per_second / self.processes

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        write_text(file, self.model_dump_json(indent=2) + "\n")


def read_measured_speed(file: Path) -> MeasuredSpeed:
    """Return what a benchmark has written; raise UserError where the file is absent or damaged."""
    try:
        return MeasuredSpeed.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file}: no such file; `lad-dist benchmark step CONFIG` writes it") from None
    except ValidationError as error:
        raise UserError(
            f"{file}: damaged ({first_mistake(error)}); run `lad-dist benchmark step CONFIG` again"
        ) from None
