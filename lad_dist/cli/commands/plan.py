"""The command plan."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lad_dist.cli.command import ArgumentParser
from lad_dist.cli.console import loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, UserError
from lad_dist.config.load import load_config, lookup, read_toml, schema_of
from lad_dist.config.schema import TrainConfig
from lad_dist.config.search_schema import SearchConfig
from lad_dist.utils import progress
from lad_dist.utils.text import duration, gigabytes, si_number

if TYPE_CHECKING:
    from lad_dist.cli.search_costs import Machine, PlannedTrial, RunCost


def plan(arguments: Sequence[str]) -> int:
    """Estimate what a run will cost, before anything is submitted: parameters, memory, arithmetic, disk, hours.

    CONFIG is one of pretrain, finetune, distill or tune, with the same changes of keys. Reads configs, tokenizers and
    data as the run would, but no weights, and refuses in one line what the run would refuse.

    Of a search it shows each stage of the first trial, in a space that of the base config, and what all trials cost
    together if none is stopped: GPU-hours, wall time and disk. Stages that trials share count once.
    A stage that begins with what another one exports is as large as the student in the config of that one.

    usage: lad-dist plan CONFIG --gpus N --gpu NAME [--nodes M] [--mfu SHARE] [key=value …]

    --gpus N      processes in all, one to a GPU; of a search the GPUs that all trials share
    --nodes M     that they are spread over (default: 1)
    --gpu NAME    h200, h100, a100-80, a100-40, l40s, v100 or cpu
    --mfu SHARE   of the peak that is reached (default: 0.3, an assumption); `lad-dist benchmark step` measures it

    example: lad-dist plan configs:pretrain/minilm2.toml --gpus 16 --nodes 2 --gpu h200
    """
    options = parse_options(arguments)
    config = load_config(schema_of(read_toml(options.config)), options.config, options.overrides)
    if not isinstance(config, SearchConfig | TrainConfig):
        raise UserError(f"{options.config}: plan estimates a training or a search, and this config is of neither")
    with loading_libraries():
        from lad_dist.cli.search_costs import GPUS, Machine

    lookup("--gpu", options.gpu, GPUS)
    if isinstance(config, SearchConfig):
        show_search(config, options)
    else:
        machine = Machine(options.gpu, options.gpus, options.nodes, mfu=options.mfu)
        show(f"{config.run.name} on {options.gpus} x {options.gpu}", machine.estimate(config), machine)
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


def show(title: str, run: "RunCost", machine: "Machine") -> None:
    """Print what one training costs; raise UserError where a GPU cannot hold it."""
    costs, config = run.costs, run.config
    memory = costs.memory
    origin = "as set" if machine.mfu else "assumed: --mfu sets another"
    how = f"at an MFU of {machine.reached_mfu:g} in {run.precision}, {origin}"
    rows = [
        ("parameters", f"student {si_number(costs.student)}, objective {si_number(costs.objective)}, "
                       f"teacher {si_number(costs.teacher)}"),
        ("a step", step(config, costs.tokens, machine)),
        ("steps", f"{costs.steps:,}: {costs.epochs:.3g} epochs, {costs.steps * costs.tokens / 1e9:.4g} G tokens"),
        ("FLOPs per token", f"student {costs.student_flops:.4g} (forward and backward), "
                            f"teacher {costs.teacher_flops:.4g}"
                            + (f", asked in {costs.teacher_share:.0%} of the steps" if costs.teacher_cache else "")),
        ("memory per GPU", f"{gigabytes(memory.total)} of {gigabytes(machine.memory)}: "
                           + ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(memory).items())),
        ("disk", f"checkpoints {gigabytes(run.checkpoints)} ({run.num_checkpoints} that stay "
                 f"and one being written, {gigabytes(costs.checkpoint)} each), export {gigabytes(costs.export)}, "
                 f"data {gigabytes(costs.data)}, teacher cache {gigabytes(costs.teacher_cache)}"),
        ("time", f"{duration(run.hours)}, {run.gpu_hours:.3g} GPU-hours, {how}; without evaluation and waiting in "
                 "queues"),
    ]  # fmt: skip
    print_table(title, ("", ""), rows)
    machine.check_memory(costs)


def step(config: TrainConfig, tokens: float, machine: "Machine") -> str:
    count = config.data.micro_batches_per_step
    if machine.processes == 1:
        return f"{count} micro-batches on one GPU: {tokens:,.0f} tokens"
    gpus = machine.processes // machine.nodes
    places = f"{machine.nodes} nodes x {gpus} GPUs" if machine.nodes > 1 else f"{gpus} GPUs"
    return f"{count} micro-batches = {places} x {count // machine.processes}: {tokens:,.0f} tokens"


def show_search(config: SearchConfig, options: argparse.Namespace) -> None:
    """Print what a search costs."""
    from lad_dist.cli.search_costs import Machine, StageEstimator, trial_rounds
    from lad_dist.search.plan import plan_search

    share = config.search.gpus or 1.0
    machine = Machine(options.gpu, config.search.processes, share=share, mfu=options.mfu)
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
            show(f"stage {stage} on {machine.processes} x {share:g} {options.gpu}", run, machine)
    for run in runs.values():
        if not isinstance(run, str):
            machine.check_memory(run.costs)
    rows = search_rows(config, rounds, runs, at_once)
    if missing:
        rows.append(("not estimated", f"{', '.join(missing)}: only some choices have this stage"))
    print_table(f"all trials of {config.search.name} on {options.gpus} x {options.gpu}", ("", ""), rows)


def search_rows(
    config: SearchConfig,
    rounds: "Sequence[Sequence[PlannedTrial]]",
    runs: "Mapping[str, RunCost | str]",
    at_once: int,
) -> list[tuple[str, str]]:
    """Return the rows about all trials."""
    from lad_dist.cli.search_costs import wall_hours

    samples, repetitions = (len(trials) for trials in [*rounds, []][:2])
    distinct = dict.fromkeys(each for trials in rounds for t in trials for each in t.runs.items())
    by_stage = Counter(stage for stage, _ in distinct)
    costs = [run for run in runs.values() if not isinstance(run, str)]
    hours = {name: 0.0 if isinstance(run, str) else run.hours for name, run in runs.items()}
    wall = sum(wall_hours([[*t.runs.values()] for t in trials], hours, at_once) for trials in rounds)
    reasons = Counter(run for run in runs.values() if isinstance(run, str))
    bound = "at least " if reasons else ""
    options = config.search
    rows = [
        ("trials", f"{samples}" + (f", and {repetitions} of the best with further seeds" if repetitions else "")),
        ("at once", f"{at_once}; processes of each: {options.processes}, GPUs of a process: {options.gpus:g}"),
        ("trainings", ", ".join(f"{stage} {count}" for stage, count in by_stage.items())),
        ("GPU-hours", f"{bound}{sum(run.gpu_hours for run in costs):,.3g} if none is stopped"),
        ("wall time", f"{bound}{duration(wall)} if none is stopped"),
        ("disk", f"{bound}checkpoints {gigabytes(sum(run.checkpoints for run in costs))}, "
                 f"exports {gigabytes(sum(run.costs.export for run in costs))}"),
    ]  # fmt: skip
    rows += [("not estimated", f"{count} trainings: {reason}") for reason, count in reasons.items()]
    return rows
