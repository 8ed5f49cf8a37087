"""Which runs are one method.

A method is an objective, or one variant of it. Variants are runs of one objective that differ on one task in more than
their seed; the fewest keys that tell them apart on every task name them. Where some take several keys, all methods are
called by the names of their runs, as a search gives them, if these tell them apart: lada_2 of lada_2-mrpc-0. A key that
differs from task to task alone makes no variant. Paths that differ in the task's name or the seed alone are one,
`runs/first-{task}-{seed}/export`; a student that starts from its own teacher starts from `teacher`.

generic(runs)     settings without the run's own teacher, task and seed
variants(runs)    methods by name
words_of(run)     its name without task and seed
differing(runs)   the keys in which runs differ
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from lad_dist.report.results import TaskRun


class Variant(NamedTuple):
    """The runs of one objective in which the telling keys have these values."""

    objective: str
    telling: tuple[tuple[str, Hashable], ...]
    runs: list[TaskRun]


def variants(runs: Sequence[TaskRun]) -> dict[str, Variant]:
    """Methods by the shortest names that tell them apart."""
    by_objective = grouped(runs, lambda run: run.objective)
    named: dict[str, Variant] = {}
    for objective, same in by_objective.items():
        keys = _telling(same)
        groups = grouped(same, partial(_values, keys=keys))
        names = _names(objective, keys, list(groups))
        for name, (values, group) in zip(names, groups.items(), strict=True):
            named[name] = Variant(objective, tuple(zip(keys, values, strict=True)), group)
    if all(len(variant.telling) <= 1 for variant in named.values()):
        return named
    called = {_called(variant): variant for variant in named.values()}
    return called if "" not in called and len(called) == len(named) else named


def words_of(run: TaskRun) -> list[str]:
    """lad and low of lad-low-mrpc-0."""
    return [word for word in run.name.split("-") if word not in (run.task, str(run.seed))]


def _called(variant: Variant) -> str:
    """What all its runs are called beside task and seed; "" where they do not agree."""
    names = {"-".join(words_of(run)) for run in variant.runs}
    return names.pop() if len(names) == 1 else ""


def grouped(runs: Iterable[TaskRun], key: Callable[[TaskRun], Hashable]) -> dict[Any, list[TaskRun]]:
    groups: dict[Any, list[TaskRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _values(run: TaskRun, keys: Sequence[str]) -> tuple[Hashable, ...]:
    return tuple(run.settings.get(key) for key in keys)


def _kinds(runs: Iterable[TaskRun], keys: Sequence[str]) -> dict[str, int]:
    """How many kinds of runs the keys tell apart, by task."""
    columns = grouped(runs, lambda run: run.task)
    return {task: len({_values(run, keys) for run in column}) for task, column in columns.items()}


def differing(runs: Sequence[TaskRun]) -> list[str]:
    """The keys in which runs on one task differ."""
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if max(_kinds(runs, [key]).values()) > 1]


def _telling(runs: Sequence[TaskRun]) -> list[str]:
    """Few keys that tell apart on each task what all keys do. Those that tell least are left away first, then those
    that have the most values over all tasks, then those outside [objective]."""
    keys = differing(runs)
    whole = _kinds(runs, keys)

    def worth(key: str) -> tuple[Any, ...]:
        values = {run.settings.get(key) for run in runs}
        return sum(_kinds(runs, [key]).values()), -len(values), key.startswith("objective."), key

    for key in sorted(keys, key=worth):
        rest = [other for other in keys if other != key]
        keys = rest if _kinds(runs, rest) == whole else keys
    return keys


def _names(objective: str, keys: Sequence[str], groups: Sequence[tuple[Hashable, ...]]) -> list[str]:
    words = distinct_suffixes([key.replace(".", "/") for key in keys])
    short = [words[key.replace(".", "/")].replace("/", ".") for key in keys]
    texts = [_texts([values[column] for values in groups]) for column in range(len(keys))]
    rows = list(zip(*texts, strict=True)) or [()]
    return [" ".join([objective, *(f"{key}={text}" for key, text in zip(short, row, strict=True))]) for row in rows]


def _texts(values: Sequence[Hashable]) -> list[str]:
    """Short texts that differ where the values do."""
    ends = distinct_suffixes([value for value in values if isinstance(value, str)])
    short = [ends[value] if isinstance(value, str) else text_of(value) for value in values]
    return short if len(set(short)) == len(set(values)) else [str(value) for value in values]


def text_of(value: Hashable) -> str:
    """A setting for a person: 1e-05, true, none, [1,3]."""
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else str(value).lower()


def distinct_suffixes(paths: Iterable[str]) -> dict[str, str]:
    """Each path by its last parts, as many as tell all of them apart."""
    parts = {path: path.split("/") for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0)):
        ends = {path: "/".join(part[-count:]) for path, part in parts.items()}
        if len(set(ends.values())) == len(parts):
            return ends
    return {path: path for path in parts}


def generic_settings(runs: Sequence[TaskRun]) -> list[TaskRun]:
    """The runs with settings that do not name the run's own teacher, task or seed."""
    settings = [dict(run.settings) for run in runs]
    for key in {key for one in settings for key in one}:
        values = [one.get(key) for one in settings]
        if key != "teacher.path":
            values = [
                "teacher" if value is not None and value == run.teacher else value
                for value, run in zip(values, runs, strict=True)
            ]
        values = _without_own(values, [run.task for run in runs], "{task}")
        values = _without_own(values, [str(run.seed) for run in runs], "{seed}")
        for one, value in zip(settings, values, strict=True):
            one[key] = value
    return [replace(run, settings=one) for run, one in zip(runs, settings, strict=True)]


def _without_own(values: Sequence[Hashable], words: Sequence[str], mark: str) -> list[Hashable]:
    """`mark` in place of each run's own word, where several runs then agree and no run has another's word."""
    marked = [_marked(value, word, mark) for value, word in zip(values, words, strict=True)]
    foreign = {value for value, new in zip(values, marked, strict=True) if new == value}
    refused = {new for value, new in zip(values, marked, strict=True) if value in foreign}
    users: dict[Hashable, set[str]] = defaultdict(set)
    for new, word in zip(marked, words, strict=True):
        users[new].add(word)
    return [
        new if len(users[new]) > 1 and new not in refused else value for value, new in zip(values, marked, strict=True)
    ]


def _marked(value: Hashable, word: str, mark: str) -> Hashable:
    if not isinstance(value, str):
        return value
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", mark, value)
