"""ONNX: a model as a file that runs without PyTorch and transformers, in fp32 and in dynamic int8.

    export(served, file)     fp32, with axes batch and length; held against the model before it takes its place
    quantize(file, out)      weights and what linear maps multiply as int8
    Session                  such a file, run on the CPU by onnxruntime

Its inputs are those of the family's ordinary interface, [B, S] int64; its outputs are the head's, or the encoder's last
hidden states. Needs the extra `onnx`.

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
from lad_dist.utils.errors import first_line

OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
EXACT = 1e-4  # the most that an output in fp32 may be off
MOST_BATCH = 2**15
RAGGED = ((12, 5, 1), (2,), (9, 33, 33, 16))  # lengths of the sequences that an export is held against


def check() -> None:
    """Raises UserError where what this needs is not installed."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise UserError(f"{lacking[0]} is not installed, which ONNX needs; pip install {' '.join(NEEDED)}")


def export(served: InferenceModel, file: Path) -> float:
    """Writes the model, which is on the CPU; returns how far the file's outputs are from its own, at most. Raises
    UserError where the model's family cannot be exported, Fault where the outputs differ by more than rounding."""
    config, draft = served.model.config, temporary_path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    example = example_inputs(served, (5, 3))
    batch = torch.export.Dim("batch", min=1, max=MOST_BATCH)
    length = torch.export.Dim("length", min=2, max=max_positions(config))
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                served,
                tuple(example.values()),
                str(draft),
                input_names=list(example),
                output_names=list(served.outputs),
                dynamic_shapes={name: {0: batch, 1: length} for name in example},
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        off = distance(served, Session(draft))
        if off > EXACT:
            raise Fault(f"{file}: its outputs are {off:.1e} from the model's; it is not kept")
        draft.replace(file)
        return off
    except (Fault, OSError):
        raise
    except Exception as error:  # the exporter's own, of many kinds
        reason = first_line(error)
        raise UserError(f"{file}: the exporter cannot write a {config.model_type} ({reason})") from None
    finally:
        draft.unlink(missing_ok=True)


def quantize(file: Path, out: Path) -> None:
    """Writes the exported model with int8 weights, each output of a linear map scaled by itself, embeddings too; what
    is multiplied is scaled at run time. Seven bits of the eight, as products of eight overflow where a CPU adds them up
    in sixteen (AVX2, AVX-512 without VNNI)."""
    import onnx  # noqa: PLC0415 (an extra)
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 (an extra)

    draft = temporary_path(out)
    graph = onnx.load(str(file))
    del graph.graph.value_info[:]  # shapes that no longer hold when weights are turned about
    try:
        with _quiet():
            quantize_dynamic(graph, str(draft), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


class Session:
    """inputs [B, S] by name -> outputs, on the CPU; `threads`: as many as PyTorch's."""

    def __init__(self, file: Path):
        import onnxruntime  # noqa: PLC0415 (an extra)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[NDArray[np.floating]]:
        found: Any = self._session.run(None, {name: inputs[name].numpy() for name in self._names})
        return list(found)


def example_inputs(served: InferenceModel, lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """int64 [B, S] by name: random tokens, padded on the right; the second segment begins in the middle."""
    chance, config = torch.Generator().manual_seed(seed), served.model.config
    size = (len(lengths), max(lengths))
    padding = config.pad_token_id or 0
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(config.vocab_size, size, generator=chance)
    ids[ids == padding] = (padding + 1) % config.vocab_size
    segments = (torch.arange(size[1]) >= torch.tensor(lengths)[:, None] // 2).long() * mask
    given = dict(zip(INPUT_NAMES, (torch.where(mask > 0, ids, padding), mask, segments), strict=True))
    return {name: given[name] for name in served.inputs}


def distance(served: InferenceModel, session: Session) -> float:
    """The largest difference of an output of a real token or sequence, over ragged batches."""
    worst, longest = 0.0, max_positions(served.model.config)
    for lengths in RAGGED:
        inputs = example_inputs(served, [min(length, longest) for length in lengths])
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = served(**inputs)
        for ours, its in zip(expected, session(inputs), strict=True):
            gap = (ours - torch.from_numpy(its)).abs()
            worst = max(worst, float((gap[real] if gap.shape[:2] == real.shape else gap).max()))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries warn of much that is as it should be."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
