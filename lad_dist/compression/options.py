"""Options that several compressions share."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from lad_dist.core.batch import Batch
from lad_dist.models import families

LAYER_MODULES = families.layer_list_pattern()

CalibrationBatches = Callable[[], Sequence[Batch]]
ReportValues = Callable[[Mapping[str, float]], None]


def no_calibration_batches() -> Sequence[Batch]:
    """Raise ValueError: the model is compressed without training data."""
    raise ValueError("no calibration batches: the model is compressed without training data")


def silent(values: Mapping[str, float]) -> None:
    """Report nothing."""


def regular_expression(text: str) -> str:
    """Return the text. Raise ValueError where it is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return text


Modules = Annotated[str, Field(description="regular expression over module names"), AfterValidator(regular_expression)]
ActivationAware = Annotated[
    bool, Field(description="low rank that is nearest on a sample of the training data, not in the weights themselves")
]
Begin = Annotated[float, Field(ge=0, le=1, description="share of the training after which weights go")]
End = Annotated[float, Field(ge=0, le=1, description="share of the training after which all have gone")]
UpdateEvery = Annotated[int, Field(ge=1, description="steps between one update of the masks and the next")]
