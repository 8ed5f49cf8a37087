"""Compressions by name, and their application to a student before it trains.

`COMPRESSIONS` names those that a config may list under `[[compression]]`; their keyword-only arguments are the schema.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial

from lad_dist.compression.ladabert import check_ladabert, ladabert
from lad_dist.compression.layers import scale_position_embeddings
from lad_dist.compression.low_rank import low_rank
from lad_dist.compression.options import CalibrationBatches, ReportValues, no_calibration_batches, silent
from lad_dist.compression.pruning.prune import check_prune, prune
from lad_dist.compression.theseus import check_theseus, theseus
from lad_dist.models.loading import PreTrainedModel


def apply_compressions(
    model: PreTrainedModel,
    compressions: Iterable["partial[PreTrainedModel]"],
    sample: CalibrationBatches = no_calibration_batches,
    report: ReportValues = silent,
) -> PreTrainedModel:
    """The model after these surgeries, in order. `sample()` is the first batches of the training data, the same on all
    processes; `tell(values)` puts what was found, by name, into the first row and the results of the run. On the meta
    device a model has shapes and no numbers: a surgery refuses there what does not fit, and asks and tells nothing."""
    given = {"sample": sample, "tell": report}
    for surgery in compressions:
        wanted = inspect.signature(surgery.func).parameters.keys() & given.keys()
        model = surgery(model, **{name: given[name] for name in wanted})
    return model


COMPRESSIONS: dict[str, Callable[..., PreTrainedModel]] = {
    "ladabert": ladabert,
    "low_rank": low_rank,
    "prune": prune,
    "scale_position_embeddings": scale_position_embeddings,
    "theseus": theseus,
}
# Of the rest of the config, given it, the student's head and its labels, and the surgery's arguments.
COMPRESSION_CHECKS: dict[str, Callable[..., None]] = {
    "ladabert": check_ladabert,
    "prune": check_prune,
    "theseus": check_theseus,
}
