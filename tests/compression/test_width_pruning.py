"""Narrow models lose nothing at full width and the least possible below it; impossible widths are refused."""

from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
import toy
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.compression.width_pruning.heads import HeadMap, cut_scores, cut_values
from lad_dist.compression.width_pruning.narrow import Widths, check_widths, narrow_model
from lad_dist.compression.width_pruning.statistics import nearest_to_coordinates
from lad_dist.config.errors import UserError
from lad_dist.core.outputs import OutputSpec
from lad_dist.models import loading
from lad_dist.models.dims import model_dims
from lad_dist.models.forward import compute_outputs
from lad_dist.models.hf_config import architecture_config, load_hf_config
from lad_dist.models.loading import PreTrainedModel, save_model
from lad_dist.training import run_spec
from lad_dist.training.train import train

WIDE = Widths(hidden_size=32, num_attention_heads=4, intermediate_size=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": toy.SIZES,
    "roberta": {**toy.SIZES, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66},
    "electra": {**toy.SIZES, "embedding_size": 12},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
}
SAMPLE = [toy.batch([9, 30, 5, 17], seed=seed, labels=[0, 1, 1, 0]) for seed in range(20)]
ELSEWHERE = toy.batch([7, 12], seed=99, labels=[0, 1])


def toy_model(family: str = "bert", head: Any = "classification") -> PreTrainedModel:
    torch.manual_seed(0)
    labels = toy.LABELS if head == "classification" else ()
    architecture = {"model_type": family, "initializer_range": 0.2, **FAMILIES[family]}
    return loading.create_model(architecture, head, vocab_size=50, labels=labels).eval()


@pytest.mark.parametrize("head", ["classification", "mlm", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_lost_at_full_width(family: str, head: str) -> None:
    """Neither on the sample nor elsewhere."""
    model = toy_model(family, head)
    same, errors = narrow_model(model, SAMPLE[:3], WIDE, "principal")
    assert errors == pytest.approx(dict.fromkeys(errors, 0.0), abs=1e-5)
    assert ("logits" in errors) == (head != "none")
    output_spec = OutputSpec(logits=head != "none", hidden=(0, 1, 4))
    with torch.no_grad():
        actual, expected = (compute_outputs(encoder, ELSEWHERE, output_spec) for encoder in (same, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["classification", "mlm", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_model_is_an_ordinary_one(family: str, head: Any, tmp_path: Path) -> None:
    small, errors = narrow_model(toy_model(family, head), SAMPLE[:3], Widths(16, 2, 20), "principal")
    save_model(small, tmp_path)
    again = loading.load_model(str(tmp_path), head, labels=toy.LABELS if head == "classification" else ())
    assert model_dims(again.config, head).hidden_size == 16
    assert model_dims(again.config, head).num_attention_heads == 2
    assert max(errors.values()) < 1.5
    output_spec = OutputSpec(hidden=(4,))
    with torch.no_grad():
        hidden = compute_outputs(again.eval(), ELSEWHERE, output_spec).hidden[4]
        torch.testing.assert_close(hidden, compute_outputs(small, ELSEWHERE, output_spec).hidden[4])


def test_what_is_lost_falls_with_width_and_faster_along_principal_directions() -> None:
    losses: dict[str, list[float]] = {"principal": [], "random": []}
    errors: dict[str, list[float]] = {"principal": [], "random": []}
    for width in (8, 16, 24, 28) if sweep.enabled else (8, 28):
        for basis in losses:
            torch.manual_seed(1)
            widths = Widths(width, 4, 2 * width)
            _, measured = narrow_model(toy_model(), SAMPLE, widths, basis)  # type: ignore[arg-type]
            losses[basis].append(sum(value**2 for name, value in measured.items() if name.startswith("lost")))
            errors[basis].append(sum(value**2 for name, value in measured.items() if name.startswith("hidden")))
    for loss in losses.values():
        assert loss == sorted(loss, reverse=True)
    assert all(p < r for p, r in zip(losses["principal"], losses["random"], strict=True))
    assert sum(errors["principal"]) < sum(errors["random"])
    assert errors["principal"][-1] < errors["principal"][0]


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_heads_are_cut_to_the_largest_singular_values(size: int, seed: int) -> None:
    """Scores after the softmax's own freedom, and values in the stream, err by what the dropped values hold."""
    torch.manual_seed(seed)
    x = torch.randn(40, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 1
    covariance, mean = torch.cov(x.T, correction=0), x.mean(dim=0)
    query, key, value = (
        HeadMap(torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)) for _ in range(3)
    )

    def outputs(head_map: HeadMap) -> torch.Tensor:
        return x @ head_map.weight.T + head_map.bias

    def centred(scores: torch.Tensor) -> torch.Tensor:
        return scores - scores.mean(dim=1, keepdim=True)

    q, k = cut_scores(query, key, covariance, mean, size)
    exact, narrow = (centred(outputs(query) @ outputs(key).T / 6**0.5), centred(outputs(q) @ outputs(k).T / size**0.5))
    dropped = torch.linalg.svdvals(exact)[size:]
    assert (exact - narrow).norm().item() == pytest.approx(dropped.norm().item(), rel=1e-6)
    out = torch.randn(7, 6, dtype=torch.float64)
    v, narrow_out = cut_values(value, out, covariance, size)
    exact, narrow = ((y - y.mean(dim=0)) for y in (outputs(value) @ out.T, outputs(v) @ narrow_out.T))
    dropped = torch.linalg.svdvals(exact)[size:]
    assert (exact - narrow).norm().item() == pytest.approx(dropped.norm().item(), rel=1e-6)


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(0, 1000))
def test_axes_are_orthonormal_and_keep_their_span(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    span = torch.linalg.qr(torch.randn(7, width, dtype=torch.float64)).Q
    axes = nearest_to_coordinates(span)
    torch.testing.assert_close(axes.T @ axes, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(axes @ axes.T, span @ span.T)
    coordinates = axes.abs().argmax(dim=0)
    assert (axes[coordinates, range(width)] > 0).all()


def test_axes_of_coordinates_are_these_coordinates() -> None:
    span = torch.eye(5, dtype=torch.float64)[:, [1, 3]]
    turned = span @ torch.linalg.qr(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)).Q
    torch.testing.assert_close(nearest_to_coordinates(turned), span)


@pytest.mark.parametrize("corpus", [False, True])
def test_a_run_reports_what_the_student_lost(corpus: bool, world: World, tmp_path: Path) -> None:
    tables = (
        toy.corpus_config(tmp_path, world.corpus, world.pretrained, world.pretrained)
        if corpus
        else toy.task_config(tmp_path, world.files, world.teacher, world.teacher)
    )
    config = toy.parsed(tables, {"run.steps": 1, "student.hidden_size": 16, "objective": {"name": "kd"}})
    rows: list[dict[str, Any]] = []
    results = train(config, rows.append).results
    assert rows[0]["step"] == 0
    logged = {name: value for name, value in rows[0].items() if name.startswith("initial_error/")}
    assert set(logged) == {
        f"initial_error/{name}" for name in ("logits", *(f"{k}/{n}" for k in ("hidden", "lost") for n in (0, 1, 2)))
    }
    assert logged.items() <= results["student"].items()
    exported = load_hf_config(str(config.run.folder / "export"))
    assert (exported.hidden_size, exported.intermediate_size, exported.num_hidden_layers) == (16, 32, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.hidden_size": 64}, "student.hidden_size = 64, but .* has 32"),
        ({"student.hidden_size": 30}, "4 heads do not divide a width of 30 .* take"),
        ({"student.hidden_size": 16, "student.num_attention_heads": 1}, "at most 8, as .* take 2 or 4"),
        ({"student.intermediate_size": 65}, "student.intermediate_size = 65, but .* has 64"),
        ({"student": {"architecture": toy.SIZES, "hidden_size": 16}}, "hidden_size narrows the model at path"),
        ({"student.hidden_size": 16, "objective": {"name": "lad"}}, "16 wide"),
    ],
)
def test_impossible_widths_are_refused(changes: dict[str, Any], message: str, world: World, tmp_path: Path) -> None:
    tables = toy.task_config(tmp_path, world.files, world.teacher, world.teacher)
    with pytest.raises(UserError, match=message):
        run_spec.resolve_run(toy.parsed(tables, {"objective": {"name": "kd"}} | changes))


def test_models_that_cannot_be_narrowed_are_refused() -> None:
    config = architecture_config({"model_type": "albert", "hidden_size": 32, "num_attention_heads": 4}, 50)
    with pytest.raises(UserError, match="albert cannot be narrowed, only bert"):
        check_widths(config, 16, None, None, "here")
    config = architecture_config({"model_type": "electra", **FAMILIES["electra"]}, 50)
    with pytest.raises(UserError, match="as wide as here's embeddings"):
        check_widths(config, 12, None, None, "here")
