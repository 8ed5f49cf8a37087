"""Hyper-parameter search: Ray Tune over a task distillation. The only importer of ray.

A trial is `train` in its own process, with the sampled values as overrides of the base config and Tune's `report` in
place of the console's, so that ASHA sees every evaluation. It leaves an ordinary run folder under <dir>/<name>/. At
the end the best config stands in <dir>/<name>/best.toml, ready for launch/task_distill.py, and the table of trials in
results.json.

    search(config)   runs it -> Found
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from lad_dist import plan
from lad_dist.config import Search, SearchConfig, TaskConfig, UserError, dump, override, parse, pick, read

DISTRIBUTIONS = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint, "choice": tune.choice}


@dataclass
class Found:
    """`trials` are rows of sampled values, last metric and steps, best first; `best` is the file with the best
    config."""

    trials: list[dict[str, Any]]
    best: Path


def search(config: SearchConfig) -> Found:
    """Searches. Raises UserError for a base config, an override or a space that does not fit, before Ray starts."""
    words = config.search
    base = override(read(words.base), config.override.items())
    space = {key: _distribution(key, table) for key, table in config.space.items()}
    folder = Path(words.dir).resolve() / words.name
    _check(words, base, {key: domain.sample() for key, domain in space.items()}, folder)
    _start_ray(words)
    try:
        results = _tuner(words, base, space, folder).fit()
        return _collect(config, base, results, folder)
    finally:
        ray.shutdown()


def _distribution(key: str, table: Mapping[str, Any]) -> Any:
    if len(table) != 1:
        raise UserError(f'space."{key}": give one of {", ".join(DISTRIBUTIONS)}')
    (name, arguments), *_ = table.items()
    make = pick(f'space."{key}": distribution', name, DISTRIBUTIONS)
    if not isinstance(arguments, list) or (name != "choice" and len(arguments) != 2):
        raise UserError(f'space."{key}".{name}: give a list, [low, high] or for choice the values, not {arguments!r}')
    return make(arguments) if name == "choice" else make(*arguments)


def _check(words: Search, base: Mapping[str, Any], sample: Mapping[str, Any], folder: Path) -> None:
    """One sample stands for all: what it names and how it types must be right before a cluster is taken."""
    made = plan.make(_trial_config(words, base, sample, folder, "trial"))
    assert made.task is not None
    if words.metric not in made.task.metrics:
        raise UserError(
            f'search.metric: {made.task.name} has no "{words.metric}", it has {", ".join(made.task.metrics)}'
        )


def _trial_config(
    words: Search, base: Mapping[str, Any], sample: Mapping[str, Any], folder: Path, name: str
) -> TaskConfig:
    place = {"run.name": name, "run.dir": str(folder)}
    return parse(TaskConfig, override(base, [*sample.items(), *place.items()]), where=words.base)


def _start_ray(words: Search) -> None:
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"_temp_dir": tempfile.mkdtemp(prefix="ray-"), "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)


def _tuner(words: Search, base: Mapping[str, Any], space: dict[str, Any], folder: Path) -> Any:
    here = os.getcwd()

    def trial(sample: dict[str, Any]) -> None:
        from lad_dist.train import train  # noqa: PLC0415 (deepspeed belongs to the trial's process)

        os.chdir(here)
        config = _trial_config(words, base, sample, folder, tune.get_context().get_trial_name())
        train(config, report=lambda row: _tell(words.metric, row))

    trainable = tune.with_resources(trial, {"cpu": words.cpus, "gpu": words.gpus})
    scheduler = ASHAScheduler(
        time_attr="step", max_t=10**9, grace_period=_grace(words, base), reduction_factor=words.reduction
    )
    settings = tune.TuneConfig(
        metric=words.metric,
        mode="max",
        num_samples=words.samples,
        max_concurrent_trials=words.concurrent or None,
        scheduler=scheduler,
        trial_dirname_creator=lambda trial: trial.trial_id,
        trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
    )
    verbosity = tune.RunConfig(name=f"{words.name}-ray", storage_path=str(folder), verbose=1)
    return tune.Tuner(trainable, param_space=space, tune_config=settings, run_config=verbosity)


def _grace(words: Search, base: Mapping[str, Any]) -> int:
    every = base.get("run", {}).get("eval_every", 0)
    if not every:
        raise UserError('run.eval_every: a search stops trials by their evaluations; set override."run.eval_every"')
    return int(every) * words.grace


def _tell(metric: str, row: Mapping[str, Any]) -> None:
    if f"dev/{metric}" in row:
        tune.report({metric: row[f"dev/{metric}"], "step": row["step"]})


def _collect(config: SearchConfig, base: Mapping[str, Any], results: Any, folder: Path) -> Found:
    words, rows = config.search, []
    for result in results:
        if result.error is not None or words.metric not in (result.metrics or {}):
            continue
        last = {name: result.metrics[name] for name in (words.metric, "step", "trial_id")}
        rows.append({**result.config, **last})
    if not rows:
        raise UserError(
            f"{folder}: no trial of {len(results)} ended with a result; their logs are in {folder}/{words.name}-ray"
        )
    rows.sort(key=lambda row: -row[words.metric])
    sample = {key: value for key, value in rows[0].items() if key in config.space}
    best_file = folder / "best.toml"
    chosen = _trial_config(words, base, sample, folder, "best")
    best_file.write_text(f"# best of {len(results)} trials by {words.metric} on the dev set\n" + dump(chosen))
    failed = len(results) - len(rows)
    (folder / "results.json").write_text(json.dumps({"trials": rows, "failed": failed}, indent=2) + "\n")
    return Found(rows, best_file)
