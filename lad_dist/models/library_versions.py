"""What differs between the versions of torch and transformers that pyproject.toml admits; all other code is the same.

Torch 2.11 to 2.15: nothing. `varlen_attn` takes the same arguments, and from 2.14 on cuDNN computes it on some GPUs.
`hash_tensor` returns the same numbers.
Transformers 5.10 to 5.24: below 5.17, it cannot load a ModernBERT whose layers are of one kind.
"""

import transformers
from transformers import PreTrainedConfig

from lad_dist.config.errors import UserError

TRANSFORMERS = tuple(int(number) for number in transformers.__version__.split(".")[:2])
LOADS_LAYERS_OF_ONE_KIND = (5, 17)


def check_layer_types(config: PreTrainedConfig) -> None:
    """Raise UserError where this version of transformers could not load a model with these kinds of layers."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) == 1 and TRANSFORMERS < LOADS_LAYERS_OF_ONE_KIND:
        version = ".".join(map(str, LOADS_LAYERS_OF_ONE_KIND))
        raise UserError(
            f"student.layers: all are of the kind {kinds.pop()}, which transformers {transformers.__version__} cannot "
            f"load; install transformers {version} or newer, or keep layers of both kinds"
        )
