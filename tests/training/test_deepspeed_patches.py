"""The patches of DeepSpeed: each of these tests fails where DeepSpeed is as it comes."""

import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from conftest import World
from launching import ROOT
from toy_runs import lad

from lad_dist.config.errors import UserError
from lad_dist.runs.run_folder import Run
from lad_dist.training import deepspeed_patches
from lad_dist.training.deepspeed_schema import CHECKED_SERIES, check_version
from lad_dist.training.engine import snapshot
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.train import build_trainer


@pytest.fixture(scope="module")
def engine(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = lad(world, tmp_path_factory.mktemp("patched"), {"deepspeed.zero_optimization.stage": 1})
    return build_trainer(resolve_run(config), Run(config)).engine


def test_shares_end_where_a_cpu_rounds_alike(engine: Any) -> None:
    assert any(
        sum(parameter.numel() for parameter in group) % deepspeed_patches.ALIGNMENT
        for group in engine.optimizer.bit16_groups
    )
    for share in engine.optimizer.single_partition_of_fp32_groups:
        assert share.numel() % deepspeed_patches.ALIGNMENT == 0


def test_the_norm_is_rounded_once_wherever_gradients_are_cut(engine: Any) -> None:
    """DeepSpeed rounds the sum of each share; a fourth of these norms would differ."""
    for seed in range(64):
        gradients = torch.randn(deepspeed_patches.CACHED_NUMBERS + 100, generator=torch.Generator().manual_seed(seed))
        pieces = list(gradients.tensor_split([1 + 1000 * seed]))
        norm = engine.optimizer.get_grad_norm_direct(pieces, pieces)
        assert norm.item() == gradients.double().norm().float().item()


def test_padding_counts_for_nothing(engine: Any) -> None:
    padding = torch.ones(3)
    padding._zero_padding = True  # type: ignore[attr-defined]
    assert engine.optimizer.get_grad_norm_direct([torch.ones(4), padding], []).item() == 2.0


@pytest.mark.usefixtures("engine")
def test_no_operation_is_compiled() -> None:
    assert deepspeed.ops.__compatible_ops__ == {}


def test_a_save_goes_to_host_memory_and_copies_no_script(engine: Any, tmp_path: Path) -> None:
    files = snapshot(engine, tmp_path)
    assert len(files) == 2  # the module's and the optimizer's
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_another_version_is_refused_in_one_line() -> None:
    check_version()
    check_version("0.19.0+abc")
    for version in ("0.18.9", "0.20.0", "0.190.1", "1.0"):
        with pytest.raises(UserError, match=f"deepspeed {re.escape(version)}: lad_dist works with 0.19; pip install"):
            check_version(version)


def test_the_installation_has_the_same_range() -> None:
    (pin,) = re.findall(r'"deepspeed(.*)"', (ROOT / "pyproject.toml").read_text().split("dependencies")[1])
    assert pin == f">={CHECKED_SERIES},<0.20"
