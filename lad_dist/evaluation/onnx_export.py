"""ONNX: a model as files that run without PyTorch and transformers, in fp32, fp16 and dynamic int8.

The inputs are those of the family's ordinary interface, [B, S] int64. The outputs are the head's, or the encoder's last
hidden states, in fp32. All of it requires the extra `onnx`. The folder of the files also has config.json and the
tokenizer: it is all that a server needs (`runs/serving_example.py`).

B sequences, S tokens of the longest.
"""

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lad_dist.compression.compact import load_compact
from lad_dist.compression.footprint import FORMS, FP16, INT8, ONNX
from lad_dist.config.errors import Fault, UserError
from lad_dist.config.load import check_writable
from lad_dist.data.tokenization.loading import load_tokenizer, save_beside_model
from lad_dist.models.dims import max_positions, uses_segments
from lad_dist.models.frozen import INPUT_NAMES, InferenceModel
from lad_dist.models.hf_config import load_hf_config
from lad_dist.models.loading import check_weight_files
from lad_dist.utils import progress
from lad_dist.utils.atomic_io import temporary_path
from lad_dist.utils.text import one_line

OPSET = 18
REQUIRED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_DISTANCE = 1e-4  # of an output in fp32 from the model's
MAX_FP16_DISTANCE = 0.02  # of an output in fp16 from the model's, as a share of the largest output where that is over 1
MAX_BATCH = 2**15
RAGGED_LENGTHS = ((12, 5, 1), (2,), (9, 33, 33, 16))  # of the sequences on which an export is compared with the model


def check() -> None:
    """Raise UserError where a package that ONNX requires is not installed."""
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed, which ONNX needs; pip install {' '.join(REQUIRED_PACKAGES)}")


class Distance(NamedTuple):
    """How far the outputs of a file are from those of its model: the largest difference, NaN where some output is."""

    largest: float
    largest_output: float  # of the model


def export_folder(path: str, out: Path | None, forms: Collection[str]) -> dict[Path, Distance]:
    """Export a model folder or hub name in these forms, and in fp32, of which the others are made.

    Args:
        path: The folder of a model: a run's export, a teacher.
        out: The folder for the files; default: `onnx` in the folder of the model.
        forms: Of ONNX, FP16 and INT8.

    Returns:
        How far the outputs of each file are from the model's.

    Raises:
        UserError: The model cannot be read, exported or served in a form, or `out` cannot be written.
    """
    check()
    if out is None and not Path(path).is_dir():
        raise UserError(f"{path}: no folder; name a folder for the files with --out DIR")
    load_hf_config(path)
    check_weight_files(path)
    load_tokenizer(path)
    folder = Path(path, FORMS[ONNX]).parent if out is None else out
    check_writable("--out", folder)
    return export_forms(InferenceModel(load_compact(path)), path, folder, forms)


def export_forms(model: InferenceModel, path: str, folder: Path, forms: Collection[str]) -> dict[Path, Distance]:
    """Write the model of `path`, on the CPU, in these forms and in fp32, with config.json and the tokenizer.

    The files in `folder` have the names of FORMS. Return how far the outputs of each are from the model's.

    Raises:
        UserError: The exporter knows no such family, or numbers of the model are out of the range of a form.
        Fault: The outputs in fp32 differ by more than rounding.
    """
    files = {form: folder / Path(FORMS[form]).name for form in (ONNX, FP16, INT8)}
    with progress.waiting(f"exporting {path} to {files[ONNX]}"):
        distances = {files[ONNX]: export(model, files[ONNX])}
    for form, convert in ((FP16, convert_to_fp16), (INT8, quantize)):
        if form in forms:
            with progress.waiting(f"exporting {path} to {files[form]}"), _draft(files[form]) as draft:
                convert(files[ONNX], draft)
                distances[files[form]] = distance(model, Session(draft))
                _check_range(files[form], distances[files[form]], form)
    config = model.model.config
    config.to_json_file(folder / "config.json", use_diff=False)  # with id2label, also where the names are the default
    save_beside_model(load_tokenizer(path), folder, uses_segments(config), max_positions(config))
    return distances


def export(model: InferenceModel, file: Path) -> Distance:
    """Write a model on the CPU as fp32, and return how far the file's outputs are from the model's.

    Raises:
        UserError: the model's family cannot be exported.
        Fault: the outputs differ by more than rounding.
    """
    config = model.model.config
    inputs = example_inputs(model, (5, 3))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    length = torch.export.Dim("length", min=2, max=max_positions(config))
    with _draft(file) as draft:
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
            gap = distance(model, Session(draft))
        except OSError:
            raise
        except Exception as error:  # the exporter raises errors of many kinds
            reason = one_line(error)
            raise UserError(f"{file}: the exporter cannot write a {config.model_type} ({reason})") from None
        if not gap.largest <= MAX_DISTANCE:  # it may be NaN
            raise Fault(f"{file}: the outputs are {gap.largest:.1e} from the model's; the file is discarded")
    return gap


def convert_to_fp16(file: Path, out: Path) -> None:
    """Write the exported model with weights and arithmetic in fp16; inputs and outputs keep their types.

    What becomes a whole number stays in fp32: buckets of relative positions are logarithms, rounded down.
    """
    import onnx  # noqa: PLC0415 (an extra)
    from onnxruntime.transformers import float16  # noqa: PLC0415 (an extra)

    model = onnx.shape_inference.infer_shapes(onnx.load(str(file)))
    graph = model.graph
    names = _nodes_of_whole_numbers(graph)
    # Values between these nodes would be cast to fp16 and back, were their types known.
    between = {value for node in graph.node if node.name in names for value in node.output}
    between -= {value for node in graph.node if node.name not in names for value in node.input}
    typed = [value for value in graph.value_info if value.name not in between]
    del graph.value_info[:]
    graph.value_info.extend(typed)
    with _quiet():
        model = float16.convert_float_to_float16(
            model, keep_io_types=True, disable_shape_infer=True, node_block_list=sorted(names)
        )
    onnx.save(model, str(out))


def _nodes_of_whole_numbers(graph: Any) -> set[str]:
    """Return the names of the nodes of a graph on which a cast to whole numbers depends."""
    from onnx import TensorProto  # noqa: PLC0415 (an extra)

    producers = {output: node for node in graph.node for output in node.output}
    pending = [
        node
        for node in graph.node
        if node.op_type == "Cast" and node.attribute[0].i in (TensorProto.INT64, TensorProto.INT32)
    ]
    names: set[str] = set()
    while pending:
        node = pending.pop()
        if node.name not in names:
            names.add(node.name)
            pending += [producers[name] for name in node.input if name in producers]
    return names


def quantize(file: Path, out: Path) -> None:
    """Write the exported model with int8 weights, embeddings too, each output of a linear map with a scale of its own.

    Inputs of linear maps are scaled at run time.
    """
    import onnx  # noqa: PLC0415 (an extra)
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 (an extra)

    graph = onnx.load(str(file))
    del graph.graph.value_info[:]  # shapes that no longer hold when weights are transposed
    with _quiet():
        # Seven of the eight bits: CPUs without VNNI (AVX2, AVX-512) add up products in sixteen bits, and products of
        # eight bits overflow them.
        quantize_dynamic(graph, str(out), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


@contextlib.contextmanager
def _draft(file: Path) -> Iterator[Path]:
    """Return a path that becomes `file` at the end of the context, unless it ends by an error."""
    draft = temporary_path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _check_range(file: Path, gap: Distance, form: str) -> None:
    """Raise UserError where outputs are NaN, or those in fp16 too far from the model's.

    What int8 costs is measured on the task.
    """
    bound = MAX_FP16_DISTANCE * max(1.0, gap.largest_output) if form == FP16 else np.inf
    if not gap.largest <= bound:
        raise UserError(
            f"{file}: outputs are {gap.largest:.1e} from the model's, which are up to {gap.largest_output:.1e}; the "
            "numbers of this model need more range or digits. The file is discarded; export another form"
        )


class Session:
    """An exported model on the CPU: inputs [B, S] by name -> outputs; with as many threads as PyTorch.

    It frees its memory after each call, as PyTorch does. onnxruntime's default keeps the largest call's, for each
    session: with several sessions at once that takes gigabytes, and saves 1 to 5 % of the time.
    """

    def __init__(self, file: Path):
        import onnxruntime  # noqa: PLC0415 (an extra)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False
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


def distance(model: InferenceModel, session: Session) -> Distance:
    """Compare the outputs of all real tokens or sequences over ragged batches."""
    distances, sizes, longest = [], [], max_positions(model.model.config)
    for lengths in RAGGED_LENGTHS:
        inputs = example_inputs(model, [min(length, longest) for length in lengths])
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            model_outputs = model(**inputs)
        for model_output, session_output in zip(model_outputs, session(inputs), strict=True):
            gap = (model_output - torch.from_numpy(session_output)).abs()
            reads_tokens = gap.shape[:2] == real.shape
            distances.append(float((gap[real] if reads_tokens else gap).max()))
            sizes.append(float((model_output[real] if reads_tokens else model_output).abs().max()))
    return Distance(float(np.max(distances)), max(sizes))  # of Python's own max, NaN is not always the largest


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
