"""Inputs and outputs of a model's modules on a sample of the training data."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lad_dist.core.batch import Batch, one_span_per_sequence, unpad
from lad_dist.core.outputs import OutputSpec
from lad_dist.models.forward import compute_outputs
from lad_dist.models.loading import PreTrainedModel


@contextlib.contextmanager
def capture(modules: Sequence[nn.Module], callback: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call callback(index, input, output) whenever one of the modules runs in this context."""

    def hook(index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, inputs, output: callback(index, inputs[0], output)

    handles = [module.register_forward_hook(hook(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compute_logits(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """Run the model without gradients and return its logits [R, V], None where it has no head."""
    spec = OutputSpec(logits=model.base_model is not model)
    with torch.no_grad():
        return compute_outputs(model, batch.to(model.device), spec).logits


def token_rows(x: Tensor, batch: Batch) -> Tensor:
    """Return the rows of a module's input or output that belong to real tokens, [N, D].

    In an encoder, x is [1, N and filler, D] where it runs flat, [U, S, D] where it runs padded. A head's [R, 1, D]
    becomes [R, D], and so do other tensors whose rows are no tokens.
    """
    spans = one_span_per_sequence(batch)
    if x.shape[:-1] == spans.sequence_ids.shape:
        return real_tokens(unpad(x, spans._replace(padded_index=spans.padded_index.to(x.device))), batch)
    if len(x) != 1 or x.shape[1] < len(batch.input_ids):
        return x.reshape(-1, x.shape[-1])
    return real_tokens(x[0, : len(batch.input_ids)], batch)


def real_tokens(flat: Tensor, batch: Batch) -> Tensor:
    """Return [N, ...] without the tokens that `pad_to` added."""
    return flat if batch.num_tokens == len(flat) else flat[unpad(batch.is_token, batch).to(flat.device)]
