"""The settings in which runs differ."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lad_dist.report.results import TaskRun


def differences(runs: Iterable[TaskRun]) -> Iterator[tuple[str, TaskRun, TaskRun]]:
    """Yield each key in which a run differs from the first run on its task, with the first run and this one.

    Values that differ as the runs' seeds do are equal: runs/first-1/export and runs/first-2/export of seeds 1 and 2.
    """
    first_runs: dict[str, TaskRun] = {}
    for run in runs:
        first = first_runs.setdefault(run.task, run)
        own_seed = re.compile(rf"(?<![A-Za-z0-9]){first.config.run.seed}(?![A-Za-z0-9])")
        for key in sorted(first.settings.keys() | run.settings.keys()):
            expected, value = first.settings.get(key), run.settings.get(key)
            if value != expected and isinstance(expected, str):
                expected = own_seed.sub(str(run.config.run.seed), expected)
            if value != expected:
                yield key, first, run


def differing_keys(runs: Iterable[TaskRun]) -> list[str]:
    """Return the keys in which runs on one task differ."""
    return sorted({key for key, _, _ in differences(runs)})


def format_setting(value: Any) -> str:
    """Return a setting for a person: 1e-05, true, none, [1,3]."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else str(value).lower()
