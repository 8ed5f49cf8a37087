"""Narrowing: an encoder of smaller widths that computes what the wide one did, as far as they allow.

Hidden states of all layers are in one space, for each layer adds to them: so one map A [D, d] with orthonormal columns
narrows them all, h' ≈ Aᵀh. What writes into the stream gets Aᵀ in front. A spans the principal directions of the hidden
states of a sample, their mean taken away (a mean costs no direction: biases hold it) and every layer counted alike.

A LayerNorm subtracts the mean over coordinates and has one scale for each, so it commutes with no rotation. Of all
bases of its span A therefore takes the one nearest to d of the old coordinates (pivoted QR finds them, the orthogonal
Procrustes solution turns the basis). Coordinates stay what they were, and outliers among them stay alone.

Then the narrow model is built from its embeddings up, on what it computes from the sample itself. A norm's scale and
offset are fitted by least squares to Aᵀh. What reads the stream reads h ≈ lift h' + offset, a ridge regression that
starts from A. Inside an attention head, q and k are cut to the largest singular values of the scores, v and the output
map to those of their product. A student with fewer heads has those whose output varies most. A feed-forward block and a
head's dense layer have the units whose output varies most; the means of the others go into the next bias. What is as
large as before stays as it was, so that nothing is lost at full width.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from lad_dist.compression.width_pruning.fit import Fit
from lad_dist.compression.width_pruning.modules import ModuleMap
from lad_dist.compression.width_pruning.statistics import WidthBasis, choose_axes, measure
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.models import activations, families
from lad_dist.models.loading import PreTrainedModel


@dataclass(frozen=True)
class Widths:
    """The sizes of an encoder that narrowing changes."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int


def check_widths(
    config: Any, hidden_size: int | None, num_attention_heads: int | None, intermediate_size: int | None, name: str
) -> Widths:
    """Return the widths of the narrow model of one with this config, called `name`. Raise UserError."""
    if not families.family_of(config).narrowable:
        narrowable = [model_type for model_type, family in families.FAMILIES.items() if family.narrowable]
        raise UserError(
            f"student.hidden_size: {config.model_type} cannot be narrowed, only {', '.join(narrowable)} can; "
            "take student.architecture for a new model of another width"
        )
    old = Widths(config.hidden_size, config.num_attention_heads, families.intermediate_size(config))
    hidden_size = hidden_size or old.hidden_size
    new = Widths(
        hidden_size,
        num_attention_heads or old.num_attention_heads,
        intermediate_size or max(1, round(old.intermediate_size * hidden_size / old.hidden_size)),
    )
    for key, size in vars(new).items():
        if size > getattr(old, key):
            raise UserError(f"student.{key} = {size}, but {name} has {getattr(old, key)}")
    if new.hidden_size != old.hidden_size and new.hidden_size == getattr(config, "embedding_size", None):
        raise UserError(
            f"student.hidden_size = {new.hidden_size}: as wide as {name}'s embeddings, whose map to hidden states it "
            "then has no place for; take another"
        )
    head_size = old.hidden_size // old.num_attention_heads
    fitting = [
        n for n in range(1, old.num_attention_heads + 1) if hidden_size % n == 0 and hidden_size // n <= head_size
    ]
    if new.num_attention_heads not in fitting:
        choices = f"take {' or '.join(map(str, fitting))}" if fitting else "take another student.hidden_size"
        raise UserError(
            f"student.num_attention_heads: {new.num_attention_heads} heads do not divide a width of {hidden_size} into "
            f"sizes of at most {head_size}, as {name} has them; {choices}"
        )
    return new


def resized_config(config: Any, widths: Widths) -> Any:
    """Return a copy of the config with these widths."""
    config = deepcopy(config)
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = widths.hidden_size
    config.hidden_size, config.num_attention_heads = widths.hidden_size, widths.num_attention_heads
    setattr(config, families.family_of(config).intermediate_size_key, widths.intermediate_size)
    return config


def narrow_model(
    model: PreTrainedModel, batches: Sequence[Batch], widths: Widths, width_basis: WidthBasis
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Return the model at these widths, fitted to a sample of what it will read, and the errors on it (see `_errors`).

    Every process of a run must pass the same batches; "random" draws from torch's global generator.
    """
    training, model = model.training, model.eval()
    wide = ModuleMap(model)
    statistics = measure(wide, batches)
    axes = choose_axes(statistics.stream, widths.hidden_size, width_basis)
    student = type(model)(resized_config(model.config, widths)).eval()
    student.to(device=model.device, dtype=model.dtype)
    if model.config._attn_implementation != student.config._attn_implementation:
        student.set_attn_implementation(model.config._attn_implementation)
    fit = Fit(wide, ModuleMap(student), axes, batches, statistics)
    fit.run()
    return student.train(training), _errors(fit)


def _errors(fit: Fit) -> dict[str, float]:
    """Return the errors on the sample, layer 0 being the embeddings' output.

    "hidden/l" is the error of the narrow model's hidden states against the wide one's in its coordinates, "lost/l" that
    of what these coordinates leave out, "logits" that of the logits, where there is a head. All are relative to how far
    the wide model's own values lie from their mean (root mean squares).
    """
    errors: dict[str, float] = {}
    for layer, (squares, moments) in enumerate(zip(fit.errors[::2], fit.statistics.stream[::2], strict=True)):
        variance = moments.covariance.trace()
        narrow_variance = (fit.axes.T @ moments.covariance @ fit.axes).trace()
        errors[f"hidden/{layer}"] = (squares / moments.num_rows / narrow_variance.item()) ** 0.5
        errors[f"lost/{layer}"] = ((variance - narrow_variance).clamp(min=0.0) / variance).sqrt().item()
    if fit.statistics.logits:
        narrow_logits = [activations.compute_logits(fit.narrow.model, batch) for batch in fit.batches]
        z = torch.cat(fit.statistics.logits).double()
        z_narrow = torch.cat([x for x in narrow_logits if x is not None]).double()
        errors["logits"] = ((z - z_narrow).norm() / (z - z.mean(dim=0)).norm()).item()
    return errors
