"""A model in one of the forms that ship, ready to predict: folder, compact form, ONNX file in fp32, fp16 or int8.

B sequences, S tokens of the longest, R rows that the head reads, V outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lad_dist.compression.compact import COMPACT_FILE, load_compact
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch, Head
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer
from lad_dist.distributed import processes
from lad_dist.evaluation.onnx_export import Session
from lad_dist.models import heads, loading
from lad_dist.models.dims import count_parameters, max_positions
from lad_dist.models.forward import compute_outputs
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import check_weight_files
from lad_dist.utils.text import one_line

LOGITS = OutputSpec(logits=True)
ONNX_SUFFIX, ONNX_FOLDER = ".onnx", "onnx"  # files and their folder in an export, as on the hub


class ModelLocation(NamedTuple):
    """Where a model lies."""

    path: str  # as the user names it
    folder: str  # of config.json and the tokenizer, or a hub name
    file: Path | None  # an ONNX file or the compact form; None: the folder's ordinary weights

    @property
    def is_onnx(self) -> bool:
        """Return whether it is an ONNX file."""
        return self.file is not None and self.file.suffix.lower() == ONNX_SUFFIX


def locate_model(path: str | Path) -> ModelLocation:
    """Return where the parts of a model lie: of a folder, a run, an .onnx file, compact.safetensors or a hub name.

    Raises:
        UserError: A part is missing, which the message names. Weights are not read.
    """
    place = Path(path)
    if place.suffix.lower() == ONNX_SUFFIX or place.name == COMPACT_FILE:
        if not place.is_file():
            raise UserError(f"{path}: no such file")
        if place.suffix.lower() == ONNX_SUFFIX and find_spec("onnxruntime") is None:
            raise UserError(f"{path}: onnxruntime is not installed, which ONNX needs; pip install onnxruntime")
        return ModelLocation(str(path), str(_folder_of(place)), place)
    if place.is_file():
        raise UserError(f"{path}: no model; name a folder, an .onnx file or {COMPACT_FILE}")
    is_run = (place / "export" / "config.json").is_file() and not (place / "config.json").exists()
    folder = str(place / "export" if is_run else path)
    if place.is_dir():
        check_weight_files(folder)
    return ModelLocation(str(path), folder, None)


def _folder_of(file: Path) -> Path:
    """Return the folder that holds config.json: that of the file, or the one above its folder `onnx`."""
    folders = [file.parent, *([file.parent.parent] if file.parent.name == ONNX_FOLDER else [])]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{file}: no config.json beside it; copy config.json and tokenizer.json from the model's folder")


class Predictor:
    """A model that predicts: a function from a batch to the logits of its head.

    Attributes:
        path: The model, as the user names it.
        kind: What the head is for.
        labels: The names of the outputs, in the order of the logits' columns.
        has_label_names: Whether the model itself calls the outputs so.
        thresholds: The probability from which on a text gets each of `labels`; none where config.json has none.
        max_positions: The tokens of the longest sequence.
        sizes: The number of weights as `parameters`; empty of an ONNX file.
    """

    def __init__(
        self,
        location: ModelLocation,
        kind: Head | None = None,
        labels: Sequence[str] = (),
        *,
        fixed_order: bool = False,
    ) -> None:
        """Load a model.

        Args:
            location: Where it lies.
            kind: What the head has to be for; default: what it is for.
            labels: The order of outputs that the logits shall have; default: the model's own.
            fixed_order: Whether outputs of other names than `labels` are in that order.

        Raises:
            UserError: The model cannot be read, or has no such head.
        """
        self.path, self._location = location.path, location
        config = load_hf_config(location.folder)
        self.kind = kind or _kind_of(config, location.path)
        self._order = (
            heads.label_order(config, location.path, self.kind, labels, fixed_order=fixed_order) if labels else None
        )
        self.labels = tuple(labels) or heads.label_names(config)
        self.has_label_names = heads.has_label_names(config, self.labels)
        self.thresholds = heads.label_thresholds(config, self._order)
        self.max_positions = max_positions(config)
        self.sizes: dict[str, int] = {}
        self._forward = self._load(config.pad_token_id or 0)

    def _load(self, padding: int) -> Callable[[Batch], Tensor]:
        if self._location.is_onnx:
            assert self._location.file is not None
            return partial(_onnx_logits, self.path, _open_session(self._location.file), padding)
        if self._location.file is None:
            model = loading.load_model(self._location.folder, self.kind, require_head=True)
        else:
            model = load_compact(self._location.folder)
        self.sizes = {"parameters": count_parameters(model)}
        model = model.eval().requires_grad_(False).to(processes.device())
        return partial(_torch_logits, model)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits [R, V] of a batch, in fp32 on some device."""
        logits = self._forward(batch).float()
        outputs = 2 if self.kind == "question_answering" else len(self.labels)
        if logits.shape[1] != outputs:
            raise UserError(f"{self.path}: {logits.shape[1]} outputs, but config.json names {outputs}")
        return logits if self._order is None else logits[:, self._order]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer in the model's folder."""
        return load_tokenizer(self._location.folder)


def open_predictor(path: str | Path) -> Predictor:
    """Load a model, ready to predict.

    Args:
        path: A model folder, a run folder, of which the export is meant, an .onnx file or a compact.safetensors with
            config.json and the tokenizer beside it (or above its folder `onnx`), or a hub name.

    Raises:
        UserError: No model can be read at the path, or one without a head for a task.
    """
    return Predictor(locate_model(path))


def _kind_of(config: Any, path: str) -> Head:
    """Return what a model's head is for. Raise UserError where it has none for a task."""
    kind = heads.head_of(config)
    if kind == "none":
        raise UserError(f"{path}: {', '.join(config.architectures or ['no architecture'])} has no head for a task")
    return "regression" if kind == "classification" and len(heads.label_names(config)) == 1 else kind


def _torch_logits(model: Any, batch: Batch) -> Tensor:
    logits = compute_outputs(model, batch.to(processes.device()), LOGITS).logits
    assert logits is not None
    return logits


def _open_session(file: Path) -> Session:
    try:
        return Session(file)
    except Exception as error:  # onnxruntime raises errors of many kinds
        raise UserError(f"{file}: cannot be read as ONNX ({one_line(error)})") from None


def _onnx_logits(path: str, session: Session, padding: int, batch: Batch) -> Tensor:
    try:
        return padded_logits(session, padding, batch.to("cpu"))
    except KeyError as error:
        raise UserError(f"{path}: has an input {error}, which is unknown; export it with lad-dist export") from None


def padded_logits(forward: Callable[[Mapping[str, Any]], Sequence[Any]], padding: int, batch: Batch) -> Tensor:
    """Return the logits [R, V] of a forward that reads padded inputs [B, S] by their names.

    Args:
        forward: The model; its outputs are [B, V] or, of heads that read tokens, one or more [B, S, …].
        padding: The token id of padding.
        batch: The sequences, on the forward's device.
    """
    longest = int(batch.lengths.max())
    real = torch.arange(longest) < batch.lengths[:, None]
    inputs = {
        "input_ids": torch.full(real.shape, padding).masked_scatter(real, batch.input_ids),
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros(real.shape, dtype=torch.long).masked_scatter(real, batch.token_type_ids.long()),
    }
    outputs = [torch.as_tensor(x) for x in forward(inputs)]
    logits = torch.stack(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
    return logits if len(logits.shape) == 2 else logits[real].index_select(0, batch.head_positions)
