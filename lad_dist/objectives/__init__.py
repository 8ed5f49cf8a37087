"""What a student can be taught, by name. A new method is one file here and one line in OBJECTIVES."""

from lad_dist.objectives.kd import KD
from lad_dist.objectives.labels import MLM, Task
from lad_dist.objectives.lad import LAD
from lad_dist.objectives.minilm import MiniLM
from lad_dist.objectives.objective import Objective

__all__ = ["OBJECTIVES", "Objective"]

OBJECTIVES: dict[str, type[Objective]] = {"task": Task, "mlm": MLM, "kd": KD, "lad": LAD, "minilm": MiniLM}
