"""Rounding as in the int8 file: against naive twins, onnxruntime itself, and the file of a trained student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweep
import torch
import toy
import toy_families
from conftest import World
from numpy.typing import NDArray
from torch import Tensor, nn

from lad_dist.compression import compact, compressed_module
from lad_dist.compression.footprint import INT8
from lad_dist.compression.quantize import Grid, QuantizedEmbedding, QuantizedLinear
from lad_dist.config.errors import UserError
from lad_dist.core.outputs import OutputSpec
from lad_dist.core.step_state import StepState
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation import latency, onnx_export
from lad_dist.models import loading
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import InferenceModel
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training import run_spec
from lad_dist.training.distiller import Distiller
from lad_dist.training.train import train

QUANTIZE: dict[str, Any] = {"name": "quantize"}
LOW_RANK: dict[str, Any] = {"name": "low_rank", "keep": 0.8, "embeddings": 0.8}
PRUNE: dict[str, Any] = {"name": "prune", "sparsity": 0.6, "end": 0.0}


def weights(seed: int, rows: int = 40, columns: int = 24) -> Tensor:
    """Rows of many sizes; one of zeros, one of numbers too small for fp32, one with numbers half-way between two."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.logspace(-6, 6, rows)[:, None]
    weight[0], weight[1] = 0.0, 1e-40
    weight[2] = torch.arange(columns) + 0.5
    weight[2, 0] = 64.0
    return weight


# Against naive twins and onnxruntime


def test_a_weight_is_rounded_row_by_row() -> None:
    weight = weights(0)
    expected = np.zeros(weight.shape, dtype=np.float32)
    for row, numbers in enumerate(weight.numpy()):
        scale = np.float32(max(abs(number) for number in numbers) / 64)
        for column, number in enumerate(numbers):
            if scale >= np.finfo(np.float32).tiny:
                expected[row, column] = np.round(number / scale) * scale
    assert np.array_equal(Grid.of_weight(weight).round(weight).numpy(), expected)
    assert expected[2, 1:6].tolist() == [2.0, 2.0, 4.0, 4.0, 6.0]  # halves go to the even number


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_has_the_codes_of_onnxruntime(seed: int) -> None:
    quant_utils, int8 = _quant_utils(), _types().INT8
    weight = weights(seed)
    grid = Grid.of_weight(weight)
    for row, scale, codes in zip(weight.numpy(), grid.scale, grid.codes(weight), strict=True):
        zero, expected_scale, expected = quant_utils.quantize_data(row, int8, symmetric=True, reduce_range=True)
        assert (zero, expected_scale) == (0, scale.numpy())
        assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize(
    "table", [weights(1)[5:20], weights(2)[5:20].abs(), -weights(3)[5:20].abs(), torch.zeros(3, 2)]
)
def test_a_table_has_the_codes_of_onnxruntime(table: Tensor) -> None:
    _assert_codes_of_onnxruntime(table)


def test_a_rounded_table_stays_as_it_is() -> None:
    """The file has the codes of the table that the student trained with, and rounds the exported one to itself."""
    for seed in range(20):
        torch.manual_seed(seed)
        module = QuantizedEmbedding(nn.Embedding(50, 16))
        merged = module.merge().weight.detach()
        grid, again = Grid.of_table(module.weight), Grid.of_table(merged)
        assert torch.equal(grid.codes(module.weight.detach()) - grid.low, again.codes(merged) - again.low)
        torch.testing.assert_close(grid.scale, again.scale, rtol=3e-7, atol=0)
        assert torch.equal(again.round(merged), merged)
        _assert_codes_of_onnxruntime(merged)


def test_a_table_that_is_not_finite_stays_so() -> None:
    module = QuantizedEmbedding(nn.Embedding(5, 3))
    for number in (torch.nan, torch.inf):
        module.weight.data[2, 1] = number
        assert not module.merge().weight.isfinite().all()


def test_inputs_are_rounded_as_dynamic_quantize_linear_does() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(3, 5, 40) * 10.0**seed + seed % 3
        quantized, scale, zero = _dynamic_quantize_linear(x)
        grid = Grid.of_inputs(x)
        assert (grid.scale.numpy(), grid.low.numpy()) == (scale, -np.float32(zero))
        assert np.array_equal((grid.codes(x) - grid.low).numpy(), quantized)


def _assert_codes_of_onnxruntime(table: Tensor) -> None:
    zero, scale, expected = _quant_utils().quantize_data(table.numpy().flatten(), _types().UINT8, symmetric=False)
    grid = Grid.of_table(table)
    assert grid.scale.numpy() == scale
    assert grid.low == -float(zero)
    assert np.array_equal((grid.codes(table) - grid.low).numpy().flatten(), expected)


def _quant_utils() -> Any:
    from onnxruntime.quantization import quant_utils

    return quant_utils


def _types() -> Any:
    from onnx import TensorProto

    return TensorProto


def _dynamic_quantize_linear(x: Tensor) -> list[NDArray[Any]]:
    import onnxruntime
    from onnx import TensorProto, helper

    names, kinds = ("y", "scale", "zero"), (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
    outputs = [helper.make_tensor_value_info(*output, None) for output in zip(names, kinds, strict=True)]
    node = helper.make_node("DynamicQuantizeLinear", ["x"], names)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x.numpy()}))


# The modules


def linear(weight: list[list[float]]) -> nn.Linear:
    plain = nn.Linear(len(weight[0]), len(weight))
    plain.weight.data, plain.bias.data = torch.tensor(weight), torch.full((len(weight),), 0.5)
    return plain


def test_gradients_are_those_of_the_rounded_numbers() -> None:
    """Steps of 1: the weight 64, 1.4 is 64, 1, and the input 255, 0.6 is 255, 1."""
    module = QuantizedLinear(linear([[64.0, 1.4]]))
    x = torch.tensor([[255.0, 0.6]], requires_grad=True)
    y = module(x)
    y.backward()
    assert y.item() == 64 * 255 + 1 + 0.5
    assert x.grad is not None
    assert x.grad.tolist() == [[64.0, 1.0]]
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[255.0, 1.0]]


def test_gradients_of_embeddings_pass() -> None:
    plain = nn.Embedding(4, 2, padding_idx=0)
    plain.weight.data = torch.tensor([[0.0, 0.0], [-55.0, 1.4], [200.0, 3.0], [7.0, 7.0]])
    module = QuantizedEmbedding(plain)
    rows = module(torch.tensor([[1, 0, 1]]))
    (rows * torch.tensor([1.0, 2.0])).sum().backward()
    assert rows.tolist() == [[[-55.0, 1.0], [0.0, 0.0], [-55.0, 1.0]]]
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[0.0, 0.0], [2.0, 4.0], [0.0, 0.0], [0.0, 0.0]]


def test_inputs_that_are_rounded_already_stay() -> None:
    module = QuantizedLinear(linear([[64.0, 1.4]]), rounds_inputs=False)
    assert module(torch.tensor([[255.0, 0.6]])).item() == pytest.approx(64 * 255 + 0.6 + 0.5)


def test_bf16_is_rounded_in_fp32() -> None:
    plain = nn.Linear(24, 40).bfloat16()
    x = torch.randn(7, 24).bfloat16()
    rounded = [Grid.of_weight(plain.weight).round(plain.weight.float()), Grid.of_inputs(x.float()).round(x.float())]
    expected = nn.functional.linear(rounded[1].bfloat16(), rounded[0].bfloat16(), plain.bias)
    module = QuantizedLinear(plain)
    assert torch.equal(module(x), expected)
    merged = module.merge()
    assert torch.equal(merged.weight, rounded[0])
    assert torch.equal(Grid.of_weight(merged.weight).round(merged.weight.detach()), merged.weight)


def test_it_rounds_after_a_share_of_the_training_and_in_evaluation() -> None:
    plain = toy.new_model()
    expected = toy.logits(plain)
    model = toy.compress(toy.new_model(), "quantize", begin=0.5)
    rounded = toy.logits(model)
    assert not torch.equal(rounded, expected)
    for step, logits in ((0, expected), (4, expected), (5, rounded), (9, rounded)):
        for module in compressed_module.compressed_modules(model):
            module.on_step_start(StepState(step, 10, 0))
        model.train()
        actual = compute_outputs(model, toy.BATCH, OutputSpec(logits=True)).logits
        assert actual is not None
        assert torch.equal(actual, logits)
        assert torch.equal(toy.logits(model), rounded)


def test_the_filler_of_a_flat_batch_widens_no_range() -> None:
    model, batch = toy.compress(toy.new_model(), "quantize"), toy.batch([9, 9, 9])
    alone = toy.logits(model, batch._replace(computed_tokens=27))
    assert torch.equal(toy.logits(model, batch._replace(computed_tokens=91)), alone)


# With other compressions


@pytest.mark.parametrize(
    "compressions",
    [[QUANTIZE], [PRUNE, QUANTIZE], [LOW_RANK, PRUNE, QUANTIZE]],
    ids=["alone", "pruned", "low rank and pruned"],
)
def test_the_compact_form_is_a_byte_a_weight_and_the_trained_student(
    compressions: list[dict[str, Any]], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds to itself, bit for bit, and computes what was trained but for the rounding of inputs."""
    seen: dict[str, Any] = {}
    export = Distiller.export

    def watched(distiller: Distiller) -> PreTrainedModel:
        for module in distiller.student.modules():
            if isinstance(module, QuantizedLinear):
                module.rounds_inputs = False
        seen["logits"] = toy.logits(distiller.student)  # type: ignore[arg-type]
        return export(distiller)

    monkeypatch.setattr(Distiller, "export", watched)
    folder = run(world, tmp_path, compressions).folder / "export"
    small = compact.load_compact(folder)
    whole = loading.load_model(str(folder), "classification", require_head=True)
    for model in (small, whole):
        torch.testing.assert_close(toy.logits(model), seen["logits"], rtol=1e-5, atol=1e-5)
    for module in small.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            grid = (Grid.of_weight if isinstance(module, nn.Linear) else Grid.of_table)(module.weight)
            assert torch.equal(grid.round(module.weight.detach()), module.weight)
    if LOW_RANK not in compressions:
        assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in small.state_dict().items())
    if PRUNE in compressions:
        maps = [module for name, module in small.named_modules() if "layer." in name and isinstance(module, nn.Linear)]
        assert sum(int((each.weight == 0).sum()) for each in maps) > 0.5 * sum(each.weight.numel() for each in maps)
    share = (folder / compact.COMPACT_FILE).stat().st_size / (folder / "model.safetensors").stat().st_size
    assert share < (0.45 if PRUNE not in compressions else 0.4)  # headers and biases weigh on a toy


def test_rounded_weights_are_packed_without_loss() -> None:
    for weight in (weights(4), weights(5).where(torch.rand(40, 24) > 0.7, 0.0)):
        rounded = Grid.of_weight(weight).round(weight)
        packed = dict(compact._pack_weight("w", rounded))
        assert torch.equal(compact._unpack_weights(packed, {"w": list(weight.shape)})["w"], rounded)
        assert packed.get("w", packed.get("w.values")).dtype == torch.uint8  # type: ignore[union-attr]


def run(world: World, work: Path, compressions: list[dict[str, Any]], **changes: Any) -> Any:
    tables = toy.task_config(work, world.files, world.teacher, world.teacher, compression=compressions)
    return train(toy.parsed(tables, {"objective": {"name": "kd"}, "run.steps": 2, **changes}))


def test_zero_3_trains_the_same_student(world: World, tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    results = [
        run(world, tmp_path / str(number), [{**QUANTIZE, "begin": 0.5}], **changes).results
        for number, changes in enumerate(({}, {"deepspeed.zero_optimization": zero}))
    ]
    assert results[0]["metrics"]["loss"] == pytest.approx(results[1]["metrics"]["loss"], rel=1e-4)
    assert results[0]["student"]["bytes/compact"] == pytest.approx(results[1]["student"]["bytes/compact"], rel=0.01)


# The file


@pytest.mark.parametrize(
    ("family", "compressions"),
    [
        ("bert", [QUANTIZE]),
        ("roberta", [LOW_RANK, PRUNE, QUANTIZE]),
        *[(family, [QUANTIZE]) for family in toy_families.SIZES if "deberta" not in family and sweep.enabled],
    ],
)
def test_a_forward_is_that_of_the_int8_file(family: str, compressions: list[dict[str, Any]], tmp_path: Path) -> None:
    """The file has the codes of the student, and the same outputs.

    Where the two do not add up in one order, a number half-way between two values may go to the other one, and then
    outputs differ by more than rounding. That is rare, and far less than what int8 changes at all.
    """
    tokenizer = load_tokenizer(toy_families.tokenizer(family, tmp_path / "tokenizer"))
    layers = {"n_layers" if family == "distilbert" else "num_hidden_layers": 2}

    def student(listed: list[dict[str, Any]]) -> PreTrainedModel:
        model = toy_families.new_model(family, "classification", tokenizer, toy.LABELS, **layers)
        for options in listed:
            model = toy.compress(model, **options)
        return model.eval()

    model, file, int8 = student(compressions), tmp_path / "model.onnx", tmp_path / "model.int8.onnx"
    rounded = compressed_module.replace_all(student(compressions), compressed_module.COMPACT)
    onnx_export.export(InferenceModel(rounded), file)  # type: ignore[arg-type]
    onnx_export.quantize(file, int8)
    assert_codes_of_the_file(model, int8)
    session, plain = onnx_export.Session(int8), InferenceModel(student(compressions[:-1]))
    trained = InferenceModel(model)
    distances, changes = [], []
    for seed in range(12):
        # Padding outside ModernBERT's window attends to nothing, where the two compute different numbers.
        lengths = [9, 9, 9] if family == "modernbert" else [12, 5, 1, 9][seed % 4 :]
        inputs = onnx_export.example_inputs(plain, lengths, seed)
        with torch.no_grad():
            expected = trained(**inputs)[0].numpy()
            changes.append(np.abs(plain(**inputs)[0].numpy() - expected).max())
        distances.append(np.abs(session(inputs)[0] - expected).max())
    assert np.median(distances) < 1e-6
    assert np.mean(distances) < 0.1 * np.mean(changes)


def assert_codes_of_the_file(model: nn.Module, file: Path) -> None:
    import onnx
    from onnx import numpy_helper

    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer]
    stored = {array.tobytes() for array in arrays if array.ndim == 2 and array.dtype in (np.int8, np.uint8)}
    expected = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight = compressed_module.as_plain(module, compressed_module.MERGED).weight.detach()  # type: ignore
            expected.add(Grid.of_weight(weight).codes(weight).T.numpy().astype(np.int8).tobytes())
        elif isinstance(module, QuantizedEmbedding):
            grid = Grid.of_table(module.weight)
            expected.add((grid.codes(module.weight.detach()) - grid.low).numpy().astype(np.uint8).tobytes())
    assert stored == expected  # ALBERT has one weight in many layers


def test_the_int8_file_scores_what_training_says(world: World, tmp_path: Path) -> None:
    changes = {"objective": {"name": "supervised"}, "teacher": None, "run.steps": 12, "optim.lr": 3e-3}
    result = run(world, tmp_path, [QUANTIZE], **changes)
    table = latency.measure(latency.LatencyRequest(result.folder, [INT8], [1], [9], rounds=1))
    quality = table["quality"]["student"][INT8]["metrics"]
    assert quality["accuracy"] == result.results["metrics"]["accuracy"]


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "compression quantize: bits: "),
        ({"begin": 1.5}, "compression quantize: begin: input should be less than or equal to 1"),
    ],
)
def test_options_that_it_refuses(options: dict[str, Any], message: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(world, tmp_path, [{**QUANTIZE, **options}])


def test_a_masked_language_model_is_refused(world: World, tmp_path: Path, no_weights: None) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained, compression=[QUANTIZE])
    with pytest.raises(UserError, match="compression quantize: the MLM head reads the word embeddings, and the int8"):
        run_spec.resolve_run(toy.parsed(tables, {"objective": {"name": "kd"}}))


@pytest.mark.parametrize("sizes", [{"conv_kernel_size": 0}, {"relative_attention": False}], ids=["maps", "convolution"])
def test_a_deberta_is_refused(sizes: dict[str, Any]) -> None:
    architecture = toy_families.architecture("deberta-v2", **sizes)
    model = loading.create_model(architecture, "classification", vocab_size=90, labels=toy.LABELS)
    with pytest.raises(UserError, match="compression quantize: the int8 file of a deberta-v2 rounds maps of relative"):
        toy.compress(model, "quantize")
