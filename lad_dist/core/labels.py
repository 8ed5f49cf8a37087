"""How a row says that it has no label: it is learnt from the teacher alone."""

import numpy as np

UNLABELLED = -100  # class id of such a row, which PyTorch's losses leave out; labels that are floats are NaN


def is_unlabelled(labels: np.ndarray) -> np.ndarray:
    """Return whether each row of labels [R, ...] is missing, bool [R]."""
    missing: np.ndarray = np.isnan(labels) if labels.dtype.kind == "f" else labels == UNLABELLED
    return np.asarray(missing.any(axis=tuple(range(1, labels.ndim))))
