"""Experiment trackers that the rows of a run also go to: Weights & Biases, MLflow.

The run is named as its folder, in a project (MLflow: experiment) named as `run.dir`, unless the tracker's own
environment variables say otherwise. A run that resumes goes on under the same id. It repeats the steps since its
checkpoint, whose rows then occur twice at one step.
"""

import importlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar, Literal

from lad_dist.config.errors import EXIT_FAULT, EXIT_RUN_AGAIN, UserError
from lad_dist.config.schema import TrainConfig
from lad_dist.distributed.logs import get_logger
from lad_dist.utils.atomic_io import write_text
from lad_dist.utils.tables import flatten
from lad_dist.utils.text import one_line

CLOSE_SECONDS = 60.0  # for a tracker to send what it has, after which the run ends without it

Ending = Literal["FINISHED", "KILLED", "FAILED"]  # complete, stopped to go on later, ended by an error: as MLflow says

logger = get_logger(__name__)


class Tracker(ABC):
    """A tracker of one run. A thread makes all calls to it, so that training waits for none and survives each.

    Attributes:
        package: The package to import, which is also the name in `run.trackers`.
    """

    package: ClassVar[str]

    def __init__(self, config: TrainConfig):
        self.config = config
        self.project = Path(config.run.dir).resolve().name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._make_calls, daemon=True)
        self._calls.put(self._open)
        self._thread.start()

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row of metrics, with the step that it is of."""
        self._calls.put(partial(self._log, row))

    def close(self, ending: Ending) -> None:
        """End the run; wait until all is sent."""
        self._calls.put(partial(self._close, ending))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s did not take all rows in %.0f s; metrics.jsonl has them", self.package, CLOSE_SECONDS)

    def _make_calls(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call()
        except Exception as error:  # of whatever kind
            reason = f"{type(error).__name__}: {one_line(error)}"
            logger.warning("%s gets no more rows (%s); metrics.jsonl has all of them", self.package, reason)

    def _open(self) -> None:
        """Begin a run, or go on with the one whose id the run folder has."""
        self.library = importlib.import_module(self.package)
        file = self.config.run.folder / f"{self.package}_run_id"
        known_id = file.read_text().strip() if file.exists() else None
        run_id = self._begin(known_id)
        if known_id is None:
            write_text(file, f"{run_id}\n")

    @abstractmethod
    def _begin(self, run_id: str | None) -> str:
        """Begin a run with the config where there is no id, or go on with that run; return the id."""

    @abstractmethod
    def _log(self, row: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _close(self, ending: Ending) -> None: ...


class Wandb(Tracker):
    """Weights & Biases."""

    package = "wandb"

    def _begin(self, run_id: str | None) -> str:
        config = self.config.model_dump(mode="json", exclude_none=True) if run_id is None else None
        self._run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", self.project),
            name=self.config.run.name,
            dir=str(self.config.run.folder.resolve()),
            id=run_id,
            resume="allow",
            config=config,
            reinit="create_new",  # beside a run of the program that calls `train`
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own steps cannot go back, as a resumed run does
        return str(self._run.id)

    def _log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row))

    def _close(self, ending: Ending) -> None:
        self._run.finish(exit_code={"FINISHED": 0, "KILLED": EXIT_RUN_AGAIN, "FAILED": EXIT_FAULT}[ending])


class MLflow(Tracker):
    """MLflow, where MLFLOW_TRACKING_URI says."""

    package = "mlflow"

    def _begin(self, run_id: str | None) -> str:
        self.library.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", self.project))
        # Nested: beside a run of the program that calls `train`.
        run = self.library.start_run(run_id=run_id, run_name=self.config.run.name, nested=True)
        if run_id is None:
            for name, table in self.config.model_dump(mode="json", exclude_none=True).items():
                self.library.log_params(flatten({name: table}))  # MLflow takes at most 100 at once
        return str(run.info.run_id)

    def _log(self, row: Mapping[str, float]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        self.library.log_metrics(values, step=int(row["step"]))

    def _close(self, ending: Ending) -> None:
        self.library.end_run(status=ending)


TRACKERS: dict[str, type[Tracker]] = {kind.package: kind for kind in (Wandb, MLflow)}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError where the package of a tracker is not installed."""
    for name in names:
        if getattr(find_spec(name), "origin", None) is None:  # a folder wandb/ in the working directory has none
            raise UserError(f'run.trackers: {name} is not installed; pip install "lad_dist[trackers]"')


def start_trackers(config: TrainConfig) -> list[Tracker]:
    """Return the trackers of a run, which begin or go on."""
    return [TRACKERS[name](config) for name in dict.fromkeys(config.run.trackers)]
