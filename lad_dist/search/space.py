"""The space of a search: what Optuna draws, by key of the config.

A table below `[space]` is one of two things. Under the name of a stage it is a distribution of a key:
`task.optim.lr = {loguniform = [1e-5, 1e-3]}`. Under any other name it is an axis of named choices, each with values and
distributions of its own: `method.lad = {task.objective.name = "lad", task.objective.hidden = {uniform = [0.0, 9.0]}}`.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.config.load import lookup
from lad_dist.config.search_schema import LOGARITHMIC_RANGES, WHOLE_RANGES
from lad_dist.utils.suggest import did_you_mean
from lad_dist.utils.tables import flatten

Value = float | int | str | bool


@dataclass(frozen=True)
class Distribution:
    """Values that a key may take.

    Attributes:
        key: Dotted key of the config, or the name of an axis.
        name: One of DISTRIBUTIONS.
        arguments: `[low, high]`, for quniform `[low, high, step]`, for choice the values.
    """

    key: str
    name: str
    arguments: list[Any]

    def suggest(self, trial: Any, parameter: str) -> Value:
        """Draw from an Optuna trial; return the drawn value as Optuna stores it."""
        return DISTRIBUTIONS[self.name](trial, parameter, self.arguments)

    def stored(self, value: Any) -> Value:
        """Return a value as Optuna stores it: that of a choice is a text, as it may be a list or a table."""
        return _choice_text(value) if self.name == "choice" else value

    def value(self, stored: Value) -> Any:
        """Return the value of what Optuna stores."""
        return json.loads(str(stored)) if self.name == "choice" else stored

    def examples(self) -> list[Any]:
        """Return values that stand for all: every choice, or the ends of the range."""
        if self.name == "choice":
            return self.arguments
        low, high = self.arguments[:2]
        return [low, high - 1] if self.name in WHOLE_RANGES else [float(low), float(high)]

    def contains(self, value: Any) -> bool:
        """Return whether the value can be drawn."""
        if self.name == "choice":
            return self.stored(value) in [self.stored(choice) for choice in self.arguments]
        is_whole = self.name in WHOLE_RANGES
        if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
            return False
        return bool(self.arguments[0] <= value <= self.arguments[1] - is_whole)


def _choice_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _choice(trial: Any, parameter: str, values: list[Any]) -> str:
    return str(trial.suggest_categorical(parameter, list(map(_choice_text, values))))


# Draws by Optuna; randint and lograndint leave out the high end, as in Tune.
DISTRIBUTIONS: dict[str, Callable[[Any, str, list[Any]], Value]] = {
    "uniform": lambda trial, name, ends: trial.suggest_float(name, *ends),
    "loguniform": lambda trial, name, ends: trial.suggest_float(name, *ends, log=True),
    "quniform": lambda trial, name, ends: trial.suggest_float(name, *ends[:2], step=ends[2]),
    "randint": lambda trial, name, ends: trial.suggest_int(name, ends[0], ends[1] - 1),
    "lograndint": lambda trial, name, ends: trial.suggest_int(name, ends[0], ends[1] - 1, log=True),
    "choice": _choice,
}


@dataclass(frozen=True)
class Sample:
    """A point of the space.

    Attributes:
        choices: What a person reads: choices by axis, drawn values by key.
        changes: What it changes: values by key, in the order in which they apply.
    """

    choices: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: "Sample") -> "Sample":
        return Sample(self.choices | other.choices, self.changes | other.changes)


@dataclass(frozen=True)
class Space:
    """Distributions, constants and axes.

    Attributes:
        distributions: of keys.
        constants: Values by key, of a choice.
        axes: By name, the space of each choice.
    """

    distributions: list[Distribution]
    constants: dict[str, Any]
    axes: dict[str, dict[str, "Space"]]

    def sample(self, value_of: Callable[[str, Distribution], Any], prefix: str = "") -> Sample:
        """Return the point whose values are those of `value_of(parameter, distribution)`.

        A parameter is a key with the choices that led to it: `method=lad.task.objective.hidden`.
        """
        result = Sample({}, dict(self.constants))
        for axis, choices in self.axes.items():
            chosen = value_of(f"{prefix}{axis}", Distribution(axis, "choice", list(choices)))
            result |= Sample({axis: chosen}) | choices[chosen].sample(value_of, f"{prefix}{axis}={chosen}.")
        for distribution in self.distributions:
            value = value_of(f"{prefix}{distribution.key}", distribution)
            result |= Sample({distribution.key: value}, {distribution.key: value})
        return result

    def suggest(self, trial: Any) -> None:
        """Draw a point from an Optuna trial, which remembers it (Optuna's define-by-run)."""
        self.sample(lambda parameter, distribution: distribution.value(distribution.suggest(trial, parameter)))

    def sample_of(self, parameters: Mapping[str, Value]) -> Sample:
        """Return the point of what Optuna drew, by parameter."""
        return self.sample(lambda parameter, distribution: distribution.value(parameters[parameter]))

    def parameters_of(self, point: Mapping[str, Any], where: str) -> dict[str, Value]:
        """Return what Optuna has to draw for a `[[point]]`; keys that it leaves out are drawn.

        Raises:
            UserError: A key or a value is not of the space, or an axis is left out.
        """
        parameters: dict[str, Value] = {}
        known: set[str] = set()

        def value_of(parameter: str, distribution: Distribution) -> Any:
            known.add(distribution.key)
            if distribution.key not in point:
                if distribution.key in axes:
                    names = ", ".join(distribution.arguments)
                    raise UserError(f"{where}: give {distribution.key}, one of {names}")
                return None
            value = point[distribution.key]
            if not distribution.contains(value):
                given = f"{distribution.name} {distribution.arguments}"
                raise UserError(f"{where}.{distribution.key}: {value!r} is not in the space ({given})")
            parameters[parameter] = distribution.stored(value)
            return value

        axes = self.axis_names()
        self.sample(value_of)
        if unknown := [key for key in point if key not in known]:
            raise UserError(f"{where}.{unknown[0]}: not in the space; {did_you_mean(unknown[0], known)}")
        return parameters

    def corners(self) -> list[Sample]:
        """Return points that together have every choice and both ends of every range: where one fits, all do."""
        result: list[Sample] = []
        first = self.sample(lambda _, distribution: distribution.examples()[0])
        for axis, choices in self.axes.items():
            for name, space in choices.items():
                result += [first | Sample({axis: name}) | corner for corner in space.corners()]
        for distribution in self.distributions:
            for value in distribution.examples():
                result.append(first | Sample({distribution.key: value}, {distribution.key: value}))
        return result or [first]

    def axis_names(self) -> set[str]:
        """Return the names of all axes, also of those below choices."""
        spaces = [space for choices in self.axes.values() for space in choices.values()]
        return {*self.axes, *(name for space in spaces for name in space.axis_names())}

    def keys(self) -> set[str]:
        """Return the keys that are drawn or set, also below choices."""
        spaces = [space for choices in self.axes.values() for space in choices.values()]
        own = {*self.constants, *(distribution.key for distribution in self.distributions)}
        return own.union(*(space.keys() for space in spaces))


def parse_space(tables: Mapping[str, Any], stages: Collection[str], where: str = "space") -> Space:
    """Return the space of the tables of `[space]`, or of a choice in it.

    Raises:
        UserError: A distribution or an axis is wrong.
    """
    distributions: dict[str, Distribution] = {}
    constants: dict[str, Any] = {}
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    for path, value in _leaves(tables).items():
        first, _, rest = path.partition(".")
        if first in stages:
            key, _, name = path.rpartition(".")
            if where != "space" and not (name in DISTRIBUTIONS and isinstance(value, list)):
                constants[path] = value
            else:  # of a key that occurs twice, as by the command line, the last one counts
                distributions[key] = _distribution(f"{where}.{key}", key, name, value, stages)
            continue
        choice, _, inner = rest.partition(".")
        if not choice or not (inner or value == {}):
            raise UserError(
                f"{where}.{first}: no stage has this name ({did_you_mean(first, stages)}), and an axis is a table of "
                "choices"
            )
        choices = axes.setdefault(first, {}).setdefault(choice, {})
        if inner:
            choices[inner] = value
    spaces = {
        axis: {name: parse_space(inner, stages, f"{where}.{axis}.{name}") for name, inner in choices.items()}
        for axis, choices in axes.items()
    }
    return Space(list(distributions.values()), constants, spaces)


def _leaves(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by dotted key; an empty table, which is a choice that changes nothing, is a value too."""
    values = flatten(tables)
    empty: dict[str, Any] = {path: {} for path in _empty_tables(tables, "")}
    return values | empty


def _empty_tables(tables: Mapping[str, Any], prefix: str) -> list[str]:
    paths = []
    for key, value in tables.items():
        if isinstance(value, Mapping):
            paths += _empty_tables(value, f"{prefix}{key}.") if value else [f"{prefix}{key}"]
    return paths


def _distribution(where: str, key: str, name: str, arguments: Any, stages: Collection[str]) -> Distribution:
    if not key or key in stages or (name not in DISTRIBUTIONS and not isinstance(arguments, list)):
        raise UserError(f"{where}.{name}: give a distribution, {{uniform = [low, high]}}; a fixed value is an override")
    lookup(f"{where}: distribution", name, DISTRIBUTIONS)
    place = f"{where}.{name}"
    if not isinstance(arguments, list) or not arguments:
        raise UserError(f"{place}: give a list, [low, high] or for choice the values, not {arguments!r}")
    if name == "choice":
        return Distribution(key, name, arguments)
    count = 3 if name == "quniform" else 2
    kind = int if name in WHOLE_RANGES else int | float
    is_range = len(arguments) == count and all(isinstance(value, kind) for value in arguments)
    if not (is_range and arguments[0] < arguments[1]):  # nan too
        form = "[low, high, step]" if count == 3 else "[low, high]"
        raise UserError(f"{place}: give {form} with low < high, not {arguments!r}")
    if name in LOGARITHMIC_RANGES and arguments[0] <= 0:
        raise UserError(f"{place}: the low end must be above 0, not {arguments[0]!r}")
    if count == 3 and arguments[2] <= 0:
        raise UserError(f"{place}: the step must be above 0, not {arguments[2]!r}")
    return Distribution(key, name, arguments)
