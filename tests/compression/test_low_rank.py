"""Low rank: the nearest product, in the weights or on a sample; merged and compact forms have the same function."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import toy_families
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lad_dist.compression import compressed_module, products
from lad_dist.compression.base import CompressionContext
from lad_dist.compression.products import LowRankEmbedding, LowRankLinear
from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.outputs import ModelOutputs, OutputSpec
from lad_dist.models import activations, loading
from lad_dist.models.dims import count_parameters, encoder_layers
from lad_dist.models.forward import compute_outputs
from lad_dist.models.loading import PreTrainedModel
from lad_dist.training import run_spec
from lad_dist.training.train import train

SAMPLE = [toy.batch([9, 30, 5, 17], seed=seed, labels=[0, 1, 1, 0]) for seed in range(3)]
logits = partial(toy.logits, batch=SAMPLE[0])
SIZES = st.tuples(st.integers(2, 12), st.integers(2, 12)).flatmap(
    lambda sizes: st.tuples(st.just(sizes[0]), st.just(sizes[1]), st.integers(1, min(sizes)))
)


def toy_model(family: str = "bert") -> PreTrainedModel:
    torch.manual_seed(0)
    architecture = {"model_type": toy_families.kind(family), "initializer_range": 0.2, **toy_families.SIZES[family]}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    return loading.create_model(
        architecture, "classification", vocab_size=90, special_ids=special, labels=toy.LABELS
    ).eval()


@settings(max_examples=25)
@given(SIZES, st.booleans())
def test_a_product_is_the_nearest_to_a_map(sizes: tuple[int, int, int], bias: bool) -> None:
    """The error is what the dropped singular values hold (Eckart and Young)."""
    rows, columns, rank = sizes
    torch.manual_seed(rows * columns)
    linear, x = nn.Linear(columns, rows, bias=bias), torch.randn(7, columns)
    product, error = LowRankLinear.from_module(linear, rank)
    merged, small = product.merge(), product.to_compact()
    assert isinstance(merged, nn.Linear)
    values = torch.linalg.svdvals(linear.weight.detach())
    assert (merged.weight - linear.weight).norm().item() == pytest.approx(values[rank:].norm().item(), abs=1e-5)
    assert error.item() == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-6)
    torch.testing.assert_close(merged(x), product(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small(x), product(x), rtol=1e-5, atol=1e-5)
    assert count_parameters(small) == min(count_parameters(product), count_parameters(merged))


@settings(max_examples=25)
@given(SIZES, st.booleans())
def test_a_product_is_the_nearest_to_embeddings(sizes: tuple[int, int, int], padded: bool) -> None:
    count, width, rank = sizes
    torch.manual_seed(count * width)
    embeddings, input_ids = nn.Embedding(count, width, padding_idx=1 if padded else None), torch.arange(count)
    product, _ = LowRankEmbedding.from_module(embeddings, rank)
    merged, small = product.merge(), product.to_compact()
    assert isinstance(merged, nn.Embedding)
    assert merged.padding_idx == embeddings.padding_idx
    dropped = torch.linalg.svdvals(embeddings.weight.detach())[rank:]
    assert (merged.weight - embeddings.weight).norm().item() == pytest.approx(dropped.norm().item(), abs=1e-5)
    torch.testing.assert_close(merged(input_ids), product(input_ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small(input_ids), product(input_ids), rtol=1e-5, atol=1e-5)
    assert count_parameters(small) == min(count_parameters(product), count_parameters(merged))


def test_a_padding_word_learns_nothing_as_before() -> None:
    product, _ = LowRankEmbedding.from_module(nn.Embedding(9, 6, padding_idx=1), 3)
    product(torch.tensor([0, 1, 2])).square().sum().backward()
    assert product.inner.weight.grad is not None
    assert [row.any().item() for row in product.inner.weight.grad[:4]] == [True, False, True, False]


@settings(max_examples=40)
@given(SIZES, st.integers(1, 20), st.integers(0, 100))
def test_a_weighted_product_is_never_worse_on_the_sample_and_never_better_in_the_weights(
    sizes: tuple[int, int, int], rows: int, seed: int
) -> None:
    """Than the truncated SVD, also where the sample does not show all directions."""
    count, width, rank = sizes
    torch.manual_seed(seed)
    weight, scale = torch.randn(count, width).double(), torch.logspace(0, 1, width).double()
    x = torch.randn(rows, width).double() * scale
    plain, weighted = (_product(weight, rank, second_moment) for second_moment in (None, x.T @ x))

    def error(product: Tensor, on: Tensor) -> float:
        return (on @ (product - weight).T).norm().item()

    everything = torch.eye(width).double()
    assert error(weighted, x) <= error(plain, x) + 1e-8
    assert error(weighted, everything) >= error(plain, everything) - 1e-8


@settings(max_examples=25)
@given(SIZES, st.floats(0.01, 100))
def test_white_inputs_weigh_nothing(sizes: tuple[int, int, int], scale: float) -> None:
    count, width, rank = sizes
    torch.manual_seed(count * width)
    weight = torch.randn(count, width).double()
    plain = _product(weight, rank, None)
    torch.testing.assert_close(_product(weight, rank, scale * torch.eye(width).double()), plain)
    torch.testing.assert_close(_product(weight, rank, torch.full((width,), scale).double()), plain)


def test_a_diagonal_is_a_second_moment_too() -> None:
    torch.manual_seed(0)
    weight, diagonal = torch.randn(5, 7).double(), torch.rand(7).double()
    torch.testing.assert_close(_product(weight, 3, diagonal), _product(weight, 3, torch.diag(diagonal)))


def test_a_weighted_product_is_the_best_possible() -> None:
    """No step of a descent on the damped error makes it smaller."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 7).double(), torch.randn(30, 7).double() @ torch.randn(7, 7).double()
    second_moment = x.T @ x
    damped = second_moment + products.DAMPING * second_moment.diagonal().mean() * torch.eye(7)
    a, b, relative = products.factors(weight, 3, second_moment)
    a.requires_grad_()
    b.requires_grad_()

    def loss() -> Tensor:
        error = b @ a - weight
        return (error @ damped * error).sum()

    best = loss()
    assert relative.item() ** 2 == pytest.approx((best / (weight @ damped * weight).sum()).item())
    for gradient in torch.autograd.grad(best, (a, b)):
        assert gradient.norm() < 1e-6 * best
    with torch.no_grad():
        for _ in range(20):
            a += 0.01 * torch.randn_like(a)
            assert loss() > best


def _product(weight: Tensor, rank: int, second_moment: Tensor | None) -> Tensor:
    a, b, _ = products.factors(weight, rank, second_moment)
    return b @ a


@pytest.mark.parametrize("second_moment", [None, torch.rand(4)])
def test_both_factors_have_the_same_singular_values(second_moment: Tensor | None) -> None:
    a, b, _ = products.factors(torch.randn(6, 4), 3, second_moment)
    torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_as_precise_as_what_it_replaces(dtype: torch.dtype) -> None:
    linear, embedding = nn.Linear(4, 6, dtype=dtype), nn.Embedding(9, 6, dtype=dtype)
    for product in (LowRankLinear.from_module(linear, 2)[0], LowRankEmbedding.from_module(embedding, 2)[0]):
        for module in (product, product.merge(), product.to_compact()):
            assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("family", toy_families.SIZES)
def test_second_moments_are_of_real_tokens(family: str) -> None:
    """Whether a family runs flat or padded, whatever is padded besides: as of each sequence alone."""
    model = toy_model(family)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer" in name]
    modules = {name: model.get_submodule(name) for name in names}
    alone = [toy.batch([n], seed=n) for n in (9, 30, 5)]
    together = _joined(alone)
    padded = together._replace(computed_tokens=together.computed_tokens + 3)
    expected, actual = (products.second_moments(model, modules, batches) for batches in (alone, [padded]))
    assert expected.keys() == set(names)
    for name in names:
        if "pos_" not in name and not _reads_positions(model, name):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)


def _reads_positions(model: PreTrainedModel, name: str) -> bool:
    """DeBERTa's maps that see the embeddings of relative positions too, once for each forward."""
    return bool(getattr(model.config, "share_att_key", False)) and name.endswith(("key_proj", "query_proj"))


def _joined(batches: list[Batch]) -> Batch:
    """The same sequences in one batch, with padding to attend around."""
    lengths = [int(batch.lengths[0]) for batch in batches]
    together = toy.batch(lengths)
    return together._replace(input_ids=torch.cat([batch.input_ids for batch in batches]))


def test_rows_leave_padding_out() -> None:
    batch = toy.batch([2, 3], pad_to=4)
    flat = torch.arange(8.0)[None, :, None]
    assert activations.token_rows(flat, batch).flatten().tolist() == [0, 1, 4, 5, 6]
    assert activations.token_rows(flat.view(2, 4, 1), batch).flatten().tolist() == [0, 1, 4, 5, 6]
    assert activations.token_rows(torch.zeros(2, 1, 3), batch).shape == (2, 3)


def test_words_count_once_more_than_they_occur() -> None:
    model = toy_model()
    modules = {"words": model.get_input_embeddings()}
    counts = products.second_moments(model, modules, [toy.batch([3, 2], pad_to=4), toy.batch([4])])["words"]
    input_ids = torch.cat([toy.batch([3, 2]).input_ids, toy.batch([4]).input_ids])
    assert counts.tolist() == [1.0 + (input_ids == word).sum().item() for word in range(90)]


def lowered(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return toy.compress(model, "low_rank", CompressionContext(lambda: SAMPLE), **options)


def test_it_replaces_the_maps_that_match_and_keeps_the_share() -> None:
    model = toy_model()
    before = count_parameters(encoder_layers(model))
    lowered(model, keep=0.5)
    assert len(compressed_module.compressed_modules(model)) == 4 * 6  # query, key, value, output, intermediate, output
    assert 0.4 < count_parameters(encoder_layers(model)) / before < 0.6
    assert isinstance(model.classifier, nn.Linear)
    assert len(compressed_module.compressed_modules(lowered(toy_model(), keep=0.5, modules=r"layer\.0\..*query"))) == 1


def test_embeddings_have_a_share_of_their_own() -> None:
    model = lowered(toy_model(), keep=1.0, embeddings=0.5)
    (product,) = compressed_module.compressed_modules(model)
    assert product is model.get_input_embeddings()
    assert count_parameters(product) == 11 * (90 + 32)  # 0.5 · 90 · 32 / 122 is 11.8


@pytest.mark.parametrize("activation_aware", [False, True])
@pytest.mark.parametrize("family", toy_families.SIZES)
def test_products_merged_and_compact_forms_have_one_function(family: str, activation_aware: bool) -> None:
    """q, k and v are recorded through products too."""

    def outputs(model: nn.Module) -> ModelOutputs:
        with torch.no_grad():
            return compute_outputs(model, SAMPLE[0], OutputSpec(logits=True, hidden=(0, 4), qkv=(1, 4)))  # type: ignore[arg-type]

    def model() -> PreTrainedModel:
        return lowered(toy_model(family), keep=0.4, embeddings=0.4, activation_aware=activation_aware)

    plain = toy_model(family).state_dict()
    expected = outputs(model())
    merged = compressed_module.merge_all(model())
    assert not compressed_module.compressed_modules(merged)
    assert {name: x.shape for name, x in merged.state_dict().items()} == {name: x.shape for name, x in plain.items()}
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-4)
    small = compressed_module.replace_all(model(), compressed_module.COMPACT)
    assert count_parameters(small) < 0.6 * count_parameters(merged)
    torch.testing.assert_close(outputs(small), expected, rtol=1e-4, atol=1e-4)


def test_a_sample_makes_the_outputs_on_it_nearer() -> None:
    before, model = logits(toy_model()), toy_model()
    plain, weighted = (
        logits(lowered(toy_model(), keep=0.6, embeddings=0.6, activation_aware=aware)) for aware in (False, True)
    )
    assert not torch.equal(plain, weighted)
    assert (weighted - before).norm() < (plain - before).norm()
    assert model.training is lowered(model, keep=0.6, activation_aware=True).training is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "modules": "nowhere"}, "compression low_rank: no linear map's name matches 'nowhere'"),
        ({"keep": 0.5, "modules": "("}, r"compression low_rank: modules: not a regular expression \(missing \)"),
        ({"keep": 1.0}, "keep and embeddings are 1, which leaves all as it is"),
        ({"keep": 1.0, "embeddings": 0.0}, "embeddings: input should be greater than 0"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy.compress(toy_model(), "low_rank", **options)


def test_twice_is_refused() -> None:
    with pytest.raises(UserError, match="no linear map's name matches"):
        lowered(lowered(toy_model(), keep=0.5), keep=0.5)
    with pytest.raises(UserError, match="of low rank already"):
        lowered(lowered(toy_model(), keep=1.0, embeddings=0.5), keep=1.0, embeddings=0.5)


TIED = "compression {}: the MLM head reads the word embeddings, .* leave embedding"


@pytest.mark.parametrize(
    "listed",
    [
        {"name": "low_rank", "keep": 0.5, "embeddings": 0.5},
        {"name": "ladabert", "embedding": 2.0, "svd": 2.0, "weight": 1.0},
    ],
    ids=["low_rank", "ladabert"],
)
def test_embeddings_that_a_head_reads_are_refused_before_weights_are_read(
    listed: dict[str, Any], world: World, tmp_path: Path, no_weights: None
) -> None:
    tables = toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
    config = toy.parsed(tables, {"objective": {"name": "kd"}, "compression": [listed]})
    with pytest.raises(UserError, match=TIED.format(listed["name"])):
        run_spec.resolve_run(config)


def test_scaled_positions_are_not_words_of_low_rank() -> None:
    model = lowered(toy_model(), keep=1.0, embeddings=0.5)
    word_embeddings = [weight.clone() for weight in model.get_input_embeddings().parameters()]
    toy.compress(model, "scale_position_embeddings", scale=0.1)
    assert all(map(torch.equal, word_embeddings, model.get_input_embeddings().parameters()))


def test_a_run_reports_what_was_lost(world: World, tmp_path: Path) -> None:
    """For each module; on a sample less of what its outputs hold than without it."""
    errors = {}
    for weighted in (False, True):
        tables = toy.task_config(tmp_path / str(weighted), world.files, world.teacher, world.teacher)
        compressions = [{"name": "low_rank", "keep": 0.5, "embeddings": 0.5, "activation_aware": weighted}]
        config = toy.parsed(tables, {"run.steps": 1, "objective": {"name": "kd"}, "compression": compressions})
        rows: list[dict[str, Any]] = []
        results = train(config, rows.append).results
        assert rows[0].pop("step") == 0
        rows[0].pop("steps")
        initial_values = {name: value for name, value in rows[0].items() if not name.startswith("teacher/")}
        assert initial_values.items() <= results["student"].items()
        errors[weighted] = initial_values
    assert errors[False].keys() == errors[True].keys()
    assert len(errors[False]) == 2 * 6 + 1
    prefix = "initial_error/low_rank/"
    assert {f"{prefix}embeddings.word_embeddings", f"{prefix}encoder.layer.1.output.dense"} < errors[False].keys()
    assert all(0 < error < 1 for run_errors in errors.values() for error in run_errors.values())
    assert sum(errors[True].values()) < sum(errors[False].values())
