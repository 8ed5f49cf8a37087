"""Changes to layers and embeddings leave everything else as it is."""

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lad_dist.compression.layers import (
    keep_layers,
    layer_numbers,
    random_embeddings,
    set_dropout,
)
from lad_dist.config.errors import UserError
from lad_dist.core.outputs import OutputSpec
from lad_dist.models import loading
from lad_dist.models.dims import encoder_layers
from lad_dist.models.forward import compute_outputs
from lad_dist.models.frozen import model_digest
from lad_dist.models.loading import PreTrainedModel

FAMILIES = {
    "bert": toy.SIZES,
    "roberta": {**toy.SIZES, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66},
    "electra": {**toy.SIZES, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
}


def toy_model(family: str = "bert") -> PreTrainedModel:
    torch.manual_seed(0)
    architecture = {"model_type": family, **FAMILIES[family]}
    return loading.create_model(architecture, "classification", vocab_size=90, labels=toy.LABELS).eval()


def outputs(model: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = toy.batch([5, 3, 9])
    with torch.no_grad():
        both = compute_outputs(model, batch, OutputSpec(logits=True, hidden=(layer,)))
    assert both.logits is not None
    return both.logits, both.hidden[layer]


@pytest.mark.parametrize(
    ("rule", "num_hidden_layers", "expected"),
    [
        ("even", 6, [2, 4, 6, 8, 10, 12]),
        ("even", 5, [2, 4, 7, 9, 12]),
        ("even", None, list(range(1, 13))),
        ("first", 3, [1, 2, 3]),
        ("last", 3, [10, 11, 12]),
        ([1, 12], None, [1, 12]),
    ],
)
def test_layer_numbers(rule: str | list[int], num_hidden_layers: int | None, expected: list[int]) -> None:
    assert layer_numbers(rule, num_hidden_layers, 12) == expected


@given(st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_even_layers_rise_and_end_with_the_last(sizes: tuple[int, int]) -> None:
    available, depth = sizes
    numbers = layer_numbers("even", depth, available)
    assert len(numbers) == len(set(numbers)) == depth
    assert numbers == sorted(numbers)
    assert numbers[-1] == available
    assert numbers[0] >= 1


@pytest.mark.parametrize(("rule", "num_hidden_layers"), [("even", 13), ([0], None), ([13], None)])
def test_layers_that_the_model_does_not_have(rule: str | list[int], num_hidden_layers: int | None) -> None:
    with pytest.raises(UserError, match=r"12 layers|layers 1 to 12"):
        layer_numbers(rule, num_hidden_layers, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_stay_are_those_of_the_model(family: str) -> None:
    """Its first two layers compute what they computed in the whole model, and its config counts two."""
    model = toy_model(family)
    digests = [model_digest(layer) for layer in encoder_layers(model)]
    _, second = outputs(model, 2)
    small = keep_layers(model, [1, 2])
    assert [model_digest(layer) for layer in encoder_layers(small)] == digests[:2]
    assert small.config.num_hidden_layers == 2
    torch.testing.assert_close(outputs(small, 2)[1], second)


def test_layers_may_be_listed_in_any_order() -> None:
    model = toy_model()
    digests = [model_digest(layer) for layer in encoder_layers(model)]
    small = keep_layers(model, [4, 2])
    assert [model_digest(layer) for layer in encoder_layers(small)] == [digests[3], digests[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_embeddings_are_new_and_the_rest_is_not(family: str) -> None:
    model = toy_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_embeddings(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-2] for name in changed} >= {"word_embeddings", "position_embeddings"}
    assert all("embeddings" in name for name in changed)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_positions_leave_words_and_layers_alone(family: str) -> None:
    model = toy_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    toy.compress(model, "scale_position_embeddings", scale=0.1)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-2] for name in changed} <= {"position_embeddings", "token_type_embeddings"}
    assert any("position_embeddings" in name for name in changed)
    assert all(torch.equal(model.state_dict()[name], 0.1 * before[name]) for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_set_dropout_by_kind(family: str) -> None:
    model = set_dropout(toy_model(family), 0.25, 0.5)
    attention = {m.dropout.p for name, m in model.named_modules() if type(m).__name__.endswith("SelfAttention")}
    others = {
        child.p
        for m in model.modules()
        if not type(m).__name__.endswith("SelfAttention")
        for child in m.children()
        if isinstance(child, nn.Dropout)
    }
    assert attention == {0.5}
    assert others == {0.25}
    set_dropout(model, None, 0.0)
    assert {m.dropout.p for m in model.modules() if type(m).__name__.endswith("SelfAttention")} == {0.0}
