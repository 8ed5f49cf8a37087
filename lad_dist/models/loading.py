"""Models in and out: folder or hub name to model, model to folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Head
from lad_dist.models import families
from lad_dist.models.attention import ATTENTION_NAME
from lad_dist.models.heads import MODEL_CLASSES, keeps_head, set_labels
from lad_dist.models.hf_config import architecture_config, load_hf_config
from lad_dist.utils.text import one_line

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def check_weight_files(path: str) -> None:
    """Raise UserError where the weights in a folder are missing, cut off, or no weights.

    Hub names pass, for their files may still have to be fetched.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{path}: no weights, neither model.safetensors nor pytorch_model.bin")
    for file in files:
        try:
            # Names and shapes alone are read. A pickle of anything but tensors raises.
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    continue
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # of Rust, zip and pickle
            raise UserError(f"{file}: cannot read weights ({one_line(error)})") from None


def load_model(
    path: str, head: Head, *, labels: Sequence[str] = (), dtype: torch.dtype = torch.float32, require_head: bool = False
) -> PreTrainedModel:
    """Return the model at `path` with a head of this kind, in flat attention.

    A head that the folder lacks, or whose labels are others, is new, unless `require_head` forbids it. Raise UserError
    where the folder cannot be read, lacks weights of the encoder, or lacks a head that is required.
    """
    config = load_hf_config(path)
    keep_head = require_head or head in ("none", "mlm") or keeps_head(config, head, labels)
    if not keep_head:
        set_labels(config, head, labels)
    try:
        model, report = MODEL_CLASSES[head].from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=not require_head,
            trust_remote_code=False,
        )
    except Exception as error:  # of Rust, zip and pickle too
        raise UserError(f"{path}: the model cannot be loaded ({one_line(error)})") from None
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    _check_encoder(path, model, missing, report["mismatched_keys"])
    if require_head and missing:
        raise UserError(f"{path}: this model has no {head} head ({missing[0]} is missing)")
    if not keep_head:
        _new_head(model)
    return _with_flat_attention(model)


def _check_encoder(path: str, model: PreTrainedModel, missing: Sequence[str], mismatched: Iterable[Any]) -> None:
    """Raise UserError where the folder lacks weights below the head, or has them in other shapes.

    transformers would draw them at random.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = [key for key in missing if key.startswith(prefix)]
    if lacking:
        raise UserError(f"{path}: lacks {len(lacking)} weights, as {lacking[0]}; config.json is of another model")
    wrong = sorted(str(key[0]) for key in mismatched if str(key[0]).startswith(prefix))
    if wrong:
        raise UserError(f"{path}: {wrong[0]} has another shape than config.json says; it is of another model")


def _new_head(model: PreTrainedModel) -> None:
    """Draw the weights of the head anew."""
    encoder = set(model.base_model.modules())
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in encoder:
            nn.init.normal_(module.weight, std=model.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def create_model(
    architecture: dict[str, Any],
    head: Head,
    *,
    vocab_size: int,
    special_ids: Mapping[str, int] = MappingProxyType({}),
    labels: Sequence[str] = (),
) -> PreTrainedModel:
    """Return a new model of the architecture's Hugging Face config, weights from torch's global generator."""
    return new_model(architecture_config(architecture, vocab_size, special_ids), head, labels)


def new_model(config: PreTrainedConfig, head: Head, labels: Sequence[str] = ()) -> PreTrainedModel:
    """Return a model with this config, which it takes over, and new weights; on the meta device without any."""
    if labels:
        set_labels(config, head, labels)
    return _with_flat_attention(MODEL_CLASSES[head].from_config(config))


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the model as an ordinary Hugging Face folder, in fp32."""
    model.float().save_pretrained(folder)


def _with_flat_attention(model: PreTrainedModel) -> PreTrainedModel:
    if families.family_of(model.config).flat:
        model.set_attn_implementation(ATTENTION_NAME)
    return model
