"""The tensors that a forward of a model returns, and those that an objective asks for."""

from typing import NamedTuple

from torch import Tensor

from lad_dist.core.batch import Head


class ModelDims(NamedTuple):
    """The sizes of a model that an objective needs to know.

    Attributes:
        num_hidden_layers: Encoder layers; the embeddings are not one.
        hidden_size: The width D of hidden states.
        num_attention_heads: The heads H of a layer.
        head: The kind of head on top of the encoder.
        num_outputs: The outputs V of the head; 0 without one.
        padded_length: The tokens of every sequence, where data.pad_to makes them equal.
        vocabulary: The tokens of the tokenizer on a corpus. Outputs of an MLM head beyond these mean nothing: many
            models have a vocabulary that is padded to a round number.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    head: Head
    num_outputs: int
    padded_length: int | None = None
    vocabulary: int | None = None


class OutputSpec(NamedTuple):
    """The outputs of a forward that an objective asks for.

    Attributes:
        logits: Whether it asks for the outputs of the head.
        hidden: Layers whose hidden states it asks for; layer 0 is the output of the embeddings.
        qkv: Layers, from 1, whose queries, keys and values it asks for.
        all_tokens: Whether the head reads every token, not those of `Batch.head_positions`: logits are then [N, V].
    """

    logits: bool = False
    hidden: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()
    all_tokens: bool = False


QKV = ("query", "key", "value")  # names of the three in `ModelOutputs.qkv`


class ModelOutputs(NamedTuple):
    """The outputs of a forward: those that an OutputSpec names.

    Attributes:
        logits: Outputs of the head, [R, V]; [N, V] where it reads every token.
        hidden: Hidden states by layer, [N, D]; layer 0 is the output of the embeddings.
        qkv: Queries, keys and values by layer, [N, H, D / H] each.
    """

    logits: Tensor | None = None
    hidden: dict[int, Tensor] = {}  # noqa: RUF012 (never mutated)
    qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # noqa: RUF012 (never mutated)
