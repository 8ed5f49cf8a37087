"""ONNX: a model as a file that runs without PyTorch and transformers, in fp32 and in dynamic int8.

The inputs are those of the family's ordinary interface, [B, S] int64. The outputs are the head's, or the encoder's last
hidden states. All of it requires the extra `onnx`.

B sequences, S tokens of the longest.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lad_dist.config.errors import Fault, UserError
from lad_dist.models.dims import max_positions
from lad_dist.models.frozen import INPUT_NAMES, InferenceModel
from lad_dist.utils.atomic_io import temporary_path
from lad_dist.utils.text import one_line

OPSET = 18
REQUIRED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_DISTANCE = 1e-4  # of an output in fp32 from the model's
MAX_BATCH = 2**15
RAGGED_LENGTHS = ((12, 5, 1), (2,), (9, 33, 33, 16))  # of the sequences on which an export is compared with the model


def check() -> None:
    """Raise UserError where a package that ONNX requires is not installed."""
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed, which ONNX needs; pip install {' '.join(REQUIRED_PACKAGES)}")


def export(model: InferenceModel, file: Path) -> float:
    """Write a model on the CPU as fp32, and return the largest distance of the file's outputs from the model's.

    Raises:
        UserError: the model's family cannot be exported.
        Fault: the outputs differ by more than rounding.
    """
    config, draft = model.model.config, temporary_path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs = example_inputs(model, (5, 3))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    length = torch.export.Dim("length", min=2, max=max_positions(config))
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                str(draft),
                input_names=list(inputs),
                output_names=list(model.output_names),
                dynamic_shapes={name: {0: batch, 1: length} for name in inputs},
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        largest = distance(model, Session(draft))
        if not largest <= MAX_DISTANCE:  # it may be NaN
            raise Fault(f"{file}: the outputs are {largest:.1e} from the model's; the file is discarded")
        draft.replace(file)
        return largest
    except (Fault, OSError):
        raise
    except Exception as error:  # the exporter raises errors of many kinds
        reason = one_line(error)
        raise UserError(f"{file}: the exporter cannot write a {config.model_type} ({reason})") from None
    finally:
        draft.unlink(missing_ok=True)


def quantize(file: Path, out: Path) -> None:
    """Write the exported model with int8 weights, embeddings too, each output of a linear map with a scale of its own.

    Inputs of linear maps are scaled at run time.
    """
    import onnx  # noqa: PLC0415 (an extra)
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 (an extra)

    draft = temporary_path(out)
    graph = onnx.load(str(file))
    del graph.graph.value_info[:]  # shapes that no longer hold when weights are transposed
    try:
        with _quiet():
            # Seven of the eight bits: CPUs without VNNI (AVX2, AVX-512) add up products in sixteen bits, and products
            # of eight bits overflow them.
            quantize_dynamic(graph, str(draft), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


class Session:
    """An exported model on the CPU: inputs [B, S] by name -> outputs; with as many threads as PyTorch."""

    def __init__(self, file: Path):
        import onnxruntime  # noqa: PLC0415 (an extra)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._names = [node.name for node in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[NDArray[np.floating]]:
        outputs: Any = self._session.run(None, {name: inputs[name].numpy() for name in self._names})
        return list(outputs)


def example_inputs(model: InferenceModel, lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Return int64 [B, S] by name: random tokens, padded on the right; the second segment begins in the middle."""
    generator, config = torch.Generator().manual_seed(seed), model.model.config
    size = (len(lengths), max(lengths))
    padding = config.pad_token_id or 0
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(config.vocab_size, size, generator=generator)
    ids[ids == padding] = (padding + 1) % config.vocab_size
    segments = (torch.arange(size[1]) >= torch.tensor(lengths)[:, None] // 2).long() * mask
    inputs = dict(zip(INPUT_NAMES, (torch.where(mask > 0, ids, padding), mask, segments), strict=True))
    return {name: inputs[name] for name in model.input_names}


def distance(model: InferenceModel, session: Session) -> float:
    """Return the largest difference of an output of a real token or sequence, over ragged batches, or NaN."""
    distances, longest = [], max_positions(model.model.config)
    for lengths in RAGGED_LENGTHS:
        inputs = example_inputs(model, [min(length, longest) for length in lengths])
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            model_outputs = model(**inputs)
        for model_output, session_output in zip(model_outputs, session(inputs), strict=True):
            gap = (model_output - torch.from_numpy(session_output)).abs()
            distances.append(float((gap[real] if gap.shape[:2] == real.shape else gap).max()))
    return float(np.max(distances))  # of Python's own max, NaN is not always the largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries, which warn of much that is as it should be."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
