"""Models that do not learn: the teacher, a model under evaluation, a model as its users run it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from lad_dist.core.batch import Batch, Head
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.models import families, loading
from lad_dist.models.dims import uses_segments
from lad_dist.models.forward import compute_outputs
from lad_dist.models.heads import head_of_architectures, label_order
from lad_dist.models.hf_config import IGNORED_CONFIG_KEYS

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class InferenceModel(nn.Module):
    """A model as those run it who have its folder alone: input_ids, attention_mask and, where it tells segments,
    token_type_ids, all [B, S] -> `outputs`, by transformers' own attention. It takes the model over."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        if families.family_of(model.config).flat:
            model.set_attn_implementation("sdpa")
        self.model = model.eval().requires_grad_(False)
        self.inputs = INPUT_NAMES if uses_segments(model.config) else INPUT_NAMES[:2]
        self.outputs: tuple[str, ...] = ("logits",)
        if model.base_model is model:
            self.outputs = ("last_hidden_state",)
        elif head_of_architectures([type(model).__name__]) == "question_answering":
            self.outputs = ("start_logits", "end_logits")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = dict(zip(INPUT_NAMES, (input_ids, attention_mask, token_type_ids), strict=True))
        output = self.model(**{name: given[name] for name in self.inputs})
        return tuple(output[name] for name in self.outputs)


class FrozenModel:
    """batch -> Trace of a model that does not learn. It stays outside the engine, so nothing of it is clipped, cast or
    saved."""

    def __init__(
        self,
        path: str,
        head: Head,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        labels: Sequence[str] = (),
    ):
        self.order = label_order(path, head, labels) if labels else None
        self.model = loading.load_model(path, head, dtype=dtype, labels=labels, whole=head != "none").eval().to(device)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: OutputSpec) -> ModelOutputs:
        seen = compute_outputs(self.model, batch, needs)
        if self.order is None or seen.logits is None:
            return seen
        return seen._replace(logits=seen.logits[:, self.order])

    @property
    def identity(self) -> dict[str, Any]:
        """What its answers depend on, beside the batch."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in IGNORED_CONFIG_KEYS}
        return {
            "weights": model_digest(self.model),
            "config": config,
            "labels": self.order,
            "dtype": str(self.model.dtype),
        }


def model_digest(model: nn.Module) -> str:
    """sha256 over the model's weights, name by name."""
    return weights_digest(model.state_dict())


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over weights by name."""
    total = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        total.update(name.encode())
        total.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
