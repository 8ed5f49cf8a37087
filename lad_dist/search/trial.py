"""A trial, and what runs one.

A process of a trial loads this module before it knows what runs the trial: no library for training is imported here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lad_dist.cluster.workers import Report
from lad_dist.config.load import parse_config
from lad_dist.config.schema import TrainConfig, train_schema
from lad_dist.config.search_schema import SearchOptions


@dataclass(frozen=True)
class Trial:
    """Trainings that run one after another.

    Attributes:
        name: of the trial and of the run of its last stage.
        sample: What distinguishes it: choices by axis, values by key.
        stages: The configs of the trainings by the name of the stage.
    """

    name: str
    sample: dict[str, Any]
    stages: dict[str, TrainConfig]

    @property
    def config(self) -> TrainConfig:
        """The config of the last stage."""
        return list(self.stages.values())[-1]

    def labelled(self, label: str) -> "Trial":
        """Return the trial with this run.label of the last stage."""
        name, last = list(self.stages.items())[-1]
        config = last.model_copy(update={"run": last.run.model_copy(update={"label": label})})
        return replace(self, stages={**self.stages, name: config})

    def request(self) -> str:
        """Return the trial as JSON, for the process that runs it."""
        stages = {name: config.model_dump(mode="json", exclude_none=True) for name, config in self.stages.items()}
        return json.dumps({"name": self.name, "sample": self.sample, "stages": stages})

    @classmethod
    def of_request(cls, text: str) -> "Trial":
        """Return the trial of a request."""
        request = json.loads(text)
        stages = {
            name: parse_config(train_schema(tables), tables, name) for name, tables in request.pop("stages").items()
        }
        return cls(stages=stages, **request)


@dataclass(frozen=True)
class TrialRunner:
    """Runs trials; Tune sends it to their processes.

    Attributes:
        options: of the search.
        metrics: that are compared.
        folder: the working directory of the command.
    """

    options: SearchOptions
    metrics: Sequence[str]
    folder: str

    def run(self, trial: Trial, report: Report) -> None:
        """Run a trial; report its scores, and in the end a row with its status.

        Raises:
            RayError: A process of the trial was lost, so the trial has to run again.
        """
        raise NotImplementedError
