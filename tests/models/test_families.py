"""Each family of encoders runs as transformers runs it, keeps sequences apart, distils, loses layers, and loads again.

A test holds the package README's table of families to what the models do here.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
import toy_families
from launching import ROOT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toy_families import LIKE, OF_TOKENS, SIZES, real
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from lad_dist.compression import compressed_module, footprint
from lad_dist.compression.layers import keep_layers, random_embeddings, set_dropout
from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import UserError
from lad_dist.config.evaluation_schema import EvaluateConfig
from lad_dist.core.batch import Batch, Head, pad, unpad
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.shards.prepare import prepare
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.models import families, library_versions, loading
from lad_dist.models.attention import _explicit_attention
from lad_dist.models.dims import check_length, encoder_layers, model_dims
from lad_dist.models.forward import compute_outputs
from lad_dist.models.heads import MODEL_CLASSES, declares_head
from lad_dist.models.hf_config import architecture_config, load_hf_config
from lad_dist.models.loading import PreTrainedModel, save_model
from lad_dist.objectives.registry import OBJECTIVES
from lad_dist.training.distiller import Distiller
from lad_dist.training.train import train

TABLE = (ROOT / "lad_dist" / "models" / "README.md").read_text().split("\n## Families\n")[1].split("\n## ")[0]
LENGTHS = [7, 3, 12, 1, 12]
LABELS = ("a", "b", "c")
EVERYTHING = OutputSpec(True, (0, 1, 2, 3, 4), (1, 4))
ALL = [*SIZES, *LIKE]


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tokenizer, written at its first use."""
    return cache(lambda family: toy_families.tokenizer(family, tmp_path_factory.mktemp("tokenizers") / family))


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders: Callable[[str], Path]) -> Callable[[str], PreTrainedTokenizerFast]:
    return cache(lambda family: load_tokenizer(tokenizer_folders("roberta" if family in LIKE else family)))


def batch_of(lengths: list[int], head: Head, tokenizer: PreTrainedTokenizerFast, pad_to: int | None = None) -> Batch:
    return toy_families.batch_of_pairs(lengths, head, len(tokenizer), pad_to, tokenizer.pad_token_id)


def labels_of(head: Head) -> tuple[str, ...]:
    return {"classification": LABELS, "tagging": LABELS, "question_answering": ("start", "end")}.get(head, ())


def transformers_output(folder: Path, head: Head, batch: Batch) -> Any:
    """The output of transformers' own forward over the padded batch, in its own attention."""
    model = MODEL_CLASSES[head].from_pretrained(folder).eval()
    ids = pad(batch.input_ids, batch).masked_fill(~batch.is_token, model.config.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": batch.is_token.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = pad(batch.token_type_ids, batch)
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


def flat_logits(output: Any, batch: Batch, head: Head) -> Tensor:
    if head == "question_answering":
        output = SimpleNamespace(logits=torch.stack([output.start_logits, output.end_logits], dim=-1))
    return unpad(output.logits, batch)[batch.head_positions] if head in OF_TOKENS else output.logits


@pytest.mark.parametrize("head", ["classification", "mlm"])
@pytest.mark.parametrize("family", ALL)
def test_flat_is_padded(family: str, head: Head, tokenizers: Any, tmp_path: Path) -> None:
    save_model(toy_families.new_model(family, head, tokenizers(family), labels_of(head)), tmp_path)
    model = loading.load_model(str(tmp_path), head, labels=labels_of(head)).eval()
    for pad_to in (None, 16):
        batch = batch_of(LENGTHS, head, tokenizers(family), pad_to)
        with torch.no_grad():
            outputs = compute_outputs(model, batch, EVERYTHING)
        expected = transformers_output(tmp_path, head, batch)
        assert outputs.logits.std() > 0.1
        torch.testing.assert_close(outputs.logits, flat_logits(expected, batch, head), rtol=1e-5, atol=1e-5)
        assert list(outputs.hidden) == [0, 1, 2, 3, 4]
        states = expected.hidden_states[-5:]  # ALBERT's first is as narrow as its embeddings, and counted before these
        for layer, hidden in outputs.hidden.items():
            flat = unpad(states[layer], batch)
            torch.testing.assert_close(real(hidden, batch), real(flat, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_sequences_that_share_a_span_are_each_alone(family: str, tokenizers: Any) -> None:
    """Spans of several sequences, empty sequences at the end: each as in a batch of its own."""
    model = toy_families.new_model(family, "mlm", tokenizers(family))
    batch = batch_of(LENGTHS, "mlm", tokenizers(family))
    batch = batch._replace(token_type_ids=torch.zeros_like(batch.token_type_ids))
    batches = [
        toy.batch([n])._replace(input_ids=ids, head_positions=torch.tensor(sorted({0, n - 1})))
        for n, ids in zip(LENGTHS, batch.input_ids.split(LENGTHS), strict=True)
    ]
    with torch.no_grad():
        alone = [compute_outputs(model, one, EVERYTHING) for one in batches]
        for span in (12, 40):
            outputs = compute_outputs(model, toy.packed(batch, span), EVERYTHING)
            torch.testing.assert_close(outputs.logits, torch.cat([x.logits for x in alone]), rtol=1e-5, atol=1e-5)
            for layer in EVERYTHING.hidden:
                expected = torch.cat([x.hidden[layer] for x in alone])
                torch.testing.assert_close(outputs.hidden[layer], expected, rtol=1e-5, atol=1e-5)
            for layer in EVERYTHING.qkv:
                for index, projection in enumerate(outputs.qkv[layer]):
                    expected = torch.cat([x.qkv[layer][index] for x in alone])
                    torch.testing.assert_close(projection, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_a_layer_has_the_modules_of_the_family_table(family: str, tokenizers: Any) -> None:
    """DeBERTa-v3 has no maps for positions alone."""
    model = toy_families.new_model(family, "none", tokenizers(family))
    names = {name for name, _ in encoder_layers(model)[0].named_modules()}
    paths = families.family_of(model.config).modules.by_role()
    missing = {role for role, path in paths.items() if path not in names}
    assert missing == ({"position_query", "position_key"} if family == "deberta-v3" else set())


MAPS = {"distilbert": ("q_lin", "k_lin", "v_lin"), "mpnet": ("q", "k", "v")}
MAPS |= dict.fromkeys(("deberta-v2", "deberta-v3"), ("query_proj", "key_proj", "value_proj"))


@pytest.mark.parametrize("family", [family for family in SIZES if family != "modernbert"])
def test_queries_keys_and_values_are_those_of_the_layer(family: str, tokenizers: Any) -> None:
    """Maps of the hidden state before it; also where DeBERTa sends its positions through the same maps."""
    model = toy_families.new_model(family, "none", tokenizers(family))
    batch = batch_of(LENGTHS, "none", tokenizers(family))
    with torch.no_grad():
        outputs = compute_outputs(model, batch, OutputSpec(hidden=(1,), qkv=(2,)))
        stack = encoder_layers(model)
        maps = {name.rpartition(".")[2]: m for name, m in stack[1 % len(stack)].named_modules()}
        for name, x in zip(MAPS.get(family, ("query", "key", "value")), outputs.qkv[2], strict=True):
            torch.testing.assert_close(x.flatten(1), maps[name](outputs.hidden[1]), rtol=1e-5, atol=1e-5)


def test_scores_of_modernbert_hold_positions(tokenizers: Any) -> None:
    """Its q and k are rotated: their product is what its own attention is a softmax of."""
    model = toy_families.new_model("modernbert", "none", tokenizers("modernbert"))
    batch = batch_of([9], "none", tokenizers("modernbert"))
    with torch.no_grad():
        q, k, _ = compute_outputs(model, batch, OutputSpec(qkv=(4,))).qkv[4]  # the fourth layer sees everything
        model.set_attn_implementation("eager")
        expected = model(input_ids=batch.input_ids[None], output_attentions=True).attentions[3][0]
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    torch.testing.assert_close(scores.softmax(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SIZES)
def test_layers_dropped_exported_and_loaded(family: str, tokenizers: Any, tmp_path: Path) -> None:
    """The folder computes in transformers what was trained here, with every head and whichever layers are kept."""
    heads: tuple[Head, ...] = ("classification", "mlm", "tagging", "question_answering")
    # Older transformers refuse the fourth layer alone, as the next test asserts.
    last = [4] if family != "modernbert" or library_versions.TRANSFORMERS >= (5, 17) else [2, 1]
    for head, layers in zip(heads, ([1, 3, 4], [2, 4], last, [3, 1]), strict=True):
        model = keep_layers(toy_families.new_model(family, head, tokenizers(family), labels_of(head)), layers)
        batch = batch_of(LENGTHS, head, tokenizers(family))
        with torch.no_grad():
            outputs = compute_outputs(model, batch, OutputSpec(logits=True))
        save_model(model, tmp_path / head)
        assert load_hf_config(str(tmp_path / head)).num_hidden_layers == len(layers)
        expected = transformers_output(tmp_path / head, head, batch)
        torch.testing.assert_close(outputs.logits, flat_logits(expected, batch, head), rtol=1e-5, atol=1e-5)
        held = {kind for kind in heads if loading.holds_head(str(tmp_path / head), model.config, kind, labels_of(kind))}
        assert held == {head}


def test_the_weights_of_a_folder_have_the_last_word(tokenizers: Any, tmp_path: Path) -> None:
    """Of a head that the config names, and of embeddings that it calls those of the head."""
    save_model(toy_families.new_model("mpnet", "none", tokenizers("mpnet")), tmp_path / "mpnet")
    config = load_hf_config(str(tmp_path / "mpnet"))
    config.architectures = ["MPNetForMaskedLM"]
    assert not loading.holds_head(str(tmp_path / "mpnet"), config, "mlm")
    assert loading.holds_head("a/name-on-a-hub", config, "mlm")
    save_model(toy.new_model("mlm", tie_word_embeddings=False), tmp_path / "bert")
    file = tmp_path / "bert" / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model = loading.load_model(str(tmp_path / "bert"), "mlm")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings


def test_layers_that_older_transformers_cannot_load_are_refused(
    tokenizers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_versions, "TRANSFORMERS", (5, 16))
    for family in set(SIZES) - {"modernbert"}:
        keep_layers(toy_families.new_model(family, "none", tokenizers(family)), [4])
    model = toy_families.new_model("modernbert", "none", tokenizers("modernbert"))
    with pytest.raises(UserError, match="keep layers of both kinds"):
        keep_layers(keep_layers(model, [3, 4]), [2])


@pytest.mark.parametrize("family", [family for family in SIZES if family != "albert"])
def test_the_first_layers_compute_what_they_did(family: str, tokenizers: Any) -> None:
    model, shorter = (toy_families.new_model(family, "none", tokenizers(family)) for _ in range(2))
    keep_layers(shorter, [1, 2, 3])
    batch, spec = batch_of(LENGTHS, "none", tokenizers(family)), OutputSpec(hidden=(1, 2))
    with torch.no_grad():
        expected, hidden = (compute_outputs(encoder, batch, spec).hidden for encoder in (model, shorter))
    torch.testing.assert_close(hidden, expected)


def test_another_first_layer_of_modernbert_computes_nearly_what_it_did(tokenizers: Any) -> None:
    """The norm that it loses goes into its map; exactly so where the embeddings' norm has one scale."""
    model = toy_families.new_model("modernbert", "none", tokenizers("modernbert"))
    with torch.no_grad():
        model.embeddings.norm.weight.fill_(0.7)
        layer, batch = model.layers[1], batch_of([9], "none", tokenizers("modernbert"))
        embedded = compute_outputs(model, batch, OutputSpec(hidden=(0,))).hidden[0]
        before = layer.attn.Wqkv(layer.attn_norm(embedded))
        keep_layers(model, [2, 1])
        assert isinstance(model.layers[0].attn_norm, nn.Identity)
        assert isinstance(model.layers[1].attn_norm, nn.LayerNorm)
        torch.testing.assert_close(layer.attn.Wqkv(embedded), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", SIZES)
def test_set_dropout_sets_either_probability(family: str, tokenizers: Any) -> None:
    """Of hidden states, of attention, and of neither, whatever the model's own config says."""
    dropouts = {name: 0.3 for name in SIZES[family] if "drop" in name and "classif" not in name}
    if family == "modernbert":
        dropouts = {"embedding_dropout": 0.3, "mlp_dropout": 0.3, "attention_dropout": 0.3}
    model = toy_families.new_model(family, "none", tokenizers(family), **dropouts).train()
    batch = batch_of(LENGTHS, "none", tokenizers(family))

    def varies(hidden: float | None, attention: float) -> list[bool]:
        """Which layers' outputs differ from one forward to another."""
        set_dropout(model, hidden, attention)
        first, second = (compute_outputs(model, batch, OutputSpec(hidden=(0, 4))).hidden for _ in range(2))
        return [not torch.equal(first[layer], second[layer]) for layer in (0, 4)]

    with torch.no_grad():
        assert varies(0.0, 0.0) == [False, False]
        assert varies(0.0, 0.5) == [False, True]
        assert varies(0.5, 0.0) == [True, True]
        set_dropout(model, 0.0, 0.5)
        assert varies(None, 0.0) == [False, False]


@pytest.mark.parametrize("family", SIZES)
def test_random_embeddings_change_nothing_else(family: str, tokenizers: Any) -> None:
    model = toy_families.new_model(family, "none", tokenizers(family))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_embeddings(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert {f"{name}.weight" for name in embeddings if name.startswith("embeddings")} <= changed
    assert all(name.startswith("embeddings.") for name in changed)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)


@pytest.mark.parametrize("family", SIZES)
def test_scaled_positions_leave_words_and_layers_alone(family: str, tokenizers: Any) -> None:
    model = toy_families.new_model(family, "none", tokenizers(family))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    toy.compress(model, "scale_position_embeddings", scale=0.1)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-2] for name in changed} <= {"position_embeddings", "token_type_embeddings"}
    assert any("position_embeddings" in name for name in changed) == any("position_embeddings" in x for x in before)
    assert all(torch.equal(model.state_dict()[name], 0.1 * before[name]) for name in changed)


@pytest.mark.parametrize("family", SIZES)
def test_low_rank_layers_have_the_same_outputs_when_merged(family: str, tokenizers: Any) -> None:
    """q, k and v are recorded through them too."""
    model = toy_families.new_model(family, "mlm", tokenizers(family))
    batch = batch_of(LENGTHS, "mlm", tokenizers(family))
    toy.compress(model, "low_rank", keep=0.5)
    assert (
        len(compressed_module.compressed_modules(encoder_layers(model)))
        == len(compressed_module.compressed_modules(model))
        > 0
    )
    with torch.no_grad():
        low_rank_outputs = compute_outputs(model, batch, EVERYTHING)
        merged_outputs = compute_outputs(compressed_module.merge_all(model), batch, EVERYTHING)
    torch.testing.assert_close(merged_outputs, low_rank_outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SIZES)
def test_flops_are_those_that_torch_counts(family: str, tokenizers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products of matrices; without padding, and with windows that see everything."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", _explicit_attention)
    settings = {"local_attention": 64} if family == "modernbert" else {}
    for head in ("classification", *OF_TOKENS):
        model = toy_families.new_model(family, head, tokenizers(family), labels_of(head), **settings)
        model.requires_grad_(False)
        batch = batch_of([16] * 4, head, tokenizers(family))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            compute_outputs(model, batch, OutputSpec(logits=True))
        # Up to transformers 5.18 the angles of positions are a product of matrices too.
        products = [flops for name, flops in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
        angles = sum(sum(flops.values()) for flops in products)
        assert counter.get_total_flops() - angles == sum(footprint.flops(model, batch).values())


def test_flops_within_windows_by_hand(tokenizers: Any) -> None:
    """Three tokens to each side: a sequence of 3 is whole, one of 12 is a band."""
    model = toy_families.new_model("modernbert", "none", tokenizers("modernbert"), local_attention=6)
    batch = batch_of([3, 12], "none", tokenizers("modernbert"))
    band = sum(abs(i - j) <= 3 for i in range(12) for j in range(12))
    maps = 4 * 2 * 15 * (4 * 32 * 32 + 3 * 32 * 64)
    attention = 2 * 4 * 32 * (9 + 144) + 2 * 4 * 32 * (9 + band)
    assert sum(footprint.flops(model, batch).values()) == maps + attention


@pytest.mark.parametrize("family", SIZES)
def test_the_longest_sequence_is_the_longest_that_runs(family: str, tokenizers: Any) -> None:
    model = toy_families.new_model(family, "none", tokenizers(family))
    check_length(model.config, "it", 64)
    with torch.no_grad():
        outputs = compute_outputs(model, batch_of([64], "none", tokenizers(family)), OutputSpec(hidden=(4,)))
    assert outputs.hidden[4].isfinite().all()
    with pytest.raises(UserError, match="65 tokens, but it has 64 positions"):
        check_length(model.config, "it", 65)


def test_only_generators_of_electra_have_an_mlm_head() -> None:
    def has(family: str, architecture: str) -> bool:
        config = architecture_config(toy_families.architecture(family), 90)
        config.architectures = [architecture]
        return declares_head(config, "mlm", ())

    assert has("electra", "ElectraForMaskedLM")
    assert not has("electra", "ElectraForPreTraining")
    assert has("albert", "AlbertForPreTraining")


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("albert", {"num_hidden_groups": 2}, "albert with num_hidden_groups = 2 is not supported, 1 is"),
        ("albert", {"inner_group_num": 2}, "albert with inner_group_num = 2 is not supported, 1 is"),
        ("mpnet", {"pad_token_id": 0}, "mpnet with pad_token_id = 0 is not supported, 1 is"),
        ("bert", {"is_decoder": True}, "bert with is_decoder = True is not supported, False is"),
        ("deberta-v2", {"share_att_key": "False"}, "share_att_key must be of type bool, not 'False'"),
        ("roberta", {"pad_token_id": None}, "roberta numbers positions from pad_token_id, which is not set"),
    ],
)
def test_configs_that_cannot_run_are_refused(family: str, sizes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"student.architecture: {message}"):
        architecture_config(toy_families.architecture(family, **sizes), 90)
    config = architecture_config(toy_families.architecture(family, pad_token_id=1), 90)
    config.update(sizes)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: {message}"):
        load_hf_config(str(tmp_path))


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=f"{tmp_path}: the family gpt2 is not supported; choose from albert, bert"):
        load_hf_config(str(tmp_path))


# Distilling


@cache
def _pair(family: str, head: Head, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """A teacher, and a student of half its layers."""
    teacher, student = (toy_families.new_model(family, head, tokenizer, labels_of(head)) for _ in range(2))
    return keep_layers(student, [2, 4]), teacher


def learns(family: str, name: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a forward and backward on each kind of data of the objective leaves gradients in the student."""
    kind = OBJECTIVES[name]
    for head, spans in (("classification", False), ("mlm", True)):
        if ("corpus" if spans else "task") not in kind.supported_data:
            continue
        student, teacher = _pair(family, head, tokenizer)
        student.zero_grad()
        dims = [model_dims(model.config, head, labels=len(LABELS)) for model in (student, teacher)]
        method = Distiller(student, kind(*dims))
        batch = batch_of(LENGTHS, head, tokenizer)
        batch = toy.packed(batch, 16) if spans else batch
        with torch.no_grad():
            target = compute_outputs(teacher, batch, method.objective.teacher_spec) if kind.requires_teacher else None
        loss, _ = method(batch, target)
        loss.backward()
        gradient = sum(p.grad.abs().sum() for p in encoder_layers(student).parameters() if p.grad is not None)
        if not (loss.isfinite() and gradient > 0):
            return False
    return True


@pytest.mark.parametrize("family", SIZES)
def test_the_readme_says_what_each_family_can_do(family: str, tokenizers: Any) -> None:
    objectives = [name for name in OBJECTIVES if learns(family, name, tokenizers(family))]
    runs = "flat" if families.FAMILIES[toy_families.kind(family)].flat else "padded"
    (row,) = [line for line in TABLE.splitlines() if line.startswith(f"| {TITLES[family]} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == runs
    assert cells[2] == ("all" if objectives == list(OBJECTIVES) else ", ".join(objectives))


TITLES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-R",
    "electra": "ELECTRA",
    "albert": "ALBERT",
    "distilbert": "DistilBERT",
    "mpnet": "MPNet",
    "deberta-v2": "DeBERTa-v2",
    "deberta-v3": "DeBERTa-v3",
    "modernbert": "ModernBERT",
}


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", SIZES)
def test_a_family_is_distilled_for_a_task(family: str, tokenizers: Any, tmp_path: Path) -> None:
    """Two steps of LAD into half the layers; the export answers in transformers as its results say."""
    teacher = saved(
        toy_families.new_model(family, "classification", tokenizers(family), toy.LABELS),
        tokenizers(family),
        tmp_path / "teacher",
    )
    files = toy.task_files(tmp_path / "task", train=16, dev=8)
    result = train(toy.parsed(toy.task_config(tmp_path, files, teacher, teacher), {"run.steps": 2}))
    assert result.results is not None
    export = tmp_path / "toy" / "export"
    assert pipeline("text-classification", str(export))("ba " * 2000, truncation=True)
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    assert model.config.num_hidden_layers == 2
    exported_tokenizer = load_tokenizer(export)
    rows = (tmp_path / "task" / "dev.jsonl").read_text().splitlines()
    right = 0
    for row in map(json.loads, rows):
        inputs = exported_tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
        inputs = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            right += toy.LABELS[int(model(**inputs).logits.argmax())] == row["label"]
    assert result.results["metrics"]["accuracy"] == pytest.approx(right / len(rows))


@pytest.fixture(scope="module")
def corpora(
    tokenizer_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Token shards in a family's tokenizer."""
    texts = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (texts / f"{number}.txt").write_text("\n".join(toy.sentence(100 * number + n, most=30) for n in range(12)))

    def prepared(family: str) -> Path:
        out = tmp_path_factory.mktemp("shards") / family
        source = {"kind": "text", "path": str(texts)}
        request = {"out": str(out), "tokenizer": str(tokenizer_folders(family)), "held_out": 0.1, "source": [source]}
        prepare(PrepareConfig.model_validate(request | {"num_workers": 1}))
        return out

    return cache(prepared)


@pytest.mark.parametrize("family", SIZES)
def test_a_family_is_distilled_on_a_corpus(family: str, tokenizers: Any, corpora: Any, tmp_path: Path) -> None:
    """Two steps of MiniLMv2 from a teacher without a head."""
    teacher = saved(
        toy_families.new_model(family, "none", tokenizers(family)), tokenizers(family), tmp_path / "teacher"
    )
    tables = toy.corpus_config(tmp_path, corpora(family), teacher, teacher, objective={"name": "minilm2"})
    result = train(toy.parsed(tables, {"run.steps": 2, "data.num_workers": 0}))
    assert 0 < result.results["metrics"]["loss"] < 10
    assert loading.load_model(str(tmp_path / "toy" / "export"), "none").config.num_hidden_layers == 2


# From one family to another


def test_roberta_teaches_a_bert_with_the_same_tokenizer(tokenizers: Any, tmp_path: Path) -> None:
    """LAD compares hidden states token by token: the new model of another family takes the teacher's tokenizer."""
    teacher = saved(
        toy_families.new_model("roberta", "classification", tokenizers("roberta"), toy.LABELS),
        tokenizers("roberta"),
        tmp_path / "t",
    )
    files = toy.task_files(tmp_path / "task", train=16, dev=8)
    tables = toy.task_config(tmp_path, files, teacher, teacher)
    architecture = toy_families.architecture("bert", num_hidden_layers=2)
    tables["student"] = {"architecture": architecture, "tokenizer": str(teacher)}
    assert train(toy.parsed(tables, {"run.steps": 2})).results is not None
    student = load_hf_config(str(tmp_path / "toy" / "export"))
    assert (student.model_type, student.pad_token_id) == ("bert", tokenizers("roberta").pad_token_id)


def test_kd_takes_a_teacher_with_another_tokenizer(tokenizers: Any, tmp_path: Path) -> None:
    """Each reads the examples in its own tokens, with the teacher's outputs cached or computed at each step."""
    files = toy.task_files(tmp_path / "task", train=16, dev=24)
    tables = of_two_tokenizers(tokenizers, tmp_path, files)
    teacher = Path(tables["teacher"]["path"])
    cached, computed = (
        train(toy.parsed(tables, {"run.steps": 3, "run.name": name, "teacher.cache_gb": size})).results
        for name, size in (("cached", 1.0), ("computed", 0.0))
    )
    assert computed is not None
    assert cached["metrics"]["accuracy"] == computed["metrics"]["accuracy"]
    curves = [[row["soft"] for row in losses(tmp_path / name)] for name in ("cached", "computed")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)

    alone = evaluate(evaluation(teacher, None, files))["model"]
    both = evaluate(evaluation(tmp_path / "cached" / "export", teacher, files))
    assert cached["teacher"]["accuracy"] == both["teacher"]["accuracy"] == alone["accuracy"]
    assert both["model"]["accuracy"] == cached["metrics"]["accuracy"]


def test_tokens_of_another_tokenizer_are_not_compared(
    tokenizers: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tables = of_two_tokenizers(tokenizers, tmp_path, toy.task_files(tmp_path / "task", train=16, dev=24))
    request.getfixturevalue("no_weights")  # not earlier: the weights are drawn above
    with pytest.raises(UserError, match=r"the teacher's vocabulary .* and lad compares them token by token"):
        train(toy.parsed(tables, {"objective": {"name": "lad"}}))


def of_two_tokenizers(tokenizers: Any, folder: Path, files: dict[str, str]) -> dict[str, Any]:
    teacher, student = (
        saved(
            toy_families.new_model(family, "classification", tokenizers(family), toy.LABELS),
            tokenizers(family),
            folder / family,
        )
        for family in ("modernbert", "bert")
    )
    return toy.task_config(folder, files, teacher, student, objective={"name": "kd"})


def losses(run: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "soft" in row]


def evaluation(model: Path, teacher: Path | None, files: dict[str, str]) -> EvaluateConfig:
    tables: dict[str, Any] = {"model": {"path": str(model)}, "data": files | {"max_length": 32}}
    return EvaluateConfig.model_validate(tables | ({} if teacher is None else {"teacher": {"path": str(teacher)}}))
