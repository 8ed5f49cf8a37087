"""Changes to layers and embeddings leave everything else as it is."""

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from lad_dist.compression.layers import keep_layers, layer_numbers
from lad_dist.config.errors import UserError
from lad_dist.models.dims import encoder_layers
from lad_dist.models.frozen import model_digest


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


def test_layers_may_be_listed_in_any_order() -> None:
    model = toy.new_model()
    digests = [model_digest(layer) for layer in encoder_layers(model)]
    small = keep_layers(model, [4, 2])
    assert [model_digest(layer) for layer in encoder_layers(small)] == [digests[3], digests[1]]
    assert small.config.num_hidden_layers == 2
