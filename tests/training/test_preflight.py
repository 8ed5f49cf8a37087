"""Preflight: what is wrong with one machine is named and ends all processes alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from conftest import World
from launching import run_ranks

from lad_dist.config.errors import Fault, UserError
from lad_dist.distributed import processes, ranks
from lad_dist.models.dims import count_parameters
from lad_dist.training import cost_model, preflight, run_spec
from lad_dist.training.preflight import Device, DeviceFault, check_devices

H200, A100 = "NVIDIA H200", "NVIDIA A100"


def test_devices_that_are_alike_are_fit() -> None:
    check_devices([Device("n1", H200, 2), Device("n1", H200, 2), Device("n2", H200, 2)])
    check_devices([Device("n1", "no GPU", 0)] * 3)


@pytest.mark.parametrize(
    ("devices", "code", "message"),
    [
        (
            [("n1", H200, 2), ("n1", H200, 2), ("n2", A100, 2)],
            75,
            "process 2 on n2 has NVIDIA A100, most processes have",
        ),
        ([("n1", H200, 1), ("n2", "no GPU", 0), ("n3", H200, 1)], 75, "process 1 on n2 has no GPU"),
        ([("n1", H200, 2)] * 2 + [("n2", H200, 1)] * 2, 2, "process 2 on n2: 2 processes of this host see 1 GPUs"),
    ],
)
def test_devices_that_are_not(devices: list[tuple[str, str, int]], code: int, message: str) -> None:
    with pytest.raises((UserError, DeviceFault)) as caught:
        check_devices([Device(*device) for device in devices])
    assert caught.value.code == code
    assert message in str(caught.value)


def write_ends(out: Path, cases: list[str]) -> None:
    """How the check of the collectives and a preflight end on each rank, by case."""
    processes.start()
    all_reduce = dist.all_reduce

    def wrong(x: torch.Tensor, **options: Any) -> Any:
        x[7] += 1
        return all_reduce(x, **options)

    def outcome(case: str) -> tuple[str, int]:
        def work() -> None:
            if case == "all" or (case == "one" and ranks.rank() == 1):
                raise UserError(f"no {case}")

        dist.all_reduce = wrong if case == "sum" and ranks.rank() == 1 else all_reduce
        try:
            preflight._check_all_reduce()
            preflight.run_on_all(work)
        except (UserError, Fault) as error:
            return str(error), error.code
        finally:
            dist.all_reduce = all_reduce
        return "", 0

    results = {case: processes.all_gather(outcome(case)) for case in cases}
    if ranks.is_main():
        out.write_text(json.dumps(results))


ENDS = {
    "none": (0, ""),
    "one": (75, "process 1 on "),
    "all": (2, "no all"),
    "sum": (75, "2 processes gave a wrong sum"),
}


@pytest.mark.processes
def test_all_processes_end_alike(tmp_path: Path) -> None:
    run_ranks(write_ends, tmp_path / "results.json", [*ENDS], folder=tmp_path, processes=2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(ENDS)
    for case, (code, message) in ENDS.items():
        assert [result[1] for result in results[case]] == [code, code], case
        assert all(message in result[0] for result in results[case]), case


def corpus_spec(world: World, work: Path, changes: dict[str, Any]) -> run_spec.RunSpec:
    tables = toy.corpus_config(work, world.corpus, world.pretrained, world.pretrained)
    return run_spec.resolve_run(toy.parsed(tables, changes))


def test_a_corpus_that_lost_a_file_is_refused(world: World, tmp_path: Path) -> None:
    shards = tmp_path / "corpus"
    shutil.copytree(world.corpus, shards)
    spec = corpus_spec(world, tmp_path, {"data.shards": str(shards)})
    preflight.check(spec, tmp_path / "run")
    missing = next(shards.rglob("held_out-*.bin"))
    missing.unlink()
    with pytest.raises(UserError, match=missing.name) as caught:
        preflight.check(spec, tmp_path / "run")
    assert not isinstance(caught.value, DeviceFault)


def test_a_disk_without_room_for_the_checkpoints(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = corpus_spec(world, tmp_path, {"run.save_every": 1, "run.keep": 3})
    distiller = spec.distiller(spec.dataset())
    needed = 4 * cost_model.checkpoint_bytes(spec, distiller) + 4 * count_parameters(distiller.student)
    usage = shutil.disk_usage(tmp_path)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    free(needed)
    preflight.check(spec, tmp_path / "run")
    free(needed - 1)
    with pytest.raises(UserError, match=r"4 checkpoints of .* make room, or set"):
        preflight.check(spec, tmp_path / "run")
    for name in ("step-000000001", "step-000000002", "step-000000003.draft"):  # two of them are on the disk already
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    preflight.check(spec, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*/*"))
