"""Options that several compressions share."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from lad_dist.models import families

LAYER_MODULES = families.layer_list_pattern()


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
