"""A misspelt name is answered with the right one, or with the list of names."""

import pytest

from lad_dist.models.families import FAMILIES
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.utils.suggest import MAX_LISTED, did_you_mean

RUN = ("name", "dir", "seed", "steps", "epochs", "log_every", "eval_every", "save_every", "max_skips")


@pytest.mark.parametrize(
    ("name", "names", "right"),
    [
        ("ladd", OBJECTIVES, "lad"),
        ("mgksd", OBJECTIVES, "mgskd"),
        ("robreta", FAMILIES, "roberta"),
        ("distillbert", FAMILIES, "distilbert"),
        ("rl", ("lr", "weight_decay", "warmup"), "lr"),
        ("sed", RUN, "seed"),
        ("step", RUN, "steps"),
        ("evla_every", RUN, "eval_every"),
        ("max_skip", RUN, "max_skips"),
    ],
)
def test_a_misspelt_name(name: str, names: tuple[str, ...], right: str) -> None:
    assert did_you_mean(name, names) == f'did you mean "{right}"?'


def test_a_name_that_is_like_none() -> None:
    assert did_you_mean("xyz", ["b", "a", "b"]) == "choose from a, b"
    assert did_you_mean("xyz", []) == "the list of choices is empty"
    hint = did_you_mean("xyz", [f"label_{number}" for number in range(100)])
    assert hint.startswith("choose from label_0, label_1, ")
    assert hint.endswith(" more")
    assert len(hint) < MAX_LISTED + 40
