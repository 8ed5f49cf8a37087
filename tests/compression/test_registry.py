"""Compressions of a config: their order, and the user's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from conftest import World

from lad_dist.compression.base import Compression
from lad_dist.compression.registry import COMPRESSIONS
from lad_dist.config.errors import UserError
from lad_dist.training import run_spec
from lad_dist.training.train import train

OWN = """
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from lad_dist.compression.base import NO_DATA, Compression


@dataclass(frozen=True, kw_only=True)
class ScaledHead(Compression):
    scale: Annotated[float, Field(gt=0)]
    bias: bool = True

    def apply(self, model, context=NO_DATA):
        model.classifier.weight.data *= self.scale
        if model.device.type != "meta":
            context.report({"scaled": float(self.scale)})
        return model


class NoDataclass(Compression):
    pass


@dataclass
class Positional(Compression):
    rank: int


@dataclass(frozen=True, kw_only=True)
class NoApply(Compression):
    pass


@dataclass(frozen=True, kw_only=True)
class Broken(ScaledHead):
    scale: float = 1.0

    def __post_init__(self):
        raise KeyError("x")
"""
LISTED: dict[str, dict[str, Any]] = {
    "heads": {"units": 0.5},
    "ladabert": {"embedding": 1.0, "svd": 2.0, "weight": 2.0},
    "low_rank": {"keep": 0.5},
    "prune": {"sparsity": 0.5},
    "quantize": {},
    "scale_position_embeddings": {"scale": 0.5},
    "theseus": {},
}
# What may follow what, by the compressions' own words; all else is refused.
MAY_FOLLOW = {
    "heads": {"scale_position_embeddings"},
    "ladabert": {"scale_position_embeddings"},
    "low_rank": {"low_rank", "scale_position_embeddings"},
    "prune": {"ladabert", "low_rank", "prune", "scale_position_embeddings"},
    "quantize": {"ladabert", "low_rank", "prune", "scale_position_embeddings"},
    "scale_position_embeddings": {"heads", "ladabert", "low_rank", "prune", "quantize", "scale_position_embeddings"},
    "theseus": {"heads", "ladabert", "low_rank", "prune", "quantize", "scale_position_embeddings"},
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package outside of lad_dist, in the working directory."""
    (tmp_path / "own_compressions.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def config_of(world: World, work: Path, *listed: dict[str, Any], **changes: Any) -> Any:
    tables = toy.task_config(work, world.files, world.teacher, world.teacher, compression=list(listed))
    return toy.parsed(tables, {"objective": {"name": "kd"}, **changes})


@pytest.mark.parametrize("name", MAY_FOLLOW)
@pytest.mark.parametrize("earlier", MAY_FOLLOW)
def test_each_says_what_it_may_follow(name: str, earlier: str, world: World, tmp_path: Path, no_weights: None) -> None:
    config = config_of(world, tmp_path, *({"name": each, **LISTED[each]} for each in (earlier, name)))
    if earlier in MAY_FOLLOW[name]:
        try:
            run_spec.resolve_run(config)
        except UserError as error:  # the second one finds nothing left to change
            assert "cannot follow" not in str(error)  # noqa: PT017
    else:
        with pytest.raises(
            UserError, match=f"compression {name}: cannot follow {earlier}, whose modules .*; list (it|one)"
        ):
            run_spec.resolve_run(config)


@pytest.mark.parametrize("name", MAY_FOLLOW)
def test_each_says_whether_zero_3_can_run_it(name: str, world: World, tmp_path: Path, no_weights: None) -> None:
    config = config_of(world, tmp_path, {"name": name, **LISTED[name]}, **{"deepspeed.zero_optimization.stage": 3})
    if COMPRESSIONS[name].supports_zero3:
        assert run_spec.resolve_run(config).compressions
    else:
        with pytest.raises(UserError, match=f"compression {name}: cannot run under ZeRO 3"):
            run_spec.resolve_run(config)


def test_one_of_the_user_compresses(package: None, world: World, tmp_path: Path) -> None:
    """Its arguments are checked and stored with their defaults, and what it reports is logged."""
    name = "own_compressions:ScaledHead"
    result = train(config_of(world, tmp_path, {"name": name, "scale": 0.5}, **{"run.steps": 1}))
    results = json.loads((result.folder / "results.json").read_text())
    assert results["config"]["compression"] == [{"name": name, "scale": 0.5, "bias": True}]
    assert results["student"]["scaled"] == 0.5
    with pytest.raises(UserError, match="ScaledHead: scale: input should be greater than 0"):
        run_spec.resolve_run(config_of(world, tmp_path, {"name": name, "scale": 0.0}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_compressions:NoDataclass", "no keyword-only dataclass; write @dataclass"),
        ("own_compressions:Positional", "no keyword-only dataclass; write @dataclass"),
        ("own_compressions:NoApply", "has no method apply"),
        ("own_compressions:Broken", "own_compressions:Broken: KeyError: 'x'; mend the class"),
        ("own_compressions:ScaledHeads", 'has no ScaledHeads; did you mean "ScaledHead"'),
        ("own_compressions:dataclass", "dataclass is no subclass of lad_dist.compression.base.Compression"),
        ("own_compression:ScaledHead", "no module own_compression, neither installed nor in"),
        ("prun", 'did you mean "prune"'),
    ],
)
def test_mistakes_in_a_name(name: str, message: str, package: None, world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_spec.resolve_run(config_of(world, tmp_path, {"name": name}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_advice_is_an_order_that_goes(world: World, tmp_path: Path, no_weights: None) -> None:
    listed = {name: {"name": name, **LISTED[name]} for name in ("prune", "low_rank", "heads")}
    with pytest.raises(UserError, match=r"low_rank: cannot follow prune, .*; list it before prune"):
        run_spec.resolve_run(config_of(world, tmp_path, listed["prune"], listed["low_rank"]))
    with pytest.raises(UserError, match=r"heads: cannot follow prune, .*; list one of them alone"):
        run_spec.resolve_run(config_of(world, tmp_path, listed["prune"], listed["heads"]))


def test_a_class_without_a_name_is_called_as_it_is() -> None:
    class Unnamed(Compression):
        """Nothing."""

    assert Unnamed.name == "Unnamed"
