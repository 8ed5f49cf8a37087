"""How a row says that it has no label: it is learnt from the teacher alone."""

import numpy as np

UNLABELLED = -100  # class id of such a row, which PyTorch's losses leave out; in regression the label is NaN


def is_unlabelled(labels: np.ndarray) -> np.ndarray:
    """Return whether each label is missing, a bool for each."""
    return np.isnan(labels) if labels.dtype.kind == "f" else labels == UNLABELLED
