"""Stretches of runs, each under a layout of its own."""

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from launching import run_ranks

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.async_save import write
from lad_dist.config.load import parse_config
from lad_dist.config.schema import train_schema
from lad_dist.distributed import processes, ranks
from lad_dist.runs.run_folder import Run
from lad_dist.training.engine import snapshot
from lad_dist.training.run_spec import resolve_run
from lad_dist.training.train import build_trainer
from lad_dist.training.trainer import Trainer

State = dict[str, Any]


@dataclass
class Stretch:
    """What one engine of `layout` does.

    It loads each of the checkpoints `starts` (folder, layout) in turn, makes the steps from `first` to `last`, and
    saves after those in `saves`.
    """

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
    def states(self) -> dict[str, Any]:
        """The states of the stretch.

        `starts`: those loaded. `saves`: those saved, by step. `end`: the last one. `samples`: {(step, micro-batch):
        digest}.
        """
        return torch.load(Path(self.folder) / "states.pt", weights_only=True)


def run(stretches: list[Stretch]) -> None:
    """Run the stretches of one process in this process, those of two together in two processes."""
    for stretch in stretches:
        if stretch.layout["processes"] == 1:
            work(stretch)
    together = [stretch for stretch in stretches if stretch.layout["processes"] == 2]
    if together:
        run_ranks(work_all, together, folder=Path(together[0].folder).with_suffix(".ranks"), processes=2)


def work_all(stretches: list[Stretch]) -> None:
    for stretch in stretches:
        work(stretch)


def work(stretch: Stretch) -> None:
    trainer, states = start(stretch), {"starts": [], "saves": {}, "samples": {}}
    for checkpoint, saved_layout in stretch.starts:
        reshard.load_checkpoint(trainer.engine, Path(checkpoint), saved_layout, stretch.layout)
        states["starts"].append(state(trainer.engine))
    for done in train(trainer, stretch, states["samples"]):
        if done in stretch.saves:
            folder = Path(stretch.checkpoint(done)[0])
            write(snapshot(trainer.engine, folder), folder)
            states["saves"][done] = state(trainer.engine)
    states["end"] = state(trainer.engine)
    states["samples"] = {
        key: digest for samples in processes.all_gather(states["samples"]) for key, digest in samples.items()
    }
    if ranks.is_main():
        Path(stretch.folder).mkdir(parents=True, exist_ok=True)
        torch.save(states, Path(stretch.folder) / "states.pt")
    processes.barrier()


def start(stretch: Stretch) -> Trainer:
    tables = stretch.config | {"run": stretch.config["run"] | {"dir": stretch.folder}}
    options = stretch.config["deepspeed"]
    zero = options.get("zero_optimization", {}) | {"stage": stretch.layout["zero"]}
    config = parse_config(train_schema(tables), tables | {"deepspeed": options | {"zero_optimization": zero}}, "toy")
    return build_trainer(resolve_run(config), Run(config))


def train(trainer: Trainer, stretch: Stretch, samples: dict[tuple[int, int], str]) -> Iterator[int]:
    """Yield each step that is done; add the digests of this process's batches to `samples`."""
    batches = trainer.micro_batches(stretch.first)
    for step in range(stretch.first, stretch.last):
        own_batches = next(batches)
        for index, batch in enumerate(own_batches):
            micro_batch = ranks.rank() + index * ranks.world_size()
            samples[step, micro_batch] = hashlib.sha256(batch.input_ids.cpu().numpy().tobytes()).hexdigest()
        trainer.train_step(step, own_batches)
        yield step + 1
    batches.close()


def state(engine: Any) -> State:
    """Return the whole state that training continues from."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    scale = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
    counts = [{float(inner.state[p]["step"]) for p in g["params"] if inner.state.get(p)} for g in inner.param_groups]
    trained = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    shares = processes.all_gather({name: own_pieces(optimizer, parameter) for name, parameter in trained.items()})
    return {
        "module": deepcopy(engine.module.state_dict()),
        "parameters": {name: assembled([share[name] for share in shares], trained[name].shape) for name in trained},
        "groups": [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups],
        "counts": [sorted(steps) for steps in counts],
        "scale": [getattr(scale, "cur_scale", 1.0), getattr(scale, "cur_iter", None)],
        "engine": [engine.global_steps, engine.global_samples, engine.skipped_steps],
    }


def own_pieces(optimizer: Any, parameter: torch.nn.Parameter) -> dict[int, dict[str, torch.Tensor]]:
    """Return what this process has of a parameter's fp32 weights and moments, by where in the parameter it begins."""
    if not hasattr(parameter, "_hp_mapping"):
        copy, states = _fp32(optimizer, parameter), getattr(optimizer, "optimizer", optimizer).state
        values = {"fp32": copy.detach(), **states.get(copy, {})}
        return {0: {key: x.clone() for key, x in values.items() if key != "step"}}
    mapping = parameter._hp_mapping
    if mapping is None:
        return {}
    (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    source, start = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
    values = {"fp32": flat.detach(), **optimizer.optimizer.state[flat]}
    return {start: {key: x.narrow(0, source.start, source.numel).clone() for key, x in values.items() if x.dim()}}


def assembled(shares: list[dict[int, dict[str, torch.Tensor]]], shape: torch.Size) -> dict[str, torch.Tensor]:
    """Return the whole of a parameter from the pieces of all processes; all have the whole under stage 0."""
    pieces = {start: piece for share in shares for start, piece in share.items()}
    return {key: torch.cat([pieces[start][key].flatten() for start in sorted(pieces)]).view(shape) for key in pieces[0]}


def _fp32(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the tensor that stage 0's optimizer updates."""
    halves, copies = (chain(*getattr(optimizer, name, [])) for name in ("fp16_groups", "fp32_groups"))
    return next((copy for half, copy in zip(halves, copies, strict=True) if half is parameter), parameter)
