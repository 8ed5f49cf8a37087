"""The whole journey on text that every installation carries: no hub, no GPU, a few minutes on two cores.

usage: bash launch/quickstart.sh [stage.key=value …]      (makes an environment first)
       python launch/quickstart.py [stage.key=value …]    (in one that has lad_dist)

The documentation of Python and of installed libraries becomes a corpus and a labelled task: which library does a
passage document? A small BERT is pre-trained on the corpus (stage pretrain), fine-tuned for the task (teacher) and
distilled by LAD into a student of half the depth (lad); the same student is trained without a teacher (alone). Each
stage's config is configs/quickstart/STAGE.toml; what is complete in runs/quickstart is not run again.

example: bash launch/quickstart.sh lad.objective.hidden=10.0
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lad_dist import cli
from lad_dist.config import (
    EvaluateConfig,
    PrepareConfig,
    PretrainConfig,
    TaskConfig,
    TrainConfig,
    UserError,
    arguments,
    assignment,
    did_you_mean,
    load,
    override,
    parse,
    read,
)

CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
FOLDER = Path("runs/quickstart")
VOCABULARY = 4000
STAGES = {"text": "10 seconds", "pretrain": "a minute", "teacher": "a minute", "lad": "a minute", "alone": "half a minute"}
NAMES = {"pretrain": "pretrained", "teacher": "teacher", "lad": "student by LAD", "alone": "student alone"}

Changes = Mapping[str, list[tuple[str, Any]]]


def journey(folder: Path, changes: Changes, say: Callable[[str], None] = cli.say) -> dict[str, Any]:
    """All stages, each into its folder below `folder`, with a stage's changes to its config. Returns what results.json
    holds; None in place of it when stopped early."""
    say(f"1/6 Reading the documentation of this installation ({STAGES['text']}).")
    counts = prepare(folder, changes)
    say(
        f"    {counts['passages']:,} passages of {counts['modules']:,} modules to read; {counts['train']:,} labelled ones "
        f"to learn from and {counts['dev']:,} to test on, of other modules. {counts['libraries']} libraries, their names "
        f"hidden: guessing gives {1 / counts['libraries']:.2f}."
    )
