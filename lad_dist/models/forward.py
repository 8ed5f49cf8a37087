"""One forward over a flat batch.

A hook on the encoder picks the tokens that the head reads, so that an MLM head works on masked positions alone.

N tokens of all sequences, R positions that the head reads, D hidden size, V outputs.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from lad_dist.core.batch import Batch, one_span_per_sequence, pad
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.models import families
from lad_dist.models.attention import FlatForward, PaddedForward
from lad_dist.models.dims import encoder_layers


def compute_outputs(model: PreTrainedModel, batch: Batch, needs: OutputSpec) -> ModelOutputs:
    """One forward over a flat batch, leaving what is needed."""
    base, family = model.base_model, families.family_of(model.config)
    run = (FlatForward if family.flat else PaddedForward)(batch, needs.qkv)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids + family.first_position(model.config)}
    segments = getattr(model.config, "type_vocab_size", 0)
    if segments:
        inputs["token_type_ids"] = batch.token_type_ids.clamp(max=segments - 1)
    hidden: dict[int, Tensor] = {}
    with _hooks(model, run, batch, needs, hidden):
        output = (model if needs.logits else base)(**{k: run.lay_out(x) for k, x in inputs.items()}, **run.words)
    return ModelOutputs(_logits(output) if needs.logits else None, hidden, run.qkv)


def _logits(output: Any) -> Tensor:
    """What a head says of rows that it took for sequences of one token, as [R, V]."""
    if "start_logits" in output:
        return torch.cat([output.start_logits, output.end_logits], dim=-1)
    return output.logits.view(-1, output.logits.shape[-1])


@contextlib.contextmanager
def _hooks(
    model: PreTrainedModel, run: FlatForward | PaddedForward, batch: Batch, needs: OutputSpec, hidden: dict[int, Tensor]
) -> Iterator[None]:
    """Within it, a forward leaves the layers it `needs` in `hidden` and hands the head only its rows."""

    def keep(layer: int, x: Tensor) -> None:
        if layer in needs.hidden:
            hidden[layer] = run.flatten(x)

    def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(run.layer, args[0] if args else kwargs["hidden_states"])
        run.layer += 1

    def at_end(_: nn.Module, __: Any, output: Any) -> Any:
        keep(run.layer, output.last_hidden_state)
        if needs.logits:
            # As sequences of one token: heads that read a sequence's first token and heads that read each both fit.
            output.last_hidden_state = _head_inputs(model, run.flatten(output.last_hidden_state), batch)[:, None]
        return output

    handles = [
        layer.register_forward_pre_hook(before_layer, with_kwargs=True)
        for layer in dict.fromkeys(encoder_layers(model))
    ]
    handles += [_encoder_end(model).register_forward_hook(at_end), *run.recording(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encoder_end(model: PreTrainedModel) -> nn.Module:
    """The module whose output heads and poolers read."""
    base = model.base_model
    return base if getattr(base, "pooler", None) is None else base.get_submodule("encoder")


def _head_inputs(model: PreTrainedModel, x: Tensor, batch: Batch) -> Tensor:
    """[N, D] to [R, D]: what the head reads of it."""
    averaged = getattr(model.config, "classifier_pooling", "cls") == "mean"
    if not averaged or not type(model).__name__.endswith("ForSequenceClassification"):
        return x.index_select(0, batch.head_positions)
    spans = one_span_per_sequence(batch)
    real = pad(x, spans).masked_fill(~spans.is_token[..., None], 0.0)
    return real.sum(dim=1) / batch.lengths[: batch.num_sequences, None]
