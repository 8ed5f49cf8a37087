"""The config of a search: what its trials run, what is drawn, and what a trial gets of a cluster."""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lad_dist.config.schema import ConfigTable, PositiveFloat, PositiveInt

WHOLE_RANGES = ("randint", "lograndint")
LOGARITHMIC_RANGES = ("loguniform", "lograndint")
RANGES = ("uniform", "quniform", "loguniform", *WHOLE_RANGES)


class SearchOptions(ConfigTable):
    """`[search]`: what a search optimises, how it samples, and what a trial gets of the cluster."""

    name: str = Field(description="name of the search's folder")
    dir: str = Field("runs", description="folder of the search folders; every node sees it")
    metric: str | list[str] | None = Field(
        None,
        description="what is optimised, several for a front: a metric of the dev set, label_loyalty, "
        "probability_loyalty, teacher_pearson, loss, parameters, flops, bytes or latency; default: the task's first "
        "metric",
    )
    algorithm: Literal["random", "tpe", "nsga2"] = Field(
        "tpe", description="sampler of Optuna, which draws the samples"
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="rule of Tune that stops samples early; none with several metrics"
    )
    num_samples: PositiveInt = Field(
        16, description="samples of the space; the first is the base config, then come those of [[point]]"
    )
    num_seeds: PositiveInt = Field(1, description="seeds of the best samples; the mean over them decides")
    finalists: PositiveInt = Field(3, description="best samples that run with all seeds")
    max_concurrent: int = Field(0, ge=0, description="trials at once; 0: as many as the cluster holds")
    processes: PositiveInt = Field(1, description="processes of one trial, trained by DeepSpeed together")
    cpus: PositiveFloat = Field(1.0, description="CPU cores of each process")
    gpus: float = Field(0.0, ge=0, description="GPUs of each process; a fraction shares one between trials")
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        "PACK", description="where Ray places a trial's processes: STRICT_PACK on one node, PACK on few, SPREAD on many"
    )
    retries: int = Field(2, ge=0, description="times that a trial runs again after the loss of a process or node")
    hours: PositiveFloat | None = Field(
        None, description="time after which the search stops like at a signal; the same command goes on"
    )
    grace_period: PositiveInt = Field(1, description="evaluations before a trial may be stopped early")
    reduction_factor: int = Field(3, ge=2, description="ASHA keeps one in so many at each rung")
    seed: int = Field(0, ge=0, description="seed of the samples")

    @property
    def folder(self) -> Path:
        """The folder of the search."""
        return Path(self.dir) / self.name


class StageConfig(ConfigTable):
    """`[[stage]]`: one training of a trial; stages run one after another."""

    name: str = Field(pattern=r"^[A-Za-z]\w*$", description="name, with which the stage's keys begin: task.optim.lr")
    base: str | None = Field(
        None, description="config of a pre-training or of a task, which trials change; none: a choice gives NAME.base"
    )


class SearchConfig(ConfigTable):
    """The config of tune. A path of `stage:NAME` is the student that another stage exports."""

    search: SearchOptions
    stage: list[StageConfig] = Field(min_length=1, description="the trainings of a trial, in their order")
    override: dict[str, Any] = Field({}, description='fixed changes: "task.data.task" = "rte"')
    grid: dict[str, dict[str, dict[str, Any]]] = Field(
        {},
        description='choices to compare: axis.choice = {"task.data.task" = "rte"}; NAME.base: another config',
    )
    space: dict[str, Any] = Field(
        {},
        description='distributions to sample: "task.optim.lr" = {loguniform = [1e-5, 1e-3]}; uniform, quniform, '
        "randint, lograndint, choice; axis.choice = {…}: a separate space for each choice",
    )
    point: list[dict[str, Any]] = Field(
        [], description='samples that are tried first: "task.optim.lr" = 1e-4; the base config always is'
    )
    limit: dict[Literal["parameters", "flops", "bytes"], PositiveFloat] = Field(
        {}, description="most that a sample's student may have; larger ones are not trained"
    )

    @model_validator(mode="after")
    def _something_to_try(self) -> Self:
        if bool(self.grid) == bool(self.space):
            raise ValueError("give [grid] to compare every combination, or [space] to sample; one of the two")
        samples = {"search.num_seeds": self.search.num_seeds > 1,
                   "point": bool(self.point), "limit": bool(self.limit)}  # fmt: skip
        if not self.space and any(samples.values()):
            raise ValueError(f"{next(key for key, is_set in samples.items() if is_set)}: goes with a [space]")
        if len(self.metrics) > 1 and self.grid:
            raise ValueError("search.metric: a grid is compared by one metric; the report shows all")
        for axis, choices in self.grid.items():
            wrong = [name for name in choices if not re.fullmatch(r"\w[\w.]*", name)]
            if not choices or wrong:
                raise ValueError(f"grid.{axis}: give choices whose names are letters, digits, _ and dots")
        return self

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if repeated := [name for number, name in enumerate(self.stages) if name in self.stages[:number]]:
            raise ValueError(f'stage: two are named "{repeated[0]}"')
        return self

    @property
    def stages(self) -> list[str]:
        """The names of the stages, in their order."""
        return [stage.name for stage in self.stage]

    @property
    def metrics(self) -> list[str]:
        """The metrics as they are set; none where the task's first one is meant."""
        metric = self.search.metric
        return [metric] if isinstance(metric, str) else metric or []
