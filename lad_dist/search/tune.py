"""Searches and grids: Ray Tune over the stages of a distillation.

    search(config)   runs a search, or goes on with it -> SearchResult

Optuna draws samples of a space (`sampler`), Tune runs them side by side and stops early what falls behind. Trials of a
grid are compared with each other: all of them run to their end. A trial trains its stages one after another (`trial`).

    <dir>/<name>/search.toml    the search with its base configs, as it was started
                 trials.jsonl   what happened to each trial (`record`)
                 trial-000/ …   the run of a trial's last stage, in a grid kd-rte-0; one that was stopped early has no
                                results.json and no export
                 stages/        runs of other stages, which trials share
                 teacher_cache/ outputs of the trials' teachers, while the search lasts
                 best.toml      the config of the best trial's last stage; not of a grid
                 results.json   all trials, best first, as of the end of the search

The same command goes on wherever the search was when it ended: finished trials are told to Optuna and to the scheduler
again, unfinished ones resume from their checkpoints. With more samples or seeds it goes on too. Failed trials run again
once results.json is removed.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from ray import tune

from lad_dist.cluster.connect import check_folder, check_storage, check_trial_fits, ray_cluster
from lad_dist.config.errors import UserError
from lad_dist.config.load import read_toml
from lad_dist.config.search_schema import SearchConfig, SearchOptions
from lad_dist.distributed.logs import get_logger
from lad_dist.runs.search_record import Status
from lad_dist.search.plan import SearchPlan, plan_search
from lad_dist.search.record import SearchRecord
from lad_dist.search.results import SearchResult, conclude, read_result
from lad_dist.search.schedulers import create_scheduler
from lad_dist.search.training_runner import TrainingRunner
from lad_dist.search.trial import Trial, TrialRunner
from lad_dist.search.trial_queue import StatusCallback, TrialQueue, next_queue
from lad_dist.search.trials import base_configs
from lad_dist.utils import progress
from lad_dist.utils.atomic_io import write_text
from lad_dist.utils.tables import flatten

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output cannot be silenced
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the run folders have it all
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Stop has its own

# Of search.toml: these may change when a search goes on.
CHANGEABLE_OPTIONS = {
    f"search.{name}"
    for name in (
        "num_samples", "num_seeds", "finalists", "max_concurrent", "processes", "cpus", "gpus", "placement_strategy",
        "retries", "hours",
    )
}  # fmt: skip

logger = get_logger(__name__)


class Stop:
    """The wish to end the search before its trials: of a signal, of the time limit, or as going on makes no sense."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = threading.Event()

    def catch_signals(self) -> None:
        """Let signals request the stop; Ray and Tune take them over now and then."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, lambda *_: self.requested.set())

    @contextlib.contextmanager
    def within(self, hours: float | None) -> Iterator[None]:
        """Let signals, and the end of so many hours, request the stop while the context lasts."""
        is_main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in self.SIGNALS} if is_main else {}
        timer = threading.Timer(3600 * (hours or 0), self.requested.set)
        timer.daemon = True
        if hours is not None:
            timer.start()
        self.catch_signals()
        try:
            yield
        finally:
            timer.cancel()
            for number, handler in handlers.items():
                signal.signal(number, handler)


class _Stopper(tune.Stopper):
    def __init__(self, stop: Stop):
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.requested.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes a copy to disk, which nobody reads


def search(config: SearchConfig, runner_class: type[TrialRunner] = TrainingRunner) -> SearchResult | None:
    """Run a search, or go on with it; None when it ended early and has to run again.

    It ends early at SIGINT, SIGTERM or SIGUSR1, at the time limit, and where trials were lost with their machines.

    Args:
        config: of the search.
        runner_class: What runs a trial.

    Raises:
        UserError: A base config, an override, a space or a metric does not fit, before Ray starts; or a trial could
            not begin to train.
    """
    folder = config.search.folder
    check_folder(config.search.dir)
    plan = plan_search(config)
    tables = config.model_dump(exclude_none=True) | {"base": {base: read_toml(base) for base in base_configs(config)}}
    _check_same(folder, tables)
    record = SearchRecord(folder / "trials.jsonl")
    concluded = (folder / "results.json").exists()
    if concluded and not plan.outstanding(record, again=["lost"]):
        return read_result(folder)
    progress.report(config.search.name, 0, plan.count(record), "starting Ray")
    options, stop, mistake = config.search, Stop(), None
    again: list[Status] = ["lost"] if concluded else ["lost", "failed"]
    with stop.within(options.hours), ray_cluster():
        stop.catch_signals()
        check_trial_fits(options.processes, options.cpus, options.gpus, options.placement_strategy)
        check_storage(folder)
        write_text(folder / "search.toml", tomli_w.dumps(tables))
        (folder / "results.json").unlink(missing_ok=True)
        runner = runner_class(options, plan.metrics, os.getcwd())
        while not stop.requested.is_set() and mistake is None:
            queue = next_queue(plan, record, again=again)
            if queue is None:
                break
            mistake = _run(queue, plan=plan, record=record, stop=stop, runner=runner)
            again = []  # not what failed or was lost just now
    if mistake is not None:
        raise UserError(mistake)
    if stop.requested.is_set():
        return None
    lost = [trial.name for trial in record.trials.values() if trial.status == "lost"]
    if lost:
        count = f"{len(lost)} trial{'s' * (len(lost) > 1)}"
        logger.warning("%s: %s lost with process or node, the first is %s", options.name, count, lost[0])
        return None
    return conclude(config, plan, record)


def _run(queue: TrialQueue, *, plan: SearchPlan, record: SearchRecord, stop: Stop, runner: TrialRunner) -> str | None:
    """Run the trials of a queue by Tune until it is empty, or until the stop is requested.

    Returns:
        The user's mistake that ended a trial before it trained, and with it the search; None where there was none.
    """
    options = plan.config.search
    queue.is_ending = stop.requested.is_set
    callback = StatusCallback(plan, record, queue, stop.requested.set)
    state = options.folder.resolve() / "ray"
    shutil.rmtree(state, ignore_errors=True)  # of a session that was killed: the record has all that counts

    def run(parameters: dict[str, str]) -> None:
        runner.run(Trial.of_request(parameters["request"]), tune.report)

    tuner = tune.Tuner(
        tune.with_resources(run, _resources(options)),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # as many as the queue has
            search_alg=queue,
            scheduler=create_scheduler(plan, record) if queue.may_stop else None,
            max_concurrent_trials=options.max_concurrent or None,
            # A process that has loaded its libraries takes the next trial; under ZeRO 3 it would keep a model.
            reuse_actors=plan.zero_stage < 3,
            trial_dirname_creator=lambda trial: queue.name_of(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(state.parent),
            verbose=0,
            callbacks=[callback],
            stop=_Stopper(stop),
            failure_config=tune.FailureConfig(max_failures=options.retries),
        ),
    )
    tuner.fit()
    stop.catch_signals()
    callback.close()
    shutil.rmtree(state, ignore_errors=True)
    if not queue.is_empty:
        stop.requested.set()  # Tune itself took a signal, or a mistake ended the queue
    return callback.mistake or queue.mistake


def _resources(options: SearchOptions) -> Any:
    bundle = {"CPU": options.cpus, "GPU": options.gpus}
    if options.processes == 1:
        return bundle
    # The process of the trial itself only waits.
    return tune.PlacementGroupFactory([{}, *([bundle] * options.processes)], strategy=options.placement_strategy)


def _check_same(folder: Path, tables: Mapping[str, Any]) -> None:
    """Raise UserError where the folder holds another search."""
    if not (folder / "search.toml").exists():
        return
    old, new = flatten(read_toml(folder / "search.toml"), into_lists=True), flatten(tables, into_lists=True)
    changed = sorted(key for key in (old.keys() | new.keys()) - CHANGEABLE_OPTIONS if old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder}: holds a search with {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
            "choose another search.name, or remove the folder"
        )
