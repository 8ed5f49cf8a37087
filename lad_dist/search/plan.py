"""What a search runs: checked before Ray starts, and after each session what is left of it."""

import importlib.util
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.config.load import dump_config
from lad_dist.config.search_schema import SearchConfig
from lad_dist.runs.search_record import Status, TrialState, cost
from lad_dist.search import metrics
from lad_dist.search.record import SearchRecord
from lad_dist.search.space import Space, Value, parse_space
from lad_dist.search.trial import Trial
from lad_dist.search.trials import TrialBuilder, grid_trials, is_ready
from lad_dist.training import run_spec
from lad_dist.training.run_spec import RunSpec
from lad_dist.utils.tables import flatten

TASK_KEYS = {"data.task", "data.train", "data.dev", "data.kind", "data.label", "data.labels", "data.positive"}
DIGITS = 3  # of a sample's number


@dataclass(frozen=True)
class SearchPlan:
    """The trials of a grid, or the space and the first points of a search.

    Attributes:
        config: of the search.
        metrics: that trials report; of a space, those that are optimised.
        metric_of: The metric by which a trial of a grid is compared, by name.
        trials: of a grid.
        space: None of a grid.
        points: What is drawn first, by parameter.
        base_sample: What the base config says of the keys that are drawn, where it is outside of the space. None where
            it is the first of `points`.
        evaluation_steps: Steps between evaluations of the last stage; 0 where there is one at the end only.
        steps: of the last stage, as far as they are known before it begins.
        zero_stage: The highest ZeRO stage of a training.
    """

    config: SearchConfig
    metrics: list[str]
    metric_of: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    space: Space | None = None
    points: list[dict[str, Value]] = field(default_factory=list)
    base_sample: dict[str, Any] | None = None
    evaluation_steps: int = 0
    steps: int | None = None
    zero_stage: int = 0

    @property
    def directions(self) -> dict[str, str]:
        """By metric: "max" or "min"."""
        return {metric: metrics.direction(metric) for metric in self.metrics}

    def metric(self, trial: str) -> str:
        """Return the metric that decides about a trial."""
        return self.metric_of.get(trial, self.metrics[0])

    def build(self, state: TrialState) -> Trial:
        """Return the trial of what is recorded of it; raise UserError where it does not fit the schema of a run."""
        if self.space is None:
            return next(trial for trial in self.trials if trial.name == state.name)
        changes: dict[str, Any] = {}
        if state.parameters is not None:
            changes = self.space.sample_of(state.parameters).changes
        trial = TrialBuilder(self.config).build(state.name, state.sample, changes.items(), seed=state.seed)
        return trial.labelled(f"{trial.config.label}-{state.name.split('-')[1]}")

    def excess(self, trial: Trial) -> str | None:
        """Return in words which of the limits a trial's student exceeds, None where it keeps to all."""
        if not self.config.limit:
            return None
        config = _counted_stage(trial, self.config)
        sizes = metrics.student_sizes(run_spec.resolve_run(config, self.config.search.processes))
        return metrics.largest_excess(sizes, dict(self.config.limit.items()))

    def samples(self, record: SearchRecord) -> list[TrialState]:
        """Return the trials of samples, without their repetitions with other seeds, in the order of their numbers."""
        return [trial for trial in record.trials.values() if trial.seed == 0]

    def num_drawn(self, record: SearchRecord) -> int:
        """Return how many samples count towards `search.num_samples`."""
        return sum(trial.status != "refused" for trial in self.samples(record))

    def is_final(self, trial: TrialState, *, again: Collection[Status]) -> bool:
        """Return whether a trial does not run again, as one does that ended in one of the ways of `again`."""
        return trial.status is not None and trial.status not in again

    def unfinished(self, record: SearchRecord, *, again: Collection[Status]) -> list[TrialState]:
        """Return the trials that are known and have to run, in their order."""
        if self.space is None:
            known = [record.trials.get(t.name) or TrialState(t.name, t.sample) for t in self.trials]
        else:
            known = self.samples(record)
        return [trial for trial in known if not self.is_final(trial, again=again)]

    def repetitions(self, record: SearchRecord, *, again: Collection[Status]) -> list[TrialState]:
        """Return the trials of the best samples with further seeds that have to run."""
        options = self.config.search
        if options.num_seeds == 1:
            return []
        result = []
        for sample in self.best_samples(record)[: options.finalists]:
            for seed in range(1, options.num_seeds):
                name = f"{sample.name}-seed{seed}"
                trial = record.trials.get(name) or TrialState(name, sample.sample, sample.parameters, seed)
                if not self.is_final(trial, again=again):
                    result.append(trial)
        return result

    def best_samples(self, record: SearchRecord) -> list[TrialState]:
        """Return the samples that trained to their end, best first by their first seed."""
        metric = self.metrics[0]
        complete = [trial for trial in self.samples(record) if trial.status == "completed" and metric in trial.values]
        return sorted(complete, key=lambda trial: (cost(metric, trial.values[metric]), trial.name))

    def samples_left(self, record: SearchRecord) -> int:
        """Return how many samples have yet to be drawn."""
        return 0 if self.space is None else max(0, self.config.search.num_samples - self.num_drawn(record))

    def outstanding(self, record: SearchRecord, *, again: Collection[Status]) -> bool:
        """Return whether anything has to run."""
        if self.unfinished(record, again=again) or self.samples_left(record):
            return True
        return bool(self.space is not None and self.repetitions(record, again=again))

    def count(self, record: SearchRecord) -> int:
        """Return the number of trials in the end, as far as it is known."""
        if self.space is None:
            return len(self.trials)
        options = self.config.search
        refused = sum(trial.status == "refused" for trial in self.samples(record))
        finalists = min(options.finalists, options.num_samples)
        return options.num_samples + refused + finalists * (options.num_seeds - 1)


def plan_search(config: SearchConfig) -> SearchPlan:
    """Check a search; return what it runs.

    Of what takes time to check (data, models, and that the task has the metric), one trial stands for those that differ
    in the seed alone, and the base config for the samples of a space.

    Raises:
        UserError: Something does not fit.
    """
    return _plan_grid(config) if config.grid else _plan_space(config)


def _plan_grid(config: SearchConfig) -> SearchPlan:
    trials = grid_trials(config)
    metric_of_text: dict[str, str] = {}
    metric_of = {}
    for trial in trials:
        run = trial.config.run.model_copy(update={"name": "", "label": None, "seed": 0})
        text = dump_config(trial.config.model_copy(update={"run": run}))
        if text not in metric_of_text:
            metric_of_text[text] = _check_trial(config, trial)[0][0]
        metric_of[trial.name] = metric_of_text[text]
    return SearchPlan(
        config, list(dict.fromkeys(metric_of.values())), metric_of, trials, zero_stage=_zero_stage(trials)
    )


def _plan_space(config: SearchConfig) -> SearchPlan:
    if importlib.util.find_spec("optuna") is None:
        raise UserError('space: is drawn by Optuna, which is not installed; pip install "lad_dist[search]"')
    space = parse_space(config.space, config.stages)
    builder = TrialBuilder(config)
    base = builder.build(_sample_name(0), {}, ())
    last = list(base.stages)[-1]
    options = config.search
    if keys := {f"{last}.{key}" for key in TASK_KEYS} & space.keys():
        raise UserError(f"space.{min(keys)}: scores of different tasks cannot be compared; put tasks in [grid]")
    corners = [builder.build(_sample_name(0), each.choices, each.changes.items()) for each in space.corners()]
    names, spec = _check_trial(config, base)
    if len(names) > 1:
        _check_front(config)
    elif options.scheduler != "none" and not base.config.run.eval_every:
        raise UserError(
            f"run.eval_every: trials are compared at their evaluations; set override.{last}.run.eval_every, or "
            'search.scheduler = "none"'
        )
    base_point = _base_point(base, space)
    points = [space.parameters_of(flatten(point), f"point.{number}") for number, point in enumerate(config.point)]
    plan = SearchPlan(
        config,
        names,
        space=space,
        points=[*([base_point] if base_point is not None else []), *points],
        base_sample=_base_values(base, space) if base_point is None else None,
        evaluation_steps=base.config.run.eval_every,
        steps=_num_steps(base, spec) if options.scheduler == "asha" else None,
        zero_stage=_zero_stage([base, *corners]),
    )
    plan.excess(base)  # refuses a limit that cannot be counted
    return plan


def _check_front(config: SearchConfig) -> None:
    """Raise UserError for what needs one order of the samples, which several metrics do not give."""
    if config.search.num_seeds > 1:
        raise UserError("search.num_seeds: with several metrics no sample is the best; leave it at 1")


def _check_trial(config: SearchConfig, trial: Trial) -> tuple[list[str], RunSpec | None]:
    """Check the trainings of a trial as far as their models are there; return its metrics, and its last RunSpec."""
    specs = {
        name: run_spec.resolve_run(stage, config.search.processes)
        for name, stage in trial.stages.items()
        if is_ready(stage, config.search.folder)
    }
    last = specs.get(list(trial.stages)[-1])
    return metrics.checked_metrics(config.metrics, trial.config, last), last


def _zero_stage(trials: Iterable[Trial]) -> int:
    return max(stage.zero_stage for trial in trials for stage in trial.stages.values())


def _counted_stage(trial: Trial, config: SearchConfig) -> Any:
    """Return the config whose student is counted: the last stage's, or the one whose student it takes whole.

    Raises:
        UserError: The last stage cuts a student that is not there yet.
    """
    last = trial.config
    if is_ready(last, config.search.folder):
        return last
    source = next(
        (stage for stage in trial.stages.values() if str(stage.run.folder / "export") == last.student.path), None
    )
    if source is None or last.student.num_hidden_layers is not None or last.student.is_narrowed or last.compression:
        raise UserError(
            "limit: the last stage cuts the student of a stage that has not run, so nothing can be counted; remove "
            "[limit]"
        )
    return source


def _base_point(base: Trial, space: Space) -> dict[str, Value] | None:
    """Return the base config as a point of the space, None where it is not in it."""
    values = _base_values(base, space)
    is_inside = all(each.key in values and each.contains(values[each.key]) for each in space.distributions)
    return space.parameters_of(values, "base") if is_inside and not space.axes else None


def _base_values(base: Trial, space: Space) -> dict[str, Any]:
    """Return what the base config says of the keys that are drawn."""
    values = {
        f"{name}.{key}": value
        for name, stage in base.stages.items()
        for key, value in flatten(stage.model_dump(exclude_none=True), into_lists=True).items()
    }
    return {each.key: values[each.key] for each in space.distributions if each.key in values}


def _num_steps(base: Trial, spec: RunSpec | None) -> int | None:
    """Return the steps of the last stage; None where only what another stage exports says how many they are."""
    if base.config.run.steps is not None or spec is None:
        return base.config.run.steps
    return spec.num_steps(spec.dataset())


def _sample_name(number: int) -> str:
    return f"trial-{number:0{DIGITS}}"


def next_name(record: SearchRecord) -> str:
    """Return the name of the sample that begins next."""
    return _sample_name(sum(trial.seed == 0 for trial in record.trials.values()))
