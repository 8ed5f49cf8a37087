"""Samples of a space, drawn by Optuna through Ray Tune's searcher."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from lad_dist.search.space import Sample, Space, Value
from lad_dist.utils.rng import derive_key

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("ray.tune.search.optuna.optuna_search").setLevel(logging.ERROR)

ALGORITHMS: dict[str, Callable[[int], BaseSampler]] = {
    "random": RandomSampler,
    # While other trials run, a region is not drawn from twice.
    "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
}


class SeededByTrial(BaseSampler):
    """An Optuna sampler whose random numbers are a function of (seed, number of the trial).

    So a search that goes on draws what it would have drawn without the interruption.
    """

    def __init__(self, algorithm: str, seed: int):
        self._algorithm = algorithm
        self._seed = seed
        self._samplers: dict[int, BaseSampler] = {}

    def _of(self, trial: Any) -> BaseSampler:
        if trial.number not in self._samplers:
            seed = derive_key(self._seed, trial.number) % 2**32
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._samplers[trial.number] = ALGORITHMS[self._algorithm](seed)
        return self._samplers[trial.number]

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """Return the parameters that are drawn together."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        """Draw the parameters that are drawn together."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """Draw one parameter."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        """Prepare for the parameters of a trial."""
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Sequence[float] | None) -> None:
        """Learn from a trial that ended."""
        self._of(trial).after_trial(study, trial, state, values)
        self._samplers.pop(trial.number, None)


class SpaceSampler:
    """Draws samples, and learns what became of them.

    Args:
        space: What is drawn.
        algorithm: One of ALGORITHMS.
        directions: "max" or "min" by metric.
        seed: of the samples.
        points: What is drawn first, by parameter.
    """

    def __init__(
        self,
        space: Space,
        algorithm: str,
        directions: Mapping[str, str],
        seed: int,
        points: Sequence[Mapping[str, Value]] = (),
    ):
        self._space = space
        self._metrics = list(directions)
        single = len(directions) == 1
        self._searcher = OptunaSearch(
            space.suggest,
            metric=self._metrics[0] if single else self._metrics,
            mode=directions[self._metrics[0]] if single else list(directions.values()),
            sampler=SeededByTrial(algorithm, seed),
            points_to_evaluate=[dict(point) for point in points],
        )

    def draw(self, name: str) -> tuple[dict[str, Value], Sample]:
        """Draw the sample of a trial; return its parameters, and what they stand for."""
        with _quiet():
            parameters = self._searcher.suggest(name)
        assert parameters is not None
        return parameters, self._space.sample_of(parameters)

    def learn(self, name: str, values: Mapping[str, float] | None) -> None:
        """Take in the last values of a trial; None of one without any: it failed, or was too large to train."""
        complete = values is not None and all(metric in values for metric in self._metrics)
        self._searcher.on_trial_complete(name, dict(values) if complete and values else None, error=not complete)


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence Optuna's remarks: on a step that does not divide a range, on a slow first draw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
