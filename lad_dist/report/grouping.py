"""Which runs are one method, and what the method is called.

A method is an objective, or one variant of it. Variants are runs of one objective that differ on one task in more than
their seed. The fewest keys that distinguish them on every task name them. Where some take several keys, all methods
have the names of their runs, as a search writes them, if these names distinguish them: lada_2 of lada_2-mrpc-0. A key
that differs from task to task alone makes no variant. Paths that differ in the task's name or the seed alone are one,
`runs/first-{task}-{seed}/export`. A student that starts from its own teacher starts from `teacher`.

generic_settings(runs)   settings without the run's own teacher, task and seed
variants(runs)           methods by name
name_words(run)          the words of a run's name without task and seed
differing_keys(runs)     the keys in which runs differ
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from lad_dist.report.results import TaskRun


class Variant(NamedTuple):
    """The runs of one objective in which the keys that distinguish its variants have these values."""

    objective: str
    distinction: tuple[tuple[str, Hashable], ...]
    runs: list[TaskRun]


def variants(runs: Sequence[TaskRun]) -> dict[str, Variant]:
    """Return the methods by the shortest names that distinguish them."""
    by_objective = group_runs(runs, lambda run: run.objective)
    by_settings: dict[str, Variant] = {}
    for objective, objective_runs in by_objective.items():
        keys = _distinguishing_keys(objective_runs)
        groups = group_runs(objective_runs, partial(_values, keys=keys))
        names = _variant_names(objective, keys, list(groups))
        for name, (values, group) in zip(names, groups.items(), strict=True):
            by_settings[name] = Variant(objective, tuple(zip(keys, values, strict=True)), group)
    if all(len(variant.distinction) <= 1 for variant in by_settings.values()):
        return by_settings
    by_run_name = {_common_name(variant): variant for variant in by_settings.values()}
    return by_run_name if "" not in by_run_name and len(by_run_name) == len(by_settings) else by_settings


def name_words(run: TaskRun) -> list[str]:
    """Return the words of a run's name without task and seed: lad and low of lad-low-mrpc-0."""
    return [word for word in run.name.split("-") if word not in (run.task, str(run.seed))]


def _common_name(variant: Variant) -> str:
    """Return the name that all runs share without task and seed; "" where they do not agree."""
    names = {"-".join(name_words(run)) for run in variant.runs}
    return names.pop() if len(names) == 1 else ""


def group_runs(runs: Iterable[TaskRun], key: Callable[[TaskRun], Hashable]) -> dict[Any, list[TaskRun]]:
    """Return the runs by the value of the key, in order."""
    groups: dict[Any, list[TaskRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _values(run: TaskRun, keys: Sequence[str]) -> tuple[Hashable, ...]:
    return tuple(run.settings.get(key) for key in keys)


def _count_kinds(runs: Iterable[TaskRun], keys: Sequence[str]) -> dict[str, int]:
    """Return by task how many kinds of runs the keys distinguish."""
    by_task = group_runs(runs, lambda run: run.task)
    return {task: len({_values(run, keys) for run in task_runs}) for task, task_runs in by_task.items()}


def differing_keys(runs: Sequence[TaskRun]) -> list[str]:
    """Return the keys in which runs on one task differ."""
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if max(_count_kinds(runs, [key]).values()) > 1]


def _distinguishing_keys(runs: Sequence[TaskRun]) -> list[str]:
    """Return few keys that distinguish on each task what all keys do.

    Keys that distinguish least are left away first, then those that have the most values over all tasks, then those
    outside [objective].
    """
    keys = differing_keys(runs)
    kinds_of_all_keys = _count_kinds(runs, keys)

    def rank(key: str) -> tuple[Any, ...]:
        values = {run.settings.get(key) for run in runs}
        return sum(_count_kinds(runs, [key]).values()), -len(values), key.startswith("objective."), key

    for key in sorted(keys, key=rank):
        rest = [other for other in keys if other != key]
        keys = rest if _count_kinds(runs, rest) == kinds_of_all_keys else keys
    return keys


def _variant_names(objective: str, keys: Sequence[str], groups: Sequence[tuple[Hashable, ...]]) -> list[str]:
    suffixes = distinct_suffixes([key.replace(".", "/") for key in keys])
    short_keys = [suffixes[key.replace(".", "/")].replace("/", ".") for key in keys]
    columns = [_short_texts([values[column] for values in groups]) for column in range(len(keys))]
    rows = list(zip(*columns, strict=True)) or [()]
    return [
        " ".join([objective, *(f"{key}={text}" for key, text in zip(short_keys, row, strict=True))]) for row in rows
    ]


def _short_texts(values: Sequence[Hashable]) -> list[str]:
    """Return short texts that differ where the values do."""
    suffixes = distinct_suffixes([value for value in values if isinstance(value, str)])
    texts = [suffixes[value] if isinstance(value, str) else format_setting(value) for value in values]
    return texts if len(set(texts)) == len(set(values)) else [str(value) for value in values]


def format_setting(value: Hashable) -> str:
    """Return a setting for a person: 1e-05, true, none, [1,3]."""
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else str(value).lower()


def distinct_suffixes(paths: Iterable[str]) -> dict[str, str]:
    """Return for each path its last parts, as many as distinguish all of them."""
    components = {path: path.split("/") for path in paths}
    for count in range(1, max(map(len, components.values()), default=0)):
        suffixes = {path: "/".join(path_components[-count:]) for path, path_components in components.items()}
        if len(set(suffixes.values())) == len(components):
            return suffixes
    return {path: path for path in components}


def generic_settings(runs: Sequence[TaskRun]) -> list[TaskRun]:
    """Return the runs with settings that do not name the run's own teacher, task or seed."""
    all_settings = [dict(run.settings) for run in runs]
    for key in {key for settings in all_settings for key in settings}:
        values = [settings.get(key) for settings in all_settings]
        if key != "teacher.path":
            values = [
                "teacher" if value is not None and value == run.teacher else value
                for value, run in zip(values, runs, strict=True)
            ]
        values = _without_own_words(values, [run.task for run in runs], "{task}")
        values = _without_own_words(values, [str(run.seed) for run in runs], "{seed}")
        for settings, value in zip(all_settings, values, strict=True):
            settings[key] = value
    return [replace(run, settings=settings) for run, settings in zip(runs, all_settings, strict=True)]


def _without_own_words(values: Sequence[Hashable], words: Sequence[str], placeholder: str) -> list[Hashable]:
    """Put `placeholder` for each run's own word, where several runs then agree and no run has another's word."""
    generic = [_replace_word(value, word, placeholder) for value, word in zip(values, words, strict=True)]
    foreign = {value for value, new in zip(values, generic, strict=True) if new == value}
    refused = {new for value, new in zip(values, generic, strict=True) if value in foreign}
    words_of_generic: dict[Hashable, set[str]] = defaultdict(set)
    for new, word in zip(generic, words, strict=True):
        words_of_generic[new].add(word)
    return [
        new if len(words_of_generic[new]) > 1 and new not in refused else value
        for value, new in zip(values, generic, strict=True)
    ]


def _replace_word(value: Hashable, word: str, placeholder: str) -> Hashable:
    if not isinstance(value, str):
        return value
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", placeholder, value)
