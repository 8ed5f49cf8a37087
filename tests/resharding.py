"""Stretches of runs, each under a layout of its own.

usage: torchrun … tests/resharding.py STRETCHES.json
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from launching import ROOT, launch

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.async_save import write
from lad_dist.config.load import parse_config
from lad_dist.config.schema import train_schema
from lad_dist.distributed import processes
from lad_dist.runs.run_folder import Run
from lad_dist.training.engine import snapshot
from lad_dist.training.metrics import MetricAccumulator
from lad_dist.training.train import check, prepare
from lad_dist.training.trainer import Trainer

State = dict[str, Any]


@dataclass
class Stretch:
    """What one engine of `layout` does: takes up each of the checkpoints `starts` (folder, layout) in turn, makes the
    steps from `first` to `last`, and saves after those in `saves`."""

    config: dict[str, Any]
    layout: dict[str, int]
    folder: str
    first: int = 0
    last: int = 0
    saves: list[int] = field(default_factory=list)
    starts: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def checkpoint(self, step: int) -> tuple[str, dict[str, int]]:
        return str(Path(self.folder) / str(step)), self.layout

    @cached_property
    def found(self) -> dict[str, Any]:
        """`starts`: the states taken up. `saves`: those saved, by step. `end`: the last one. `samples`: {(step, slot):
        digest}."""
        return torch.load(Path(self.folder) / "found.pt", weights_only=True)


def run(stretches: list[Stretch]) -> None:
    """Those of one process in this one, those of two together in two."""
    for stretch in stretches:
        if stretch.layout["processes"] == 1:
            work(stretch)
    together = [asdict(stretch) for stretch in stretches if stretch.layout["processes"] == 2]
    if together:
        path = Path(together[0]["folder"]).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(together))
        done = launch([ROOT / "tests" / "resharding.py", path], by="torchrun", processes=2)
        assert done.returncode == 0, done.stderr[-6000:]


def work(stretch: Stretch) -> None:
    loop, found = start(stretch), {"starts": [], "saves": {}, "samples": {}}
    for checkpoint, was in stretch.starts:
        reshard.load_checkpoint(loop.engine, Path(checkpoint), was, stretch.layout)
        found["starts"].append(state(loop.engine))
    for done in train(loop, stretch, found["samples"]):
        if done in stretch.saves:
            folder = Path(stretch.checkpoint(done)[0])
            write(snapshot(loop.engine, folder), folder)
            found["saves"][done] = state(loop.engine)
    found["end"] = state(loop.engine)
    found["samples"] = {key: digest for its in processes.all_gather(found["samples"]) for key, digest in its.items()}
    if processes.is_main():
        Path(stretch.folder).mkdir(parents=True, exist_ok=True)
        torch.save(found, Path(stretch.folder) / "found.pt")
    processes.barrier()


def start(stretch: Stretch) -> Trainer:
    tables = stretch.config | {"run": stretch.config["run"] | {"dir": stretch.folder}}
    words = stretch.config["deepspeed"]
    zero = words.get("zero_optimization", {}) | {"stage": stretch.layout["zero"]}
    config = parse_config(train_schema(tables), tables | {"deepspeed": words | {"zero_optimization": zero}}, "toy")
    return prepare(check(config), Run(config))


def train(loop: Trainer, stretch: Stretch, samples: dict[tuple[int, int], str]) -> Iterator[int]:
    """Each step that is done; the digests of this process's batches by step and slot."""
    averages, batches = MetricAccumulator(), loop.batches(stretch.first)
    for step in range(stretch.first, stretch.last):
        mine = next(batches)
        for index, batch in enumerate(mine):
            slot = processes.rank() + index * processes.world_size()
            samples[step, slot] = hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest()
        loop.train_step(step, mine, averages)
        yield step + 1
    batches.close()


def state(engine: Any) -> State:
    """All that training goes on from, whole."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    scale = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
    counts = [{float(inner.state[p]["step"]) for p in g["params"] if inner.state.get(p)} for g in inner.param_groups]
    return {
        "module": deepcopy(engine.module.state_dict()),
        "parameters": {n: parameter_state(engine, p) for n, p in engine.module.named_parameters() if p.requires_grad},
        "groups": [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups],
        "counts": [sorted(each) for each in counts],
        "scale": [getattr(scale, "cur_scale", 1.0), getattr(scale, "cur_iter", None)],
        "engine": [engine.global_steps, engine.global_samples, engine.skipped_steps],
    }


def parameter_state(engine: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The fp32 weights and the moments, put together from all processes' shares."""
    optimizer = engine.optimizer
    if not hasattr(parameter, "_hp_mapping"):
        copy, states = _fp32(optimizer, parameter), getattr(optimizer, "optimizer", optimizer).state
        found = {"fp32": copy.detach(), **states.get(copy, {})}
        return {key: x.clone() for key, x in found.items() if key != "step"}
    mine, mapping = {}, parameter._hp_mapping
    if mapping is not None:
        (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
        here, at = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
        held = {"fp32": flat.detach(), **optimizer.optimizer.state[flat]}
        mine = {at: {key: x.narrow(0, here.start, here.numel).clone() for key, x in held.items() if x.dim()}}
    pieces = {at: piece for its in processes.all_gather(mine) for at, piece in its.items()}
    return {key: torch.cat([pieces[at][key] for at in sorted(pieces)]).view_as(parameter) for key in pieces[0]}


def _fp32(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What stage 0's optimizer updates."""
    halves, copies = (chain(*getattr(optimizer, name, [])) for name in ("fp16_groups", "fp32_groups"))
    return next((copy for half, copy in zip(halves, copies, strict=True) if half is parameter), parameter)


if __name__ == "__main__":
    (words,) = (word for word in sys.argv[1:] if not word.startswith("--"))
    for row in json.loads(Path(words).read_text()):
        work(Stretch(**row))
