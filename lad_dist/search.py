"""Hyper-parameter search: Ray Tune over a task distillation. The only importer of ray.

    search(config)   runs it, or goes on with it -> Found

What a trial samples is a function of (search.seed, trial, key): all trials are drawn and checked before Ray starts. A
trial is `train` in its own process, its rows handed to Tune, where ASHA stops it when others do better at the same
training step.

    <dir>/<name>/search.toml    the search with its base config, as it was started
                 trial-00/ …    an ordinary run folder each; one that ASHA stopped has no results.json and no export
                 ray/           Tune's own state, and the traceback of a failed trial in trial-00/error.txt
                 best.toml      the best trial's config, ready for launch/task_distill.py
                 results.json   all trials, best first; written last: its presence says that the search is complete

A complete search is not run twice. A partial one goes on: finished trials stay as they are, unfinished and failed ones
run again, from their checkpoints where run.save_every left any; ASHA then compares anew.
"""

import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output cannot be silenced
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run folders have it all

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from lad_dist import plan
from lad_dist.config import Search, SearchConfig, TaskConfig, UserError, dump, override, parse, pick, read
from lad_dist.disk import write_text

OBJECT_STORE = 100_000_000  # bytes: trials exchange nothing but numbers


@dataclass
class Found:
    """`trials` are rows of trial, sampled values, last metric and step, best first; `failed` are rows of trial and
    error; `best` is the file with the best config."""

    trials: list[dict[str, Any]]
    failed: list[dict[str, str]]
    best: Path


@dataclass(frozen=True)
class Trial:
    sample: dict[str, Any]
    config: TaskConfig


def search(config: SearchConfig) -> Found | None:
    """Searches; None when it was interrupted (SIGINT, SIGUSR1) and wants to be run again. Raises UserError for a base
    config, an override, a space or a metric that does not fit, before Ray starts."""
    words = config.search
    base = read(words.base)
    folder = Path(words.dir) / words.name
    trials = draw(config, base)
    _check(words, trials[0].config)
    searched = config.model_dump(exclude_none=True) | {"base": base}
    _check_same(folder, searched)
    if not (folder / "results.json").exists():
        with _ray(words):
            write_text(folder / "search.toml", tomli_w.dumps(searched))
            grid = _tuner(words, trials, folder).fit()
            results = [grid[index] for index in range(len(grid))]
        if not _complete(results, words):
            return None
        _conclude(words, trials, results, folder)
    return Found(**json.loads((folder / "results.json").read_text()), best=folder / "best.toml")


def draw(config: SearchConfig, base: Mapping[str, Any]) -> list[Trial]:
    """The trials, each with the config of its run. Raises UserError for what does not fit the schema of a run."""
    words = config.search
    fixed = override(base, _dotted(config.override))
    space = {key: _distribution(key, name, values) for key, name, values in _laws(config.space)}
    width = len(str(words.samples - 1))
    trials = []
    for number in range(words.samples):
        sample = {key: law(random.Random(f"{words.seed}/{number}/{key}")) for key, law in space.items()}
        trials.append(Trial(sample, _run(words, override(fixed, sample.items()), f"trial-{number:0{width}}")))
    return trials


def _dotted(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in nested tables, by dotted keys: `"data.task" = …` and `data.task = …` say the same."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _laws(space: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Key, distribution and its values; of a key given twice, as by the command line, the last."""
    for path, values in _dotted(space):
        key, _, name = path.rpartition(".")
        yield key, name, values


def _distribution(key: str, name: str, values: Any) -> Callable[[random.Random], Any]:
    law = pick(f"space.{key}: distribution", name, DISTRIBUTIONS)
    if not isinstance(values, list) or not values:
        raise UserError(f"space.{key}.{name}: give a list, [low, high] or for choice the values, not {values!r}")
    if name != "choice":
        _check_range(f"space.{key}.{name}", values, int if name == "randint" else (int, float))
    if name == "loguniform" and values[0] <= 0:
        raise UserError(f"space.{key}.{name}: the low end must be above 0, not {values[0]!r}")
    return lambda chance: law(chance, values)


def _check_range(where: str, values: list[Any], kind: Any) -> None:
    if len(values) != 2 or not all(isinstance(value, kind) for value in values) or values[0] >= values[1]:
        raise UserError(f"{where}: give [low, high] with low < high, not {values!r}")


DISTRIBUTIONS: dict[str, Callable[[random.Random, list[Any]], Any]] = {
    "uniform": lambda chance, ends: chance.uniform(*ends),
    "loguniform": lambda chance, ends: math.exp(chance.uniform(*map(math.log, ends))),
    "randint": lambda chance, ends: chance.randrange(*ends),  # without the high end, as Tune's
    "choice": lambda chance, values: chance.choice(values),
}


def _run(words: Search, tables: Mapping[str, Any], name: str) -> TaskConfig:
    """A run in the search's folder, its objective's and surgeries' arguments checked too."""
    place = {"run.name": name, "run.dir": str(Path(words.dir) / words.name)}
    config = parse(TaskConfig, override(tables, place.items()), where=words.base)
    plan.resolve(config)
    return config


def _check(words: Search, config: TaskConfig) -> None:
    """One trial stands for all in what takes time to check: data, models, and that the task has the metric."""
    task = plan.make(config).task
    assert task is not None
    if words.metric not in task.metrics:
        raise UserError(f'search.metric: {task.name} has no "{words.metric}", it has {", ".join(task.metrics)}')
    if not config.run.eval_every:
        raise UserError("run.eval_every: trials are compared at their evaluations; set override.run.eval_every")


def _check_same(folder: Path, searched: Mapping[str, Any]) -> None:
    """Raises UserError when the folder holds another search."""
    if not (folder / "search.toml").exists():
        return
    old, new = (dict(_dotted(tables)) for tables in (read(folder / "search.toml"), searched))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder}: holds a search with {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
            "choose another search.name, or remove the folder"
        )


@contextmanager
def _ray(words: Search) -> Iterator[None]:
    """Ray, joined at RAY_ADDRESS or started here for as long as it is needed."""
    address, folder = os.environ.get("RAY_ADDRESS"), None
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        else:
            folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets in it have 107 characters at most
            ray.init(
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=folder,
            )
        _check_room(words)
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_room(words: Search) -> None:
    """Tune would wait without end for a node that can hold a trial."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(words.cpus <= node.get("CPU", 0) and words.gpus <= node.get("GPU", 0) for node in nodes):
        cpus, gpus = (max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UserError(
            f"search.cpus = {words.cpus:g}, search.gpus = {words.gpus:g}: no node can hold such a trial, "
            f"the largest has {cpus:g} CPUs and {gpus:g} GPUs"
        )


def _tuner(words: Search, trials: list[Trial], folder: Path) -> tune.Tuner:
    here, configs = os.getcwd(), [trial.config for trial in trials]

    def run(given: dict[str, int]) -> None:
        os.chdir(here)
        _train(words, configs[given["number"]])

    trainable = tune.with_resources(run, {"cpu": words.cpus, "gpu": words.gpus})
    state = folder.resolve() / "ray"
    if tune.Tuner.can_restore(state):
        return tune.Tuner.restore(str(state), trainable, resume_unfinished=True, restart_errored=True)
    scheduler = ASHAScheduler(
        time_attr="step",
        max_t=10**9,  # ASHA ends no run that its config does not
        grace_period=words.grace * configs[0].run.eval_every,
        reduction_factor=words.reduction,
    )
    settings = tune.TuneConfig(
        metric=words.metric,
        mode="max",
        max_concurrent_trials=words.concurrent or None,
        scheduler=scheduler,
        trial_dirname_creator=lambda trial: configs[trial.config["number"]].run.name,
    )
    place = tune.RunConfig(
        name=state.name, storage_path=str(state.parent), verbose=0, callbacks=[_Progress(words, configs)]
    )
    space = {"number": tune.grid_search(list(range(len(trials))))}
    return tune.Tuner(trainable, param_space=space, tune_config=settings, run_config=place)


class _Progress(tune.Callback):
    """A line for every evaluation, and for a trial that failed."""

    def __init__(self, words: Search, configs: list[TaskConfig]):
        self.metric = words.metric
        self.names = [config.run.name for config in configs]

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        name = self.names[trial.config["number"]]
        print(f"{name} step {result['step']}  {self.metric} {result[self.metric]:.4g}", file=sys.stderr, flush=True)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        print(f"{self.names[trial.config['number']]} failed", file=sys.stderr, flush=True)


def _train(words: Search, config: TaskConfig) -> None:
    """A trial, in the process that Tune gave it."""
    from lad_dist.train import train  # noqa: PLC0415 (deepspeed belongs to the trial's process)

    threads = max(1, int(words.cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the driver's may be that of a whole node
    torch.set_num_threads(threads)
    told = False

    def tell(row: Mapping[str, Any]) -> None:
        nonlocal told
        if f"dev/{words.metric}" in row:
            tune.report({words.metric: row[f"dev/{words.metric}"], "step": row["step"]})
            told = True

    results = train(config, report=tell).results
    if results is not None and not told:  # complete already, which an interrupted search had not heard of
        tune.report({words.metric: results["metrics"][words.metric], "step": results["steps"]})


def _complete(results: list[tune.Result], words: Search) -> bool:
    ended = [result for result in results if result.error is not None or (result.metrics or {}).get("done")]
    return len(ended) == words.samples


def _conclude(words: Search, trials: list[Trial], results: list[tune.Result], folder: Path) -> None:
    """Writes best.toml and results.json. Raises UserError when no trial has a result."""
    by_name = {trial.config.run.name: trial for trial in trials}
    rows, failed = [], []
    for result in results:
        name = Path(result.path).name
        if result.error is not None:
            failed.append({"trial": name, "error": str(result.error).strip().splitlines()[-1]})
        else:
            assert result.metrics is not None
            last = {key: result.metrics[key] for key in (words.metric, "step")}
            rows.append({"trial": name, **by_name[name].sample, **last})
    if not rows:
        raise UserError(f"{folder}: all {len(failed)} trials failed; {failed[0]['trial']}: {failed[0]['error']}")
    rows.sort(key=lambda row: (-row[words.metric], -row["step"], row["trial"]))
    best = by_name[rows[0]["trial"]].config
    best = best.model_copy(update={"run": best.run.model_copy(update={"name": "best"})})
    command = f"# python launch/task_distill.py {folder / 'best.toml'}"
    found = f"# {rows[0]['trial']}, the best of {words.samples} trials by {words.metric} on the dev set"
    write_text(folder / "best.toml", f"{command}\n{found}\n{dump(best)}")
    write_text(folder / "results.json", json.dumps({"trials": rows, "failed": failed}, indent=2) + "\n")
