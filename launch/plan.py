"""What a run will cost, before anything is submitted: parameters, memory, arithmetic, disk, hours.

usage: python launch/plan.py CONFIG.toml --gpus N --gpu NAME [--nodes M] [--mfu SHARE] [dotted.key=value …]

CONFIG is one of pretrain_distill, finetune_teacher, task_distill or tune, with the same overrides. Reads configs,
tokenizers and data as the run would, but no weights, and refuses in one line what the run would refuse.
--gpus N      processes in all, one to a GPU
--nodes M     that they are spread over (default: 1)
--gpu NAME    h200, h100, a100-80, a100-40, l40s, v100 or cpu
--mfu SHARE   of the peak that is reached (default: 0.3, an assumption); launch/benchmark.py step measures it

example: python launch/plan.py configs/pretrain/minilm2.toml --gpus 16 --nodes 2 --gpu h200
"""

import argparse
import math
from typing import Any, NoReturn

from lad_dist.cli.app import plain_script
from lad_dist.cli.console import print_table
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import load_config, lookup, read_toml
from lad_dist.config.schema import ConfigTable, SearchConfig, TrainConfig, train_schema

ASSUMED_MFU = 0.3


class Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"plan: {message}; see --help")


def parsed() -> argparse.Namespace:
    words = Words(add_help=False, allow_abbrev=False)
    words.add_argument("config", metavar="CONFIG.toml")
    words.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    words.add_argument("--gpus", type=int, required=True)
    words.add_argument("--nodes", type=int, default=1)
    words.add_argument("--gpu", required=True)
    words.add_argument("--mfu", type=float)
    given = words.parse_intermixed_args()
    for name in ("gpus", "nodes"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} {getattr(given, name)}: must be 1 or more")
    if given.gpus % given.nodes:
        raise UserError(f"--gpus {given.gpus}: cannot be spread evenly over {given.nodes} nodes")
    if given.mfu is not None and not 0 < given.mfu <= 1:
        raise UserError(f"--mfu {given.mfu:g}: a share of the peak, above 0 and at most 1")
    return given


def schema_of(path: str) -> type[ConfigTable]:
    """What a file is for, by its content."""
    tables = read_toml(path)
    return SearchConfig if "search" in tables else train_schema(tables)


def main() -> int:
    given = parsed()
    config = load_config(schema_of(given.config), given.config, given.overrides)
    from lad_dist.search.grid import sample_trials
    from lad_dist.training.cost_model import GPUS

    lookup("--gpu", given.gpu, GPUS)
    if isinstance(config, SearchConfig):
        trials = sample_trials(config)
        each = config.search.gpus or 1
        at_once = min(len(trials), max(1, math.floor(given.gpus / each)), config.search.max_concurrent or len(trials))
        show(trials[0].config, given, world=1, trials=len(trials), at_once=at_once)
    else:
        assert isinstance(config, TrainConfig)
        show(config, given, world=given.gpus, trials=1, at_once=1)
    return EXIT_DONE


def show(config: TrainConfig, given: argparse.Namespace, world: int, trials: int, at_once: int) -> None:
    """Prints the costs of one run, and of all trials of a search. Raises UserError where a GPU cannot hold it."""
    from lad_dist.training import cost_model, run_spec

    made = run_spec.resolve_run(run_spec.resolve_options(config), world)
    found, gpu = cost_model.estimate(made, world), cost_model.GPUS[given.gpu]
    memory = found.memory
    rows = [
        ("parameters", f"student {millions(found.student)}, objective {millions(found.objective)}, "
                       f"teacher {millions(found.teacher)}"),
        ("a step", step(config, found.tokens, given, world)),
        ("steps", f"{found.steps:,}: {found.epochs:.3g} epochs, {found.steps * found.tokens / 1e9:.4g} G tokens"),
        ("FLOPs per token", f"student {found.student_flops:.4g} (forward and backward), "
                            f"teacher {found.teacher_flops:.4g}"
                            + (f", asked in {found.teacher_share:.0%} of the steps" if found.answers else "")),
        ("memory per GPU", f"{gigabytes(memory.total)} of {gigabytes(int(gpu.memory))}: "
                           + ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(memory).items())),
        ("disk", f"checkpoints {gigabytes((config.run.keep + 1) * found.checkpoint)} ({config.run.keep} that stay "
                 f"and one being written, {gigabytes(found.checkpoint)} each), export {gigabytes(found.export)}, "
                 f"data {gigabytes(found.data)}, teacher's answers {gigabytes(found.answers)}"),
        *time(made.precision, found.flops, gpu, given, world, trials, at_once),
    ]  # fmt: skip
    print_table(f"{config.run.name} on {given.gpus} x {given.gpu}", ("", ""), rows)
    if memory.total > gpu.memory:
        raise UserError(
            f"--gpu {given.gpu}: {gigabytes(memory.total)} do not fit into {gigabytes(int(gpu.memory))}; make "
            "data.micro_batch_tokens or examples_per_slot smaller with more data.micro_batches_per_step, or raise the ZeRO stage"
        )


def step(config: TrainConfig, tokens: float, given: argparse.Namespace, world: int) -> str:
    slots = config.data.micro_batches_per_step
    if world == 1:
        return f"{slots} slots on one GPU: {tokens:,.0f} tokens"
    each = given.gpus // given.nodes
    return f"{slots} slots = {given.nodes} nodes x {each} GPUs x {slots // world}: {tokens:,.0f} tokens"


def time(
    precision: str, flops: float, gpu: Any, given: argparse.Namespace, world: int, trials: int, at_once: int
) -> list[tuple[str, str]]:
    mfu = given.mfu or ASSUMED_MFU
    hours = gpu.hours(flops, world, mfu, precision)
    how = f"at an MFU of {mfu:g} in {precision}, {'as given' if given.mfu else 'assumed: --mfu says another'}"
    rows = [
        ("time", f"{duration(hours)}, {hours * world:.3g} GPU-hours, {how}; without evaluation and waiting in queues")
    ]
    if trials > 1:
        whole = hours * math.ceil(trials / at_once)
        rows.append(("all trials", f"{trials}, {at_once} at once, if none is stopped: {duration(whole)}"))
    return rows


def duration(hours: float) -> str:
    return f"{hours:,.3g} hours" if hours >= 1 else f"{hours * 60:.2g} minutes"


def millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


if __name__ == "__main__":
    plain_script(__doc__, main)
