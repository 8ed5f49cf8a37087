"""Models in and out: folder or hub name to model, model to folder."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import utils as hub_utils
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Head
from lad_dist.models import families
from lad_dist.models.attention import ATTENTION_NAME
from lad_dist.models.dims import encoder_layers
from lad_dist.models.heads import MODEL_CLASSES, declares_head, names_outputs_by_default, set_labels, set_problem_type
from lad_dist.models.hf_config import architecture_config, load_hf_config
from lad_dist.utils import progress
from lad_dist.utils.text import megabytes, one_line

transformers_logging.set_verbosity_error()
_show_downloads = not hub_utils.are_progress_bars_disabled()
transformers_logging.disable_progress_bar()  # the bars of weights that are read, and those of downloads with them
if _show_downloads:
    hub_utils.enable_progress_bars()


def check_weight_files(path: str) -> None:
    """Raise UserError where the weights in a folder are missing, cut off, or no weights.

    Hub names pass, for their files may still have to be fetched.
    """
    if not Path(path).is_dir():
        return
    files = _weight_files(path)
    if not files:
        raise UserError(f"{path}: no weights, neither model.safetensors nor pytorch_model.bin")
    for file in files:
        _weight_names(file)


def _weight_names(file: Path) -> list[str]:
    """Return the names of the weights in a file, of which no number is read; raise UserError where it holds none."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                return list(weights.keys())
        return list(torch.load(file, map_location="meta", weights_only=True))  # raises where it would run code
    except Exception as error:  # of Rust, zip and pickle
        raise UserError(f"{file}: cannot read weights ({one_line(error)})") from None


def holds_head(path: str, config: PreTrainedConfig, head: Head, labels: Sequence[str] = ()) -> bool:
    """Return whether the model at `path` has a head of this kind, with these labels, which `load_model` keeps.

    The names of the weights in a folder decide: many encoders were saved without the head that their config names. Of a
    hub name the config decides, because its weights may still have to be fetched.
    """
    folder = Path(path)
    if head != "mlm" and not declares_head(config, head, labels):
        return False
    if head == "none" or not folder.is_dir():
        return declares_head(config, head, labels)
    with torch.device("meta"):
        model = new_model(deepcopy(config), head, labels)
    encoder = set(model.base_model.parameters())  # with the map to the vocabulary, where that is tied to the embeddings
    head_modules = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight not in encoder}
    names = [name for file in _weight_files(path) for name in _weight_names(file)]
    return all(any(name.startswith(f"{module}.") for name in names) for module in head_modules)


def _weight_files(path: str) -> list[Path]:
    """Return the files with weights in a folder."""
    return sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("pytorch_model*.bin"))


def load_model(
    path: str, head: Head, *, labels: Sequence[str] = (), dtype: torch.dtype = torch.float32, require_head: bool = False
) -> PreTrainedModel:
    """Return the model at `path` with a head of this kind, in flat attention.

    A head that the folder lacks, or whose labels are others, is new, unless `require_head` forbids it. Raise UserError
    where the folder cannot be read, holds other weights than its config says, or lacks a head that is required.
    """
    config = load_hf_config(path)
    is_unnamed = bool(labels) and not require_head and names_outputs_by_default(config, head, labels)
    # Encoders without a head have such names too.
    keep_head = require_head or head in ("none", "mlm") or declares_head(config, head, labels)
    keep_head = keep_head and (not is_unnamed or holds_head(path, config, head, labels))
    if not keep_head or is_unnamed:
        set_labels(config, head, labels)
    elif head == "multilabel":
        set_problem_type(config, head)  # so that who loads an export applies a sigmoid
    try:
        with _waiting(path):
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
    _check_weights(path, model, report, head_is_own=keep_head)
    missing = _missing(report)
    if require_head and missing:
        raise UserError(f"{path}: this model has no {head} head ({missing[0]} is missing)")
    if not keep_head:
        _new_head(model)
    if head == "mlm":
        _declare_untied_embeddings(model)
    return _with_flat_attention(model)


def _waiting(path: str) -> AbstractContextManager[None]:
    """Show that weights are read; downloads from the hub have bars of their own."""
    if not Path(path).is_dir():
        return nullcontext()
    return progress.waiting(f"loading {path}, {megabytes(sum(file.stat().st_size for file in _weight_files(path)))}")


def _missing(report: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in report["missing_keys"] if "pooler" not in key)


def _check_weights(path: str, model: PreTrainedModel, report: Mapping[str, Any], *, head_is_own: bool) -> None:
    """Raise UserError where the folder holds other weights of the encoder, or of its own head, than its config says.

    transformers draws at random what is missing or has another shape, and leaves out what is too much.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = [key for key in _missing(report) if key.startswith(prefix)]
    if lacking:
        raise UserError(f"{path}: lacks {len(lacking)} weights, as {lacking[0]}; config.json is of another model")
    layers = next(name for name, module in model.base_model.named_modules() if module is encoder_layers(model))
    surplus = sorted(key for key in report["unexpected_keys"] if families.lies_in(key, layers))
    if surplus:
        raise UserError(f"{path}: {len(surplus)} weights have no place in the model of config.json, as {surplus[0]}")
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])
    wrong = [key for key in mismatched if head_is_own or key.startswith(prefix)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} has another shape than config.json says; it is of another model")


def _declare_untied_embeddings(model: PreTrainedModel) -> None:
    """Write into the config that the head has a map to the vocabulary of its own, where it has.

    transformers loads the two as a folder holds them, whatever the config says of them.
    """
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if output.shape == embeddings.shape and output is not embeddings:
        model.config.tie_word_embeddings = False


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
