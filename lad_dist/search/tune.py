"""Searches and grids: Ray Tune over a task distillation. The only importer of ray.

    search(config)   runs it, or goes on with it -> Found

All trials are drawn and checked before Ray starts (`trials`). A trial is `train` in its own process, its rows handed to
Tune. Trials of a space are stopped by ASHA when others do better at the same training step; those of a grid, which are
there to be compared, all run to their end.

    <dir>/<name>/search.toml    the search with its base config, as it was started
                 trial-00/ …    an ordinary run folder each, in a grid kd-rte-0; one that ASHA stopped has no
                                results.json and no export
                 teacher_cache/       what the trials' teachers say, while it lasts
                 ray/           Tune's own state, and the traceback of a failed trial in trial-00/error.txt
                 best.toml      the best trial's config, ready for launch/task_distill.py; not of a grid
                 results.json   all trials, best first; written last: its presence says that the search is complete

A complete search is not run twice; one is complete when every trial has ended, failed ones too. A partial one, or one
whose results.json was removed, goes on: finished trials stay as they are, unfinished and failed ones run again, from
their checkpoints where run.save_every left any; ASHA then compares anew.
"""

import ctypes
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import tomli_w
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from lad_dist.config.errors import Fault, UserError
from lad_dist.config.load import dump_config, read_toml
from lad_dist.config.schema import SearchConfig, SearchOptions, TaskConfig
from lad_dist.search.grid import Trial, base_configs, dotted, sample_trials
from lad_dist.training import run_spec
from lad_dist.utils.atomic_io import write_text
from lad_dist.utils.strict_json import parse_json

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output cannot be silenced
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run folders have it all

TASK = {"data.task", "data.train", "data.dev", "data.kind"}
OBJECT_STORE = 100_000_000  # bytes: trials exchange nothing but numbers


@dataclass
class SearchResult:
    """`trials` are rows of trial, choices and sampled values, metric, its last score and step, best first; `failed` are
    rows of trial and error; `best` is the file with the best config, None for a grid."""

    trials: list[dict[str, Any]]
    failed: list[dict[str, str]]
    best: Path | None


def search(config: SearchConfig) -> SearchResult | None:
    """Searches; None when it was interrupted (SIGINT, SIGUSR1) and wants to be run again. Raises UserError for a base
    config, an override, a space or a metric that does not fit, before Ray starts."""
    words = config.search
    folder = Path(words.dir) / words.name
    trials = sample_trials(config)
    metrics = _check(config, trials)
    searched = config.model_dump(exclude_none=True) | {"base": {base: read_toml(base) for base in base_configs(config)}}
    _check_same(folder, searched)
    if not (folder / "results.json").exists():
        with _ray(words):
            write_text(folder / "search.toml", tomli_w.dumps(searched))
            ended = _tuner(config, trials, metrics, folder).fit()
            results = [ended[index] for index in range(len(ended))]
        if not _complete(results, len(trials)):
            return None
        _conclude(config, trials, metrics, results, folder)
    best = None if config.grid else folder / "best.toml"
    return _found(folder / "results.json", best)


def _found(results: Path, best: Path | None) -> SearchResult:
    try:
        return SearchResult(**parse_json(results.read_text(encoding="utf-8")), best=best)
    except (ValueError, TypeError) as error:
        raise UserError(f"{results}: damaged ({error}); remove it and run the search again") from None


def _check(config: SearchConfig, trials: list[Trial]) -> list[str]:
    """The metric of each trial. One trial of each combination stands for its samples, and one seed for all, in what
    takes time to check: data, models, and that the task has the metric."""
    words, known = config.search, dict[str, str]()
    if not config.grid and not trials[0].config.run.eval_every:
        raise UserError("run.eval_every: trials are compared at their evaluations; set override.run.eval_every")
    if tasks := TASK & trials[0].sample.keys():
        raise UserError(
            f"space.{min(tasks)}: a task is nothing to search, its scores are not another's; put it in [grid]"
        )
    metrics = []
    for trial in trials[:: words.num_samples]:
        alike = dump_config(trial.config.model_copy(update={"run": trials[0].config.run}))
        if alike not in known:
            known[alike] = _metric(words, trial.config)
        metrics += [known[alike]] * words.num_samples
    return metrics


def _metric(words: SearchOptions, config: TaskConfig) -> str:
    task = run_spec.resolve_run(config).task
    assert task is not None
    if words.metric is not None and words.metric not in task.metrics:
        raise UserError(f'search.metric: {task.name} has no "{words.metric}", it has {", ".join(task.metrics)}')
    return words.metric or task.metrics[0]


def _check_same(folder: Path, searched: Mapping[str, Any]) -> None:
    """Raises UserError when the folder holds another search."""
    if not (folder / "search.toml").exists():
        return
    old, new = (dict(dotted(tables)) for tables in (read_toml(folder / "search.toml"), searched))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder}: holds a search with {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
            "choose another search.name, or remove the folder"
        )


@contextmanager
def _ray(words: SearchOptions) -> Iterator[None]:
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


def _check_room(words: SearchOptions) -> None:
    """Tune would wait without end for a node that can hold a trial."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(words.cpus <= node.get("CPU", 0) and words.gpus <= node.get("GPU", 0) for node in nodes):
        cpus, gpus = (max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UserError(
            f"search.cpus = {words.cpus:g}, search.gpus = {words.gpus:g}: no node can hold such a trial, "
            f"the largest has {cpus:g} CPUs and {gpus:g} GPUs"
        )


def _tuner(config: SearchConfig, trials: list[Trial], metrics: list[str], folder: Path) -> tune.Tuner:
    here, words, configs = os.getcwd(), config.search, [trial.config for trial in trials]

    def run(given: dict[str, int]) -> None:
        os.chdir(here)
        _train(words, configs[given["number"]], metrics[given["number"]])

    trainable = tune.with_resources(run, {"cpu": words.cpus, "gpu": words.gpus})
    state = folder.resolve() / "ray"
    if config.grid:  # complete runs answer at once; Tune would take up the rest in any order
        shutil.rmtree(state, ignore_errors=True)
    elif tune.Tuner.can_restore(state):
        return tune.Tuner.restore(str(state), trainable, resume_unfinished=True, restart_errored=True)
    settings = tune.TuneConfig(
        metric="score",
        mode="max",
        max_concurrent_trials=words.max_concurrent or None,
        reuse_actors=True,  # a process that has loaded its libraries takes the next trial
        scheduler=None if config.grid else _asha(words, configs[0]),
        trial_dirname_creator=lambda trial: configs[trial.config["number"]].run.name,
    )
    names = [config.run.name for config in configs]
    place = tune.RunConfig(
        name=state.name, storage_path=str(state.parent), verbose=0, callbacks=[_Progress(names, metrics)]
    )
    space = {"number": tune.grid_search(list(range(len(trials))))}
    return tune.Tuner(trainable, param_space=space, tune_config=settings, run_config=place)


def _asha(words: SearchOptions, config: TaskConfig) -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="step",
        max_t=10**9,  # ASHA ends no run that its config does not
        grace_period=words.grace_period * config.run.eval_every,
        reduction_factor=words.reduction_factor,
    )


class _Progress(tune.Callback):
    """A line for every evaluation, and for a trial that failed."""

    def __init__(self, names: list[str], metrics: list[str]):
        self.names, self.metrics = names, metrics

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        number = trial.config["number"]
        line = f"{self.names[number]} step {result['step']}  {self.metrics[number]} {result['score']:.4g}"
        print(line, file=sys.stderr, flush=True)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        print(f"{self.names[trial.config['number']]} failed", file=sys.stderr, flush=True)


def _train(words: SearchOptions, config: TaskConfig, metric: str) -> None:
    """A trial, in the process that Tune gave it."""
    if not words.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # Ray hides no GPU from a trial that asked for none
    from lad_dist.training.train import train  # noqa: PLC0415 (deepspeed belongs to the process of the trial)

    threads = max(1, int(words.cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the driver's may be that of a whole node
    torch.set_num_threads(threads)
    told = False

    def tell(row: Mapping[str, Any]) -> None:
        nonlocal told
        if f"dev/{metric}" in row:
            tune.report({"score": row[f"dev/{metric}"], "step": row["step"]})
            told = True

    results = train(config, report=tell).results
    _free_memory()
    if results is None:
        raise Fault(f"{config.run.name} was asked to stop: its last evaluation is not its result")
    if not told:  # complete already, which an interrupted search had not heard of
        tune.report({"score": results["metrics"][metric], "step": results["steps"]})


def _free_memory() -> None:
    """Of a trial, for others: the C library keeps for its process what is freed, and the next trial, in a thread of its
    own, takes other memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _complete(results: list[tune.Result], count: int) -> bool:
    ended = [result for result in results if result.error is not None or (result.metrics or {}).get("done")]
    return len(ended) == count


def _conclude(
    config: SearchConfig, trials: list[Trial], metrics: list[str], results: list[tune.Result], folder: Path
) -> None:
    """Writes results.json, and of a search best.toml. Raises UserError when no trial has a result."""
    rows, failed = [], []
    for result in results:
        if result.error is not None:
            failed.append({"trial": Path(result.path).name, "error": str(result.error).strip().splitlines()[-1]})
            continue
        assert result.metrics is not None
        number = result.metrics["config"]["number"]  # Tune gives a trial that runs again a folder of another name
        trial, last = trials[number], {key: result.metrics[key] for key in ("score", "step")}
        rows.append({"trial": trial.config.run.name, **trial.sample, "metric": metrics[number], **last})
    if not rows:
        raise UserError(f"{folder}: all {len(failed)} trials failed; {failed[0]['trial']}: {failed[0]['error']}")
    rows.sort(key=lambda row: (-row["score"], -row["step"], row["trial"]))
    if not config.grid:
        (best,) = (trial.config for trial in trials if trial.config.run.name == rows[0]["trial"])
        _write_best(rows[0], best, len(trials), folder)
    shutil.rmtree(folder / "teacher_cache", ignore_errors=True)
    write_text(folder / "results.json", json.dumps({"trials": rows, "failed": failed}, indent=2) + "\n")


def _write_best(row: Mapping[str, Any], config: TaskConfig, count: int, folder: Path) -> None:
    teacher = config.teacher and config.teacher.model_copy(update={"cache": None})
    run = config.run.model_copy(update={"name": "best"})
    best = config.model_copy(update={"run": run, "teacher": teacher})
    command = f"# python launch/task_distill.py {folder / 'best.toml'}"
    found = f"# {row['trial']}, the best of {count} trials by {row['metric']} on the dev set"
    write_text(folder / "best.toml", f"{command}\n{found}\n{dump_config(best)}")
