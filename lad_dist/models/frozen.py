"""Models that do not learn: the teacher, a model under evaluation, a model as its users run it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lad_dist.core.batch import Batch, Head
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.models import families, loading
from lad_dist.models.dims import uses_segments
from lad_dist.models.forward import compute_outputs
from lad_dist.models.heads import has_label_names, head_of_architectures, label_order
from lad_dist.models.hf_config import IGNORED_CONFIG_KEYS

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class InferenceModel(nn.Module):
    """A model as its users run it, in transformers' own attention.

    It maps input_ids, attention_mask and, where the model uses segments, token_type_ids, all [B, S], to the outputs
    called `output_names`. It takes the model over.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        if families.family_of(model.config).flat:
            model.set_attn_implementation("sdpa")
        self.model = model.eval().requires_grad_(False)
        self.input_names = INPUT_NAMES if uses_segments(model.config) else INPUT_NAMES[:2]
        self.output_names: tuple[str, ...] = ("logits",)
        if model.base_model is model:
            self.output_names = ("last_hidden_state",)
        elif head_of_architectures([type(model).__name__]) == "question_answering":
            self.output_names = ("start_logits", "end_logits")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        inputs = dict(zip(INPUT_NAMES, (input_ids, attention_mask, token_type_ids), strict=True))
        output = self.model(**{name: inputs[name] for name in self.input_names})
        return tuple(output[name] for name in self.output_names)


class FrozenModel:
    """A model that does not learn: a function from a batch and an OutputSpec to ModelOutputs.

    It stays outside the engine, so its weights are neither clipped nor cast nor saved.
    """

    def __init__(
        self,
        path: str,
        head: Head,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        labels: Sequence[str] = (),
        fixed_order: bool = False,
    ):
        model = loading.load_model(path, head, dtype=dtype, labels=labels, require_head=head != "none")
        self.path = path
        self.label_order = label_order(model.config, path, head, labels, fixed_order=fixed_order) if labels else None
        self.has_label_names = bool(labels) and has_label_names(model.config, labels)
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, batch: Batch, spec: OutputSpec) -> ModelOutputs:
        """Return what `spec` asks for, the logits in the task's order of labels."""
        outputs = compute_outputs(self.model, batch, spec)
        if self.label_order is None or outputs.logits is None:
            return outputs
        return outputs._replace(logits=outputs.logits[:, self.label_order])

    @property
    def identity(self) -> dict[str, Any]:
        """What the outputs depend on, beside the batch."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in IGNORED_CONFIG_KEYS}
        return {
            "weights": model_digest(self.model),
            "config": config,
            "labels": self.label_order,
            "dtype": str(self.model.dtype),
        }


def model_digest(model: nn.Module) -> str:
    """Return the sha256 over the model's weights, name by name."""
    return weights_digest(model.state_dict())


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 over weights, name by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
