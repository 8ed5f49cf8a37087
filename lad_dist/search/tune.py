"""Searches and grids: Ray Tune over a task distillation.

    search(config)   runs a search, or goes on with it -> SearchResult

All trials are sampled and checked before Ray starts (`grid`). A trial is `train` in a process of its own, which reports
its scores to Tune. ASHA stops trials of a space when others do better at the same training step. Trials of a grid are
compared with each other: all of them run to their end.

    <dir>/<name>/search.toml    the search with its base config, as it was started
                 trial-00/ …    an ordinary run folder each, in a grid kd-rte-0; one that ASHA stopped has no
                                results.json and no export
                 teacher_cache/ outputs of the trials' teachers, while the search lasts
                 ray/           Tune's own state, and the traceback of a failed trial in trial-00/error.txt
                 best.toml      the best trial's config, for `lad-dist distill`; not of a grid
                 results.json   all trials, best first; written last: its presence says that the search is complete

A complete search is not run twice; one is complete when every trial has ended, failed ones too. A partial one, or one
whose results.json was removed, goes on: finished trials stay as they are, unfinished and failed ones run again, from
their checkpoints where run.save_every left any; ASHA then compares anew.
"""

import ctypes
import gc
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from lad_dist.cluster.connect import check_trial_fits, ray_cluster
from lad_dist.config.errors import Fault, UserError
from lad_dist.config.load import dump_config, read_toml
from lad_dist.config.schema import SearchConfig, SearchOptions, TaskConfig
from lad_dist.distributed.logs import get_logger
from lad_dist.search.grid import Trial, base_configs, sample_trials
from lad_dist.training import run_spec
from lad_dist.utils import progress
from lad_dist.utils.atomic_io import write_text
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.tables import flatten

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output cannot be silenced
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run folders have it all

TASK_KEYS = {"data.task", "data.train", "data.dev", "data.kind", "data.labels", "data.positive"}

logger = get_logger(__name__)


@dataclass
class SearchResult:
    """The outcome of a search.

    Attributes:
        trials: Rows of trial, choices and sampled values, metric, last score and step; best first.
        failed: Rows of trial and error.
        best: The file with the best config; None for a grid.
    """

    trials: list[dict[str, Any]]
    failed: list[dict[str, str]]
    best: Path | None


def search(config: SearchConfig) -> SearchResult | None:
    """Run a search, or go on with it; None when it was interrupted (SIGINT, SIGUSR1) and has to run again.

    Raises UserError for a base config, an override, a space or a metric that does not fit, before Ray starts.
    """
    options = config.search
    folder = Path(options.dir) / options.name
    trials = sample_trials(config)
    metrics = _check(config, trials)
    bases = {"base": {base: read_toml(base) for base in base_configs(config)}}
    tables = config.model_dump(exclude_none=True) | bases
    _check_same(folder, tables)
    if not (folder / "results.json").exists():
        progress.report(options.name, 0, len(trials), "starting Ray")
        with ray_cluster():
            check_trial_fits(options.cpus, options.gpus)
            write_text(folder / "search.toml", tomli_w.dumps(tables))
            grid = _tuner(config, trials, metrics, folder).fit()
            results = [grid[index] for index in range(len(grid))]
        if not _complete(results, len(trials)):
            return None
        _conclude(config, trials, metrics, results, folder)
    best = None if config.grid else folder / "best.toml"
    return _read_result(folder / "results.json", best)


def _read_result(file: Path, best: Path | None) -> SearchResult:
    try:
        return SearchResult(**parse_json(file.read_text(encoding="utf-8")), best=best)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it and run the search again") from None


def _check(config: SearchConfig, trials: list[Trial]) -> list[str]:
    """Return the metric of each trial.

    Of what takes time to check (data, models, and that the task has the metric), one trial of each combination stands
    for its samples, and one seed for all.
    """
    options, metric_of = config.search, dict[str, str]()
    if not config.grid and not trials[0].config.run.eval_every:
        raise UserError("run.eval_every: trials are compared at their evaluations; set override.run.eval_every")
    if keys := TASK_KEYS & trials[0].sample.keys():
        raise UserError(f"space.{min(keys)}: scores of different tasks cannot be compared; put tasks in [grid]")
    metrics = []
    for trial in trials[:: options.num_samples]:
        text = dump_config(trial.config.model_copy(update={"run": trials[0].config.run}))
        if text not in metric_of:
            metric_of[text] = _metric(options, trial.config)
        metrics += [metric_of[text]] * options.num_samples
    return metrics


def _metric(options: SearchOptions, config: TaskConfig) -> str:
    task = run_spec.resolve_run(config).task
    assert task is not None
    if options.metric is not None and options.metric not in task.metrics:
        raise UserError(f'search.metric: {task.name} has no "{options.metric}", it has {", ".join(task.metrics)}')
    return options.metric or task.metrics[0]


def _check_same(folder: Path, tables: Mapping[str, Any]) -> None:
    """Raise UserError where the folder holds another search."""
    if not (folder / "search.toml").exists():
        return
    old, new = flatten(read_toml(folder / "search.toml")), flatten(tables)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder}: holds a search with {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
            "choose another search.name, or remove the folder"
        )


def _tuner(config: SearchConfig, trials: list[Trial], metrics: list[str], folder: Path) -> tune.Tuner:
    options, configs = config.search, [trial.config for trial in trials]
    working_folder = os.getcwd()

    def run(parameters: dict[str, int]) -> None:
        os.chdir(working_folder)
        _run_trial(options, configs[parameters["number"]], metrics[parameters["number"]])

    trainable = tune.with_resources(run, {"cpu": options.cpus, "gpu": options.gpus})
    state = folder.resolve() / "ray"
    if config.grid:  # complete runs end at once; Tune would resume the rest in any order
        shutil.rmtree(state, ignore_errors=True)
    elif tune.Tuner.can_restore(state):
        return tune.Tuner.restore(str(state), trainable, resume_unfinished=True, restart_errored=True)
    settings = tune.TuneConfig(
        metric="score",
        mode="max",
        max_concurrent_trials=options.max_concurrent or None,
        reuse_actors=True,  # a process that has loaded its libraries takes the next trial
        scheduler=None if config.grid else _asha(options, configs[0]),
        trial_dirname_creator=lambda trial: configs[trial.config["number"]].run.name,
    )
    names = [config.run.name for config in configs]
    callbacks: list[tune.Callback] = [_TrialLogger(options.name, names, metrics)]
    run_config = tune.RunConfig(name=state.name, storage_path=str(state.parent), verbose=0, callbacks=callbacks)
    space = {"number": tune.grid_search(list(range(len(trials))))}
    return tune.Tuner(trainable, param_space=space, tune_config=settings, run_config=run_config)


def _asha(options: SearchOptions, config: TaskConfig) -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="step",
        max_t=10**9,  # no limit: the config of a run ends it, not ASHA
        grace_period=options.grace_period * config.run.eval_every,
        reduction_factor=options.reduction_factor,
    )


class _TrialLogger(tune.Callback):
    """Logs a line for every evaluation, and for a trial that failed; reports how many trials have ended."""

    def __init__(self, search: str, names: list[str], metrics: list[str]):
        self.search, self.names, self.metrics = search, names, metrics

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._report(trials)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._report(trials, trial)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        number = trial.config["number"]
        score = f"{self.metrics[number]} {result['score']:.4g}"
        logger.info("%s step %s  %s", self.names[number], result["step"], score)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        logger.warning("%s failed", self.names[trial.config["number"]])
        self._report(trials, trial)

    def _report(self, trials: Any, last: Any = None) -> None:
        ended = sum(trial is last or trial.is_finished() for trial in trials)  # Tune marks the last one afterwards
        progress.report(self.search, ended, len(self.names), "trials")


def _run_trial(options: SearchOptions, config: TaskConfig, metric: str) -> None:
    """Train a trial, in the process that Tune started for it."""
    if not options.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # Ray hides no GPU from a trial that uses none
    from lad_dist.training.train import RunStatus, train  # noqa: PLC0415 (deepspeed belongs to the process of the trial)

    threads = max(1, int(options.cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the driver's may be that of a whole node
    torch.set_num_threads(threads)
    reported = False

    def report_score(row: Mapping[str, Any]) -> None:
        nonlocal reported
        if f"dev/{metric}" in row:
            tune.report({"score": row[f"dev/{metric}"], "step": row["step"]})
            reported = True

    result = train(config, report=report_score)
    _free_memory()
    if result.status is RunStatus.STOPPED:
        raise Fault(f"{config.run.name} was asked to stop: the last evaluation of a stopped trial is no result")
    if not reported:  # the run was complete already, which an interrupted search did not learn
        assert result.results is not None
        tune.report({"score": result.results["metrics"][metric], "step": result.results["steps"]})


def _free_memory() -> None:
    """Return the memory of a trial to the system.

    The C library keeps for its process what is freed, and the next trial, in a thread of its own, takes other memory.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _complete(results: list[tune.Result], count: int) -> bool:
    return count == sum(result.error is not None or bool((result.metrics or {}).get("done")) for result in results)


def _conclude(
    config: SearchConfig, trials: list[Trial], metrics: list[str], results: list[tune.Result], folder: Path
) -> None:
    """Write results.json, and for a space best.toml; raise UserError where no trial has a result."""
    rows, failed = [], []
    for result in results:
        if result.error is not None:
            failed.append({"trial": Path(result.path).name, "error": str(result.error).strip().splitlines()[-1]})
            continue
        assert result.metrics is not None
        number = result.metrics["config"]["number"]  # Tune gives a trial that runs again a folder of another name
        trial, last = trials[number], {key: result.metrics[key] for key in ("score", "step")}
        if not math.isfinite(last["score"]):  # no order has a place for it
            failed.append({"trial": trial.config.run.name, "error": f"{metrics[number]} is {last['score']}"})
            continue
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
    run = config.run.model_copy(update={"name": "best", "label": config.label.rpartition("-")[0]})  # no sample's number
    best = config.model_copy(update={"run": run, "teacher": teacher})
    command = f"# lad-dist distill {folder / 'best.toml'}"
    origin = f"# {row['trial']}, the best of {count} trials by {row['metric']} on the dev set"
    write_text(folder / "best.toml", f"{command}\n{origin}\n{dump_config(best)}")
