"""What the modules of a model see of a sample of the training data.

seen(modules, keep)   within it, keep(number, input, output) is called for each of them that runs
run(model, batch)     one forward, from which nothing is learnt
rows(x, batch)        what stands at real tokens, or at what a head reads
"""

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
def capture(modules: Sequence[nn.Module], keep: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within it, keep(number, input, output) is called for each of the modules that runs."""

    def hook(number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, inputs, output: keep(number, inputs[0], output)

    handles = [module.register_forward_hook(hook(number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_logits(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """Its logits, where there is a head."""
    needs = OutputSpec(logits=model.base_model is not model)
    with torch.no_grad():
        return compute_outputs(model, batch.to(model.device), needs).logits


def token_rows(x: Tensor, batch: Batch) -> Tensor:
    """[1, N and filler, D] of a body that runs flat, or [U, S, D] of one that runs padded, to the real tokens' [N, D];
    [R, 1, D] of the head to [R, D], and what else has rows of its own likewise."""
    spans = one_span_per_sequence(batch)
    if x.shape[:-1] == spans.sequence_ids.shape:
        return real_tokens(unpad(x, spans._replace(padded_index=spans.padded_index.to(x.device))), batch)
    if len(x) != 1 or x.shape[1] < len(batch.input_ids):
        return x.reshape(-1, x.shape[-1])
    return real_tokens(x[0, : len(batch.input_ids)], batch)


def real_tokens(flat: Tensor, batch: Batch) -> Tensor:
    """[N, ...] without what `pad_to` padded."""
    return flat if batch.num_tokens == len(flat) else flat[unpad(batch.is_token, batch).to(flat.device)]
