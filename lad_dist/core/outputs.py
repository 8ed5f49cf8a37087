"""What a forward of a model returns, and which of it an objective asks for.

ModelDims      the sizes of a model that a loss needs to know
OutputSpec     which tensors of a forward an objective asks for
ModelOutputs   the tensors that a forward returns
"""

from typing import NamedTuple

from torch import Tensor

from lad_dist.core.batch import Head


class ModelDims(NamedTuple):
    """The sizes of a model, as an objective sees them."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    head: Head
    num_outputs: int
    padded_length: int | None = None  # tokens of every sequence, where data.pad_to makes them equal


class OutputSpec(NamedTuple):
    """What an objective wants to see of a forward. Layer 0 is the embedding output, layer l the output of layer l."""

    logits: bool = False
    hidden: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()


QKV = ("query", "key", "value")  # names of the three in `Trace.qkv`


class ModelOutputs(NamedTuple):
    """What a forward left behind."""

    logits: Tensor | None = None  # [R, V]
    hidden: dict[int, Tensor] = {}  # noqa: RUF012 (never mutated)
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # noqa: RUF012 (never mutated)
