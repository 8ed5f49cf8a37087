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
    calibration_batches: CalibrationBatches = no_calibration_batches,
    report: ReportValues = silent,
) -> PreTrainedModel:
    """Return the model after these compressions, in order.

    `calibration_batches()` returns the first batches of the training data, the same on all processes. `report(values)`
    puts measured values, by name, into the first row and the results of the run. On the meta device a model has shapes
    and no numbers: a compression raises UserError where it does not fit, reads no batches and reports nothing.
    """
    # A compression takes those of them that its signature names.
    context = {"calibration_batches": calibration_batches, "report": report}
    for compression in compressions:
        names = inspect.signature(compression.func).parameters.keys() & context.keys()
        model = compression(model, **{name: context[name] for name in names})
    return model


COMPRESSIONS: dict[str, Callable[..., PreTrainedModel]] = {
    "ladabert": ladabert,
    "low_rank": low_rank,
    "prune": prune,
    "scale_position_embeddings": scale_position_embeddings,
    "theseus": theseus,
}
# Checks against the rest of the config: each takes it, the student's head, its labels and the compression's arguments.
COMPRESSION_CHECKS: dict[str, Callable[..., None]] = {
    "ladabert": check_ladabert,
    "prune": check_prune,
    "theseus": check_theseus,
}
