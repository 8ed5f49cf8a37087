"""The command plan."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, print_table
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import load_config, lookup, read_toml, schema_of
from lad_dist.config.schema import SearchConfig, TrainConfig
from lad_dist.utils.text import duration, gigabytes, si_number

ASSUMED_MFU = 0.3


def plan(arguments: Sequence[str]) -> int:
    """Estimate what a run will cost, before anything is submitted: parameters, memory, arithmetic, disk, hours.

    CONFIG is one of pretrain, finetune, distill or tune, with the same changes of keys. Reads configs, tokenizers and
    data as the run would, but no weights, and refuses in one line what the run would refuse.

    usage: lad-dist plan CONFIG --gpus N --gpu NAME [--nodes M] [--mfu SHARE] [key=value …]

    --gpus N      processes in all, one to a GPU
    --nodes M     that they are spread over (default: 1)
    --gpu NAME    h200, h100, a100-80, a100-40, l40s, v100 or cpu
    --mfu SHARE   of the peak that is reached (default: 0.3, an assumption); `lad-dist benchmark step` measures it

    example: lad-dist plan configs:pretrain/minilm2.toml --gpus 16 --nodes 2 --gpu h200
    """
    options = parse_options(arguments)
    config = load_config(schema_of(read_toml(options.config)), options.config, options.overrides)
    with loading_libraries():
        from lad_dist.search.grid import sample_trials
        from lad_dist.training.cost_model import GPUS

    lookup("--gpu", options.gpu, GPUS)
    if isinstance(config, SearchConfig):
        trials = sample_trials(config)
        gpus = config.search.gpus or 1
        at_once = min(len(trials), max(1, math.floor(options.gpus / gpus)), config.search.max_concurrent or len(trials))
        show(trials[0].config, options, world=1, trials=len(trials), at_once=at_once)
    elif not isinstance(config, TrainConfig):
        raise UserError(f"{options.config}: plan estimates a training or a search, and this config is of neither")
    else:
        show(config, options, world=options.gpus, trials=1, at_once=1)
    return EXIT_DONE


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line; raise UserError where they are wrong."""
    parser = ArgumentParser("plan")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--mfu", type=float)
    options = parser.parse_intermixed_args(arguments)
    for name in ("gpus", "nodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if options.gpus % options.nodes:
        raise UserError(f"--gpus {options.gpus}: cannot be spread evenly over {options.nodes} nodes")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu:g}: a share of the peak, above 0 and at most 1")
    return options


def show(config: TrainConfig, options: argparse.Namespace, world: int, trials: int, at_once: int) -> None:
    """Print the costs of one run, and of all trials of a search; raise UserError where a GPU cannot hold it."""
    from lad_dist.training import cost_model, run_spec

    spec = run_spec.resolve_run(config, world)
    costs, gpu = cost_model.estimate(spec, world), cost_model.GPUS[options.gpu]
    memory = costs.memory
    rows = [
        ("parameters", f"student {si_number(costs.student)}, objective {si_number(costs.objective)}, "
                       f"teacher {si_number(costs.teacher)}"),
        ("a step", step(config, costs.tokens, options, world)),
        ("steps", f"{costs.steps:,}: {costs.epochs:.3g} epochs, {costs.steps * costs.tokens / 1e9:.4g} G tokens"),
        ("FLOPs per token", f"student {costs.student_flops:.4g} (forward and backward), "
                            f"teacher {costs.teacher_flops:.4g}"
                            + (f", asked in {costs.teacher_share:.0%} of the steps" if costs.teacher_cache else "")),
        ("memory per GPU", f"{gigabytes(memory.total)} of {gigabytes(int(gpu.memory))}: "
                           + ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(memory).items())),
        ("disk", f"checkpoints {gigabytes((config.run.keep + 1) * costs.checkpoint)} ({config.run.keep} that stay "
                 f"and one being written, {gigabytes(costs.checkpoint)} each), export {gigabytes(costs.export)}, "
                 f"data {gigabytes(costs.data)}, teacher cache {gigabytes(costs.teacher_cache)}"),
        *time(spec.precision, costs.flops, gpu, options, world, trials, at_once),
    ]  # fmt: skip
    print_table(f"{config.run.name} on {options.gpus} x {options.gpu}", ("", ""), rows)
    if memory.total > gpu.memory:
        raise UserError(
            f"--gpu {options.gpu}: {gigabytes(memory.total)} do not fit into {gigabytes(int(gpu.memory))}; make "
            "data.micro_batch_tokens or micro_batch_size smaller with more data.micro_batches_per_step, or raise the "
            "ZeRO stage"
        )


def step(config: TrainConfig, tokens: float, options: argparse.Namespace, world: int) -> str:
    count = config.data.micro_batches_per_step
    if world == 1:
        return f"{count} micro-batches on one GPU: {tokens:,.0f} tokens"
    gpus = options.gpus // options.nodes
    return f"{count} micro-batches = {options.nodes} nodes x {gpus} GPUs x {count // world}: {tokens:,.0f} tokens"


def time(
    precision: str, flops: float, gpu: Any, options: argparse.Namespace, world: int, trials: int, at_once: int
) -> list[tuple[str, str]]:
    mfu = options.mfu or ASSUMED_MFU
    hours = gpu.hours(flops, world, mfu, precision)
    how = f"at an MFU of {mfu:g} in {precision}, {'as set' if options.mfu else 'assumed: --mfu sets another'}"
    rows = [
        ("time", f"{duration(hours)}, {hours * world:.3g} GPU-hours, {how}; without evaluation and waiting in queues")
    ]
    if trials > 1:
        whole = hours * math.ceil(trials / at_once)
        rows.append(("all trials", f"{trials}, {at_once} at once, if none is stopped: {duration(whole)}"))
    return rows
