"""What the losses of a step are means over: counted over all its micro-batches, those of other processes too."""

from collections.abc import Sequence

import numpy as np

from lad_dist.core.batch import Batch, Counts
from lad_dist.distributed import processes


def with_step_counts(batches: Sequence[Batch]) -> list[Batch]:
    """Return this process's micro-batches of a step, with the mean counts of the micro-batches of all processes.

    DeepSpeed gives every micro-batch the same weight. A loss that divides by these counts and not by a micro-batch's
    own is a mean over the whole step, so that a step is a function of its examples and not of their micro-batches. All
    processes call this together.
    """
    counts = mean_counts(batches)
    return [batch._replace(step_counts=counts) for batch in batches]


def mean_counts(batches: Sequence[Batch]) -> Counts:
    """Return the mean counts of the batches of all processes, which call this together: one exchange on the host."""
    counts = np.array([batch.counts for batch in batches]).reshape(-1, len(Counts._fields))
    number, *totals = processes.sums([len(batches), *counts.sum(axis=0).tolist()])
    return Counts(*(total / number for total in totals))
