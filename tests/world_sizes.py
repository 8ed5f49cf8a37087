"""Short runs under each ZeRO stage on one and on two processes, and what has to be the same of them."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sweep
from launching import curves

STAGES = (0, 1, 2, 3)
Layout = tuple[int, int]  # number of processes, ZeRO stage
REFERENCE: Layout = (1, 0)
Rows = list[dict[str, Any]]
Runs = dict[int, dict[str, dict[str, Any]]]  # tables by number of processes and name of the run
Curves = dict[int, dict[str, Rows]]


def layouts(stages: Iterable[int], covering: Iterable[int]) -> list[Layout]:
    """Return one and two processes under each stage with --sweep, else the reference and two under the covering ones.

    One process under other stages than 0 is covered by the tests of `train`.
    """
    if sweep.enabled:
        return [*itertools.product((1, 2), stages)]
    return [REFERENCE, *((2, stage) for stage in covering)]


def all_curves(folder: Path, runs: Runs) -> Curves:
    return {n: curves(folder / f"{n}", tables, processes=n) for n, tables in runs.items()}


def zero(stage: int) -> dict[str, Any]:
    """Return DeepSpeed's options; by default stage 3 would leave the few weights of a toy whole on every process."""
    return {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}


def short_run(tables: dict[str, Any], name: str, stage: int) -> dict[str, Any]:
    """Return the tables of a run of three steps of two micro-batches."""
    tables["run"] |= {"name": name, "steps": 3}
    tables["data"]["micro_batches_per_step"] = 2
    return tables | {"deepspeed": {"zero_optimization": zero(stage)}}


def assert_one_curve(curves: Curves, name: str, layouts: Iterable[Layout]) -> None:
    """Losses, and the metrics of the objective, are the same whatever the stage and the number of processes."""
    expected = terms(curves[1][f"{name}-zero0"])
    assert len(expected) == 3
    for processes, stage in layouts:
        rows = terms(curves[processes][f"{name}-zero{stage}"])
        for row, expected_row in zip(rows, expected, strict=True):
            assert row == pytest.approx(expected_row, rel=2e-4, abs=1e-6), (processes, stage)


def terms(rows: Rows) -> list[dict[str, float]]:
    """Return, of each step, the loss, the terms and the metrics of the objective."""
    other = ("lr", "dev", "tokens_per_second", "grad_norm")
    return [{key: x for key, x in row.items() if not key.startswith(other)} for row in rows if "loss" in row]
