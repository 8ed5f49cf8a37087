"""One forward over a flat batch.

Hooks on the layers keep the hidden states that are needed. A hook on the encoder picks the tokens that the head reads,
so that an MLM head works on masked positions alone.

N tokens of all sequences, R positions that the head reads, D hidden size, V outputs.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lad_dist.core.batch import Batch, one_span_per_sequence, pad
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.models import families
from lad_dist.models.attention import FlatForward, PaddedForward
from lad_dist.models.dims import encoder_layers


def compute_outputs(model: PreTrainedModel, batch: Batch, spec: OutputSpec) -> ModelOutputs:
    """Run the model once over a flat batch and return the tensors that `spec` asks for."""
    base, family = model.base_model, families.family_of(model.config)
    forward = (FlatForward if family.flat else PaddedForward)(batch, spec.qkv)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids + family.first_position(model.config)}
    segments = getattr(model.config, "type_vocab_size", 0)
    if segments:
        inputs["token_type_ids"] = batch.token_type_ids.clamp(max=segments - 1)
    model_inputs = {name: forward.prepare_input(x) for name, x in inputs.items()}
    hidden: dict[int, Tensor] = {}
    with _hooks(model, forward, batch, spec, hidden):
        output = (model if spec.logits else base)(**model_inputs, **forward.model_kwargs)
    return ModelOutputs(_logits(output) if spec.logits else None, hidden, forward.qkv)


def _logits(output: Any) -> Tensor:
    """Return the outputs of a head for rows that it took for sequences of one token, as [R, V]."""
    if "start_logits" in output:
        return torch.cat([output.start_logits, output.end_logits], dim=-1)
    return output.logits.view(-1, output.logits.shape[-1])


@contextlib.contextmanager
def _hooks(
    model: PreTrainedModel,
    forward: FlatForward | PaddedForward,
    batch: Batch,
    spec: OutputSpec,
    hidden: dict[int, Tensor],
) -> Iterator[None]:
    """Keep the hidden states of `spec` in `hidden` and hand the head only its rows, in a forward of the model.

    Each layer counts up `forward.current_layer` before it runs, also where one module runs as several layers. What a
    layer reads is the output of the layer before.
    """

    def keep_hidden(layer: int, x: Tensor) -> None:
        if layer in spec.hidden:
            hidden[layer] = forward.flatten(x)

    def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep_hidden(forward.current_layer, args[0] if args else kwargs["hidden_states"])
        forward.current_layer += 1

    def after_encoder(_: nn.Module, __: Any, output: Any) -> Any:
        keep_hidden(forward.current_layer, output.last_hidden_state)
        if spec.logits:
            # As sequences of one token: heads that read a sequence's first token and heads that read each both fit.
            x = forward.flatten(output.last_hidden_state)
            rows = x if spec.all_tokens else _head_inputs(model, x, batch)
            output.last_hidden_state = rows[:, None]
        return output

    handles = [
        layer.register_forward_pre_hook(before_layer, with_kwargs=True)
        for layer in dict.fromkeys(encoder_layers(model))
    ]
    handles += [_head_source(model).register_forward_hook(after_encoder), *forward.register_hooks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head_source(model: PreTrainedModel) -> nn.Module:
    """Return the module whose output heads and poolers read."""
    base = model.base_model
    if getattr(base, "pooler", None) is None:
        return base
    return base.get_submodule(families.family_of(model.config).pooler_input)


def _head_inputs(model: PreTrainedModel, x: Tensor, batch: Batch) -> Tensor:
    """Return what the head reads of hidden states [N, D], as [R, D]."""
    mean_pooling = families.family_of(model.config).mean_pooling(model.config)
    if not mean_pooling or not type(model).__name__.endswith("ForSequenceClassification"):
        return x.index_select(0, batch.head_positions)
    spans = one_span_per_sequence(batch)
    tokens = pad(x, spans).masked_fill(~spans.is_token[..., None], 0.0)
    return tokens.sum(dim=1) / batch.lengths[: batch.num_sequences, None]
