"""The whole journey on text that every installation carries: no hub, no GPU, a few minutes on two cores.

usage: bash launch/quickstart.sh [stage.key=value …]      (makes an environment first)
       python launch/quickstart.py [stage.key=value …]    (in one that has lad_dist)

The documentation of Python and of installed libraries becomes a corpus and a labelled task: which library does a
passage document? A small BERT is pre-trained on the corpus (stage pretrain), fine-tuned for the task (teacher) and
distilled by LAD into a student of half the depth (lad); the same student is trained without a teacher (alone). The
configs are configs/quickstart/STAGE.toml. Everything goes to runs/quickstart; what is complete there is not run again.

example: python launch/quickstart.py lad.objective.hidden=10.0
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lad_dist import cli
from lad_dist.config import (
    EvaluateConfig,
    PrepareConfig,
    PretrainConfig,
    Schema,
    TaskConfig,
    TrainConfig,
    arguments,
    assignment,
    override,
    parse,
    pick,
    read,
)

CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
FOLDER = Path("runs/quickstart")
VOCABULARY = 4000


class Stage(NamedTuple):
    what: str
    schema: type[TrainConfig]
    called: str  # in the table


RUNS = {
    "pretrain": Stage("Pre-training a small BERT on them by masked language modelling", PretrainConfig, "pre-trained"),
    "teacher": Stage("Fine-tuning it for the task: the teacher", TaskConfig, "teacher"),
    "lad": Stage("Distilling the teacher into a student of half its depth by LAD", TaskConfig, "student by LAD"),
    "alone": Stage("Training the same student without a teacher, as long", TaskConfig, "student alone"),
}
# On two cores, to tell people what to expect.
TIMES = {"pretrain": "a minute", "teacher": "a minute and a half", "lad": "a minute and a half", "alone": "a minute"}
