"""A search to read: trials, best first, what they cost, and what to know about them."""

import json
import math
from collections.abc import Sequence
from typing import Any

from lad_dist.report.search_importance import MIN_SAMPLES, are_enough, with_values
from lad_dist.report.search_trials import NOT_ENDED, ScoredSample, SearchTrials
from lad_dist.report.settings import format_setting
from lad_dist.runs.search_record import TrialState
from lad_dist.utils.text import markdown_table, plain_number

NONE = "-"


def markdown(search: SearchTrials) -> str:
    """Return a search for a person."""
    sections = [_trials, _totals, _notes]
    return "\n\n".join(filter(None, (section(search) for section in sections))) + "\n"


def _trials(search: SearchTrials) -> str:
    count = len(search.trials)
    by = f" by {', '.join(search.metrics)}" if search.metrics else ""
    title = f"# {search.config.search.name}: {count} trial{'s' * (count != 1)}{by}"
    state = "" if search.has_ended else "The search has not ended: this is how far it is.\n\n"
    if not search.trials:
        return f"{title}\n\n{state}No trial has begun."
    header = ["trial", *(key.name for key in search.keys), *search.metrics, "n", "step", "status", "minutes"]
    rows = [*(_scored_row(search, each) for each in search.scored), *(_other_row(search, t) for t in search.others)]
    order = "Best first" + (f" by {search.metrics[0]}" if len(search.metrics) > 1 else "")
    seeds = "; ± is the standard error of a mean over n seeds" if _has_seeds(search) else ""
    return f"{title}\n\n{state}{order}, those without a score last{seeds}.\n\n{markdown_table(header, rows)}"


def _has_seeds(search: SearchTrials) -> bool:
    return any(len(each.trials) > 1 for each in search.scored)


def _scored_row(search: SearchTrials, each: ScoredSample) -> list[str]:
    scores = [_with_error(each.mean(metric), each.error(metric)) for metric in search.metrics]
    status = f"stopped at step {each.step}" if each.status == "stopped" else str(each.status)
    numbers = [str(len(each.trials)), str(each.step), status, _minutes(each.seconds)]
    return [each.name, *_values(search, each.sample), *scores, *numbers]


def _other_row(search: SearchTrials, trial: TrialState) -> list[str]:
    scores = [_with_error(trial.values.get(metric, math.nan), math.nan) for metric in search.metrics]
    status = NOT_ENDED if trial.status is None else f"{trial.status}: {trial.error}" if trial.error else trial.status
    numbers = [NONE, str(trial.step) if trial.step else NONE, status, _minutes(trial.seconds)]
    return [trial.name, *_values(search, trial.sample), *scores, *numbers]


def _values(search: SearchTrials, sample: dict[str, Any]) -> list[str]:
    return [_value(sample[key.name]) if key.name in sample else NONE for key in search.keys]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return plain_number(value)
    return json.dumps(value) if isinstance(value, dict) else format_setting(value)


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return NONE
    return plain_number(value) + ("" if math.isnan(error) else f" ± {plain_number(error, 2)}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds else NONE


def _totals(search: SearchTrials) -> str:
    """Return the number of trials by status, and their hours."""
    by_status: dict[str, list[TrialState]] = {}
    for trial in search.trials.values():
        by_status.setdefault(trial.status or NOT_ENDED, []).append(trial)
    if not by_status:
        return ""
    rows = [_total(search, status, trials) for status, trials in by_status.items()]
    rows.append(_total(search, "all", list(search.trials.values())))
    options = search.config.search
    text = f"Processes of a trial: {options.processes}. GPUs of a process: {options.gpus:g}."
    table = markdown_table(["status", "trials", "hours", "process-hours", "GPU-hours"], rows, align_right=True)
    return f"## Totals\n\n{table}\n\n{text}"


def _total(search: SearchTrials, status: str, trials: Sequence[TrialState]) -> list[str]:
    hours = sum(trial.seconds for trial in trials) / 3600
    processes = hours * search.config.search.processes
    return [
        status,
        str(len(trials)),
        *(f"{each:.3g}" for each in (hours, processes, processes * search.config.search.gpus)),
    ]


def _notes(search: SearchTrials) -> str:
    lines = []
    if search.base is not None:
        lines.append(f"{search.base.name} is the base config.")
    best = search.folder / "best.toml"
    if search.has_ended and best.exists():
        lines.append(f"The config of the best trial: {best}.")
    if len(search.metrics) > 1 and search.scored:
        lines.append(f"No other trial is better by all metrics than one of these: {', '.join(search.front())}.")
    stopped = sum(each.status == "stopped" for each in search.scored)
    if stopped:
        lines.append("A score of a stopped trial is that of the step at which it stopped.")
    if search.scored and not are_enough(search):
        lines.append(
            f"The importance of each key needs at least {MIN_SAMPLES} trials with drawn values and a score, "
            f"and {len(with_values(search))} have both: importance.png is not drawn."
        )
    return "## Notes\n\n" + "\n".join(f"* {line}" for line in lines) if lines else ""
