"""Registry of objectives: `objective.name` in a config -> class. A new method is one file and one line here."""

from lad_dist.objectives.alp import ALP
from lad_dist.objectives.base import Objective
from lad_dist.objectives.distilbert import DistilBERT
from lad_dist.objectives.emd import EMD
from lad_dist.objectives.kd import KD
from lad_dist.objectives.lad import LAD
from lad_dist.objectives.mgskd import MGSKD
from lad_dist.objectives.minilm import MiniLM
from lad_dist.objectives.minilm2 import MiniLM2
from lad_dist.objectives.pkd import PKD
from lad_dist.objectives.rkd import RKD
from lad_dist.objectives.supervised import MLM, Supervised
from lad_dist.objectives.tinybert import TinyBERT

OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "mlm": MLM,
    "kd": KD,
    "distilbert": DistilBERT,
    "pkd": PKD,
    "alp": ALP,
    "emd": EMD,
    "tinybert": TinyBERT,
    "mgskd": MGSKD,
    "rkd": RKD,
    "minilm": MiniLM,
    "minilm2": MiniLM2,
    "lad": LAD,
}
