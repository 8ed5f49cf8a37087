"""The command plan."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import load_config, read_toml, schema_of
from lad_dist.config.schema import TaskDataConfig, TrainConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.utils import progress
from lad_dist.utils.text import byte_size, duration, plain_number, si_number

if TYPE_CHECKING:
    from lad_dist.cli.search_costs import Machine, PlannedTrial, RunCost


def plan(arguments: Sequence[str]) -> int:
    """Estimate what a run will cost, before it begins: data, parameters, memory, arithmetic, disk, time.

    CONFIG is one of pretrain, finetune, distill or tune, with the same changes of keys. Reads configs, tokenizers and
    data as the run would, but no weights, and refuses in one line what the run would refuse.

    Of a search it shows each stage of the first trial, in a space that of the base config, and what all trials cost
    together if none is stopped: GPU-hours, wall time and disk. Stages that trials share count once.
    A stage that begins with what another one exports is as large as the student in the config of that one.

    usage: lad-dist plan CONFIG [--gpu NAME] [--gpus N] [--nodes M] [--mfu SHARE] [--measured FILE] [key=value …]

    --gpu NAME       h200, h100, a100-80, a100-40, l40s, l4, a10, rtx-4090, t4, v100, or 8 cores of a CPU: cpu-avx2,
                     cpu-avx512, cpu-amx
    --gpus N         processes in all, one to a GPU (default: 1); of a search the GPUs that all trials share
    --nodes M        that they are spread over (default: 1)
    --mfu SHARE      of the peak that is reached (default: 0.3, an assumption)
    --measured FILE  without --gpu, this machine at the speed that `lad-dist benchmark step CONFIG` measured (default:
                     benchmark.json in the folder of the runs)

    example: lad-dist plan configs:pretrain/minilm2.toml --gpus 16 --nodes 2 --gpu h200
    """
    options = parse_options(arguments)
    config = load_config(schema_of(read_toml(options.config)), options.config, options.overrides)
    if not isinstance(config, SearchConfig | TrainConfig):
        raise UserError(f"{options.config}: plan estimates a training or a search, and this config is of neither")
    with loading_libraries():
        from lad_dist.cli.search_costs import find_machine

    runs = Path(config.search.dir if isinstance(config, SearchConfig) else config.run.dir)
    machine = find_machine(options, runs)
    if isinstance(config, SearchConfig):
        show_search(config, options, machine)
    else:
        show(f"{config.run.name} on {options.gpus} x {machine.gpu}", machine.estimate(config), machine)
    return EXIT_DONE


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line; raise UserError where they are wrong."""
    parser = ArgumentParser("plan")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu")
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--measured", metavar="FILE", type=Path)
    options = parser.parse_intermixed_args(arguments)
    for name in ("gpus", "nodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if options.gpus % options.nodes:
        raise UserError(f"--gpus {options.gpus}: cannot be spread evenly over {options.nodes} nodes")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu:g}: a share of the peak, above 0 and at most 1")
    if options.gpu is None and options.mfu is not None:
        raise UserError("--mfu: goes with --gpu, whose peak it is a share of")
    if options.gpu is not None and options.measured is not None:
        raise UserError("--measured: is the speed of this machine; leave --gpu out")
    return options


def show(title: str, run: "RunCost", machine: "Machine") -> None:
    """Print what one training costs; raise UserError where a GPU cannot hold it."""
    costs, config = run.costs, run.config
    memory = costs.memory
    sizes = {"student": costs.student, "objective": costs.objective, "teacher": costs.teacher}
    rows = [
        ("data", costs.dataset),
        ("parameters", ", ".join(f"{name} {si_number(size)} parameters" for name, size in sizes.items() if size)),
        ("a step", step(config, costs.tokens, machine)),
        ("steps", f"{costs.steps:,}: {plain_number(costs.epochs, digits=3)} epochs, "
                  f"{si_number(costs.steps * costs.tokens)} tokens"),
        ("FLOPs per token", f"student {si_number(costs.student_flops)} (forward and backward)"
                            + (f", teacher {si_number(costs.teacher_flops)}" if costs.teacher else "")),
        *([("teacher", teacher(run))] if costs.teacher else []),
        ("memory per GPU", f"{byte_size(memory.total)} of {byte_size(machine.memory)}: "
                           + ", ".join(f"{name} {byte_size(size)}" for name, size in vars(memory).items() if size)),
        ("disk", f"checkpoints {byte_size(run.checkpoints)} ({run.num_checkpoints} that stay "
                 f"and one being written, {byte_size(costs.checkpoint)} each), export {byte_size(costs.export)}"
                 + (f", data {byte_size(costs.data)}" if costs.data else "")
                 + (f", teacher cache {byte_size(costs.teacher_cache)}" if costs.teacher_cache else "")),
        ("time", f"{duration(run.seconds)}, {gpu_hours(run.gpu_hours)} GPU-hours; without evaluation and waiting in "
                 "queues"),
        ("speed", run.speed),
    ]  # fmt: skip
    print_table(title, ("", ""), rows)
    machine.check_memory(costs)


def teacher(run: "RunCost") -> str:
    """Return how often the teacher runs."""
    if not run.costs.teacher_cache:
        return "forward in each step"
    return f"forward over each example once, {run.costs.teacher_share:.0%} of the steps; the others read the cache"


def gpu_hours(hours: float) -> str:
    """Return a number of GPU-hours with three digits."""
    return "under 0.01" if hours < 0.01 else plain_number(hours, digits=3)


def step(config: TrainConfig, tokens: float, machine: "Machine") -> str:
    """Return what a step consists of."""
    count, data = config.data.micro_batches_per_step, config.data
    examples = f" of {data.micro_batch_size} examples" if isinstance(data, TaskDataConfig) else ""
    micro_batches = f"{count} micro-batch{'es' * (count > 1)}{examples}"
    if machine.processes == 1:
        return f"{micro_batches} on one GPU: {tokens:,.0f} tokens"
    gpus = machine.processes // machine.nodes
    places = f"{machine.nodes} nodes x {gpus} GPUs" if machine.nodes > 1 else f"{gpus} GPUs"
    return f"{micro_batches} = {places} x {count // machine.processes}: {tokens:,.0f} tokens"


def show_search(config: SearchConfig, options: argparse.Namespace, gpu: "Machine") -> None:
    """Print what a search costs on GPUs of this kind."""
    from lad_dist.cli.search_costs import StageEstimator, trial_rounds
    from lad_dist.search.plan import plan_search

    share = config.search.gpus or 1.0
    machine = replace(gpu, processes=config.search.processes, nodes=1, share=share)
    capacity = math.floor(options.gpus / (machine.processes * share) + 1e-9)
    if not capacity:
        gpus = f"{machine.processes} processes with {share:g} GPUs each"
        raise UserError(f"--gpus {options.gpus}: a trial takes {gpus}; give more, or lower search.processes")
    search = plan_search(config)
    rounds, missing = trial_rounds(search)
    trials = [planned for planned_trials in rounds for planned in planned_trials]
    at_once = min(len(rounds[0]), capacity, config.search.max_concurrent or capacity)
    estimator = StageEstimator(config, machine)
    runs: dict[str, RunCost | str] = {}
    for number, planned in enumerate(trials):
        progress.report(f"plan of {config.search.name}", number, len(trials), "trials")
        runs |= {planned.runs[stage]: run for stage, run in estimator.estimate(planned.trial).items()}
    progress.report(f"plan of {config.search.name}", len(trials), len(trials), "trials")
    for stage, name in trials[0].runs.items():
        run = runs[name]
        if isinstance(run, str):
            say(f"stage {stage}: not estimated: {run}")
        else:
            show(f"stage {stage} on {machine.processes} x {share:g} {machine.gpu}", run, machine)
    for run in runs.values():
        if not isinstance(run, str):
            machine.check_memory(run.costs)
    rows = search_rows(config, rounds, runs, at_once)
    if missing:
        rows.append(("not estimated", f"{', '.join(missing)}: only some choices have this stage"))
    print_table(f"all trials of {config.search.name} on {options.gpus} x {machine.gpu}", ("", ""), rows)


def search_rows(
    config: SearchConfig,
    rounds: "Sequence[Sequence[PlannedTrial]]",
    runs: "Mapping[str, RunCost | str]",
    at_once: int,
) -> list[tuple[str, str]]:
    """Return the rows about all trials."""
    from lad_dist.cli.search_costs import wall_seconds

    samples, repetitions = (len(trials) for trials in [*rounds, []][:2])
    distinct = dict.fromkeys(each for trials in rounds for t in trials for each in t.runs.items())
    by_stage = Counter(stage for stage, _ in distinct)
    costs = [run for run in runs.values() if not isinstance(run, str)]
    seconds = {name: 0.0 if isinstance(run, str) else run.seconds for name, run in runs.items()}
    wall = sum(wall_seconds([[*t.runs.values()] for t in trials], seconds, at_once) for trials in rounds)
    reasons = Counter(run for run in runs.values() if isinstance(run, str))
    bound = "at least " if reasons else ""
    options = config.search
    rows = [
        ("trials", f"{samples}" + (f", and {repetitions} of the best with further seeds" if repetitions else "")),
        ("at once", f"{at_once}; processes of each: {options.processes}, GPUs of a process: {options.gpus:g}"),
        ("trainings", ", ".join(f"{stage} {count}" for stage, count in by_stage.items())),
        ("GPU-hours", f"{bound}{gpu_hours(sum(run.gpu_hours for run in costs))} if none is stopped"),
        ("wall time", f"{bound}{duration(wall)} if none is stopped"),
        ("disk", f"{bound}checkpoints {byte_size(sum(run.checkpoints for run in costs))}, "
                 f"exports {byte_size(sum(run.costs.export for run in costs))}"),
    ]  # fmt: skip
    rows += [("not estimated", f"{count} trainings: {reason}") for reason, count in reasons.items()]
    return rows
