"""The rules of Tune that stop trials early."""

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from lad_dist.search.plan import SearchPlan
from lad_dist.search.record import SearchRecord

UNKNOWN_STEPS = 10**9


@dataclass(frozen=True)
class _PastTrial:
    """A trial of an earlier session, as far as a scheduler reads it."""

    trial_id: str


class _NoTrials:
    """What a scheduler asks of Tune's controller: before the first trial begins there are none."""

    def get_live_trials(self) -> list[Any]:
        """Return the trials that have not ended."""
        return []


def create_scheduler(plan: SearchPlan, record: SearchRecord) -> TrialScheduler | None:
    """Return the scheduler of a search, told what earlier trials scored; None where there is none."""
    options = plan.config.search
    metric = plan.metrics[0]
    common: dict[str, Any] = {
        "time_attr": "step",
        "metric": f"values/{metric}",
        "mode": plan.directions[metric],
        "grace_period": options.grace_period * max(1, plan.evaluation_steps),
    }
    scheduler: TrialScheduler
    if options.scheduler == "none":
        return None
    if options.scheduler == "median":
        scheduler = MedianStoppingRule(**common)
    else:
        steps = max(plan.steps or UNKNOWN_STEPS, common["grace_period"] + 1)
        scheduler = ASHAScheduler(
            **common,
            max_t=steps,
            reduction_factor=options.reduction_factor,
            stop_last_trials=False,  # the config of a run ends it: its export comes after the last step
        )
    controller: Any = _NoTrials()
    for trial in plan.samples(record):
        if trial.has_result:
            past: Any = _PastTrial(trial.name)
            scheduler.on_trial_add(controller, past)
            rows = [
                {"step": step, common["metric"]: values[metric]} for step, values in trial.scores if metric in values
            ]
            for row in rows:
                scheduler.on_trial_result(controller, past, row)
            scheduler.on_trial_complete(controller, past, rows[-1] if rows else {})
    return scheduler
