"""Each family of encoders runs as transformers runs it, keeps sequences apart, distils, loses layers, and loads again.

What the README says of the families is compared with what is found here.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
import toy_families
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toy_families import LIKE, SIZES
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lad_dist.compression import compressed_module, footprint
from lad_dist.compression.layers import keep_layers, random_embeddings, scale_position_embeddings, set_dropout
from lad_dist.compression.low_rank import low_rank
from lad_dist.config.errors import UserError
from lad_dist.config.schema import EvaluateConfig, PrepareConfig
from lad_dist.core.batch import Batch, Head, pad, unpad
from lad_dist.core.collate import collate, span_starts
from lad_dist.core.outputs import OutputSpec
from lad_dist.data.shards.prepare import prepare
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.evaluation.evaluate import evaluate
from lad_dist.models import families, loading
from lad_dist.models.attention import _explicit_attention
from lad_dist.models.dims import check_length, encoder_layers, model_dims
from lad_dist.models.forward import compute_outputs
from lad_dist.models.heads import MODEL_CLASSES, has_mlm_head
from lad_dist.models.hf_config import architecture_config, load_hf_config
from lad_dist.models.loading import PreTrainedModel, save_model
from lad_dist.objectives import OBJECTIVES
from lad_dist.training.distiller import Distiller
from lad_dist.training.train import train

TABLE = (Path(__file__).parents[2] / "README.md").read_text().split("\n## Which encoders\n")[1].split("\n## ")[0]
LENGTHS = [7, 3, 12, 1, 12]
LABELS = ("a", "b", "c")
OF_TOKENS = ("mlm", "tagging", "question_answering")
EVERYTHING = OutputSpec(True, (0, 1, 2, 3, 4), (1, 4))
ALL = [*SIZES, *LIKE]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tokenizer, made when it is first asked for."""
    return cache(lambda family: toy_families.tokenizer(family, tmp_path_factory.mktemp("words") / family))


@pytest.fixture(scope="module")
def words(folders: Callable[[str], Path]) -> Callable[[str], PreTrainedTokenizerFast]:
    return cache(lambda family: load_tokenizer(folders("roberta" if family in LIKE else family)))


def batch_of(lengths: list[int], head: Head, words: PreTrainedTokenizerFast, pad_to: int | None = None) -> Batch:
    """Pairs of random tokens: the second segment begins in the middle. Heads of tokens read two of each sequence."""
    random = np.random.default_rng(3)
    sequences = [random.integers(5, len(words), n) for n in lengths]
    segments = [(np.arange(n) >= n // 2).astype(np.uint8) for n in lengths]
    starts = span_starts(sequences, pad_to)[:-1]
    rows = starts
    if head in OF_TOKENS:
        rows = np.unique(np.concatenate([starts, starts + np.array(lengths) - 1]))
    return collate(sequences, segments, rows, np.zeros(len(rows), dtype=np.int64), pad_to, words.pad_token_id)


def labels_of(head: Head) -> tuple[str, ...]:
    return {"classification": LABELS, "tagging": LABELS, "question_answering": ("start", "end")}.get(head, ())


def as_transformers_does(folder: Path, head: Head, batch: Batch) -> Any:
    """Its own forward over the padded batch, in its own attention, from the folder."""
    model = MODEL_CLASSES[head].from_pretrained(folder).eval()
    ids = pad(batch.input_ids, batch).masked_fill(~batch.is_token, model.config.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": batch.is_token.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = pad(batch.token_type_ids, batch)
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


def theirs(output: Any, batch: Batch, head: Head) -> Tensor:
    if head == "question_answering":
        output = SimpleNamespace(logits=torch.stack([output.start_logits, output.end_logits], dim=-1))
    return unpad(output.logits, batch)[batch.head_positions] if head in OF_TOKENS else output.logits


def real(x: Tensor, batch: Batch) -> Tensor:
    """[N, ...] without the tokens that pad_to added."""
    return x[unpad(batch.is_token, batch)]


@pytest.mark.parametrize("head", ["classification", "mlm"])
@pytest.mark.parametrize("family", ALL)
def test_flat_is_padded(family: str, head: Head, words: Any, tmp_path: Path) -> None:
    made = toy_families.made(family, head, words(family), labels_of(head))
    save_model(made, tmp_path)
    model = loading.load_model(str(tmp_path), head, labels=labels_of(head)).eval()
    for pad_to in (None, 16):
        batch = batch_of(LENGTHS, head, words(family), pad_to)
        with torch.no_grad():
            seen = compute_outputs(model, batch, EVERYTHING)
        expected = as_transformers_does(tmp_path, head, batch)
        assert seen.logits is not None
        assert seen.logits.std() > 0.1
        torch.testing.assert_close(seen.logits, theirs(expected, batch, head), rtol=1e-5, atol=1e-5)
        assert list(seen.hidden) == [0, 1, 2, 3, 4]
        states = expected.hidden_states[-5:]  # ALBERT's first is as narrow as its embeddings, and counted before these
        for layer, hidden in seen.hidden.items():
            flat = unpad(states[layer], batch)
            torch.testing.assert_close(real(hidden, batch), real(flat, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_sequences_that_share_a_span_are_each_alone(family: str, words: Any) -> None:
    """Spans of several sequences, empty sequences at the end: each as in a batch of its own."""
    model = toy_families.made(family, "mlm", words(family))
    apart = batch_of(LENGTHS, "mlm", words(family))
    apart = apart._replace(token_type_ids=torch.zeros_like(apart.token_type_ids))
    alone = [
        toy.batch([n])._replace(input_ids=ids, head_positions=torch.tensor(sorted({0, n - 1})))
        for n, ids in zip(LENGTHS, apart.input_ids.split(LENGTHS), strict=True)
    ]
    with torch.no_grad():
        parts = [compute_outputs(model, batch, EVERYTHING) for batch in alone]
        for span in (12, 40):
            seen = compute_outputs(model, toy.packed(apart, span), EVERYTHING)
            torch.testing.assert_close(seen.logits, torch.cat([p.logits for p in parts]), rtol=1e-5, atol=1e-5)
            for layer in EVERYTHING.hidden:
                expected = torch.cat([part.hidden[layer] for part in parts])
                torch.testing.assert_close(seen.hidden[layer], expected, rtol=1e-5, atol=1e-5)
            for layer in EVERYTHING.qkv:
                for place, mine in enumerate(seen.qkv[layer]):
                    expected = torch.cat([part.qkv[layer][place] for part in parts])
                    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


MAPS = {"distilbert": ("q_lin", "k_lin", "v_lin"), "mpnet": ("q", "k", "v")}
MAPS |= dict.fromkeys(("deberta-v2", "deberta-v3"), ("query_proj", "key_proj", "value_proj"))


@pytest.mark.parametrize("family", [family for family in SIZES if family != "modernbert"])
def test_queries_keys_and_values_are_those_of_the_layer(family: str, words: Any) -> None:
    """Maps of the hidden state before it; also where DeBERTa sends its positions through the same maps."""
    model, batch = toy_families.made(family, "none", words(family)), batch_of(LENGTHS, "none", words(family))
    with torch.no_grad():
        seen = compute_outputs(model, batch, OutputSpec(hidden=(1,), qkv=(2,)))
        stack = encoder_layers(model)
        maps = {name.rpartition(".")[2]: m for name, m in stack[1 % len(stack)].named_modules()}
        for name, x in zip(MAPS.get(family, ("query", "key", "value")), seen.qkv[2], strict=True):
            torch.testing.assert_close(x.flatten(1), maps[name](seen.hidden[1]), rtol=1e-5, atol=1e-5)


def test_the_scores_of_modernbert_know_positions(words: Any) -> None:
    """Its q and k are rotated: their product is what its own attention is a softmax of."""
    model, batch = (
        toy_families.made("modernbert", "none", words("modernbert")),
        batch_of([9], "none", words("modernbert")),
    )
    with torch.no_grad():
        q, k, _ = compute_outputs(model, batch, OutputSpec(qkv=(4,))).qkv[4]  # the fourth layer sees everything
        model.set_attn_implementation("eager")
        expected = model(input_ids=batch.input_ids[None], output_attentions=True).attentions[3][0]
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    torch.testing.assert_close(scores.softmax(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SIZES)
def test_layers_dropped_exported_and_loaded(family: str, words: Any, tmp_path: Path) -> None:
    """The folder computes in transformers what was trained here, with every head and whichever layers are kept."""
    heads: tuple[Head, ...] = ("classification", "mlm", "tagging", "question_answering")
    for head, kept in zip(heads, ([1, 3, 4], [2, 4], [4], [3, 1]), strict=True):
        model = keep_layers(toy_families.made(family, head, words(family), labels_of(head)), kept)
        batch = batch_of(LENGTHS, head, words(family))
        with torch.no_grad():
            seen = compute_outputs(model, batch, OutputSpec(logits=True))
        save_model(model, tmp_path / head)
        assert load_hf_config(str(tmp_path / head)).num_hidden_layers == len(kept)
        expected = as_transformers_does(tmp_path / head, head, batch)
        torch.testing.assert_close(seen.logits, theirs(expected, batch, head), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in SIZES if family != "albert"])
def test_the_first_layers_compute_what_they_did(family: str, words: Any) -> None:
    whole, part = (toy_families.made(family, "none", words(family)) for _ in range(2))
    keep_layers(part, [1, 2, 3])
    batch, needs = batch_of(LENGTHS, "none", words(family)), OutputSpec(hidden=(1, 2))
    with torch.no_grad():
        expected, seen = (compute_outputs(model, batch, needs).hidden for model in (whole, part))
    torch.testing.assert_close(seen, expected)


def test_another_first_layer_of_modernbert_computes_nearly_what_it_did(words: Any) -> None:
    """The norm that it loses goes into its map; exactly so where the embeddings' norm has one scale."""
    model = toy_families.made("modernbert", "none", words("modernbert"))
    with torch.no_grad():
        model.embeddings.norm.weight.fill_(0.7)
        layer, batch = model.layers[1], batch_of([9], "none", words("modernbert"))
        embedded = compute_outputs(model, batch, OutputSpec(hidden=(0,))).hidden[0]
        before = layer.attn.Wqkv(layer.attn_norm(embedded))
        keep_layers(model, [2, 1])
        assert isinstance(model.layers[0].attn_norm, nn.Identity)
        assert isinstance(model.layers[1].attn_norm, nn.LayerNorm)
        torch.testing.assert_close(layer.attn.Wqkv(embedded), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", SIZES)
def test_dropout_is_what_was_asked_for(family: str, words: Any) -> None:
    """Of hidden states, of attention, and of neither, whatever the model's own config says."""
    on = {name: 0.3 for name in SIZES[family] if "drop" in name and "classif" not in name}
    if family == "modernbert":
        on = {"embedding_dropout": 0.3, "mlp_dropout": 0.3, "attention_dropout": 0.3}
    model = toy_families.made(family, "none", words(family), **on).train()
    batch = batch_of(LENGTHS, "none", words(family))

    def moved(hidden: float, attention: float) -> list[bool]:
        """Which layers' outputs differ from one forward to another."""
        set_dropout(model, hidden, attention)
        one, other = (compute_outputs(model, batch, OutputSpec(hidden=(0, 4))).hidden for _ in range(2))
        return [not torch.equal(one[layer], other[layer]) for layer in (0, 4)]

    with torch.no_grad():
        assert moved(0.0, 0.0) == [False, False]
        assert moved(0.0, 0.5) == [False, True]
        assert moved(0.5, 0.0) == [True, True]


@pytest.mark.parametrize("family", SIZES)
def test_embeddings_drawn_anew_are_new_and_the_rest_is_not(family: str, words: Any) -> None:
    model = toy_families.made(family, "none", words(family))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_embeddings(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert {f"{name}.weight" for name in tables if name.startswith("embeddings")} <= changed
    assert all(name.startswith("embeddings.") for name in changed)
    words_before = model.get_input_embeddings().weight.clone()
    scale_position_embeddings(model, scale=0.1)
    assert torch.equal(model.get_input_embeddings().weight, words_before)


@pytest.mark.parametrize("family", SIZES)
def test_layers_as_thin_products_leave_the_same_trace_when_folded(family: str, words: Any) -> None:
    """q, k and v are recorded through them too."""
    model, batch = toy_families.made(family, "mlm", words(family)), batch_of(LENGTHS, "mlm", words(family))
    low_rank(model, keep=0.5)
    assert (
        len(compressed_module.compressed_modules(encoder_layers(model)))
        == len(compressed_module.compressed_modules(model))
        > 0
    )
    with torch.no_grad():
        thin = compute_outputs(model, batch, EVERYTHING)
        folded = compute_outputs(compressed_module.merge_all(model), batch, EVERYTHING)
    torch.testing.assert_close(folded, thin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SIZES)
def test_flops_are_those_that_torch_counts(family: str, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products of matrices; without padding, and with windows that see everything."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", _explicit_attention)
    settings = {"local_attention": 64} if family == "modernbert" else {}
    for head in ("classification", *OF_TOKENS):
        model = toy_families.made(family, head, words(family), labels_of(head), **settings).requires_grad_(False)
        batch = batch_of([16] * 4, head, words(family))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            compute_outputs(model, batch, OutputSpec(logits=True))
        assert counter.get_total_flops() == sum(footprint.flops(model, batch).values())


def test_flops_within_windows_by_hand(words: Any) -> None:
    """Three tokens to each side: a sequence of 3 is whole, one of 12 is a band."""
    model = toy_families.made("modernbert", "none", words("modernbert"), local_attention=6)
    batch = batch_of([3, 12], "none", words("modernbert"))
    band = sum(abs(i - j) <= 3 for i in range(12) for j in range(12))
    maps = 4 * 2 * 15 * (4 * 32 * 32 + 3 * 32 * 64)
    attention = 2 * 4 * 32 * (9 + 144) + 2 * 4 * 32 * (9 + band)
    assert sum(footprint.flops(model, batch).values()) == maps + attention


@pytest.mark.parametrize("family", SIZES)
def test_the_longest_sequence_is_the_longest_that_runs(family: str, words: Any) -> None:
    model = toy_families.made(family, "none", words(family))
    check_length(model.config, "it", 64)
    with torch.no_grad():
        seen = compute_outputs(model, batch_of([64], "none", words(family)), OutputSpec(hidden=(4,)))
    assert seen.hidden[4].isfinite().all()
    with pytest.raises(UserError, match="65 tokens, but it has 64 positions"):
        check_length(model.config, "it", 65)


def test_only_generators_of_electra_have_an_mlm_head() -> None:
    def has(family: str, architecture: str) -> bool:
        config = architecture_config(toy_families.architecture(family), 90)
        config.architectures = [architecture]
        return has_mlm_head(config)

    assert has("electra", "ElectraForMaskedLM")
    assert not has("electra", "ElectraForPreTraining")
    assert has("albert", "AlbertForPreTraining")


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("albert", {"num_hidden_groups": 2}, "albert with num_hidden_groups = 2 is not supported, 1 is"),
        ("albert", {"inner_group_num": 2}, "albert with inner_group_num = 2 is not supported, 1 is"),
        ("mpnet", {"pad_token_id": 0}, "mpnet with pad_token_id = 0 is not supported, 1 is"),
    ],
)
def test_shapes_that_nothing_here_can_run(family: str, sizes: dict[str, int], message: str, tmp_path: Path) -> None:
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
def _pair(family: str, head: Head, words: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """A teacher, and a student of half its layers."""
    teacher, student = (toy_families.made(family, head, words, labels_of(head)) for _ in range(2))
    return keep_layers(student, [2, 4]), teacher


def learns(family: str, name: str, words: PreTrainedTokenizerFast) -> bool:
    """Whether one forward and backward on each kind of data that the objective runs on leaves gradients in the
    student."""
    kind = OBJECTIVES[name]
    for head, spans in (("classification", False), ("mlm", True)):
        if ("corpus" if spans else "task") not in kind.supported_data:
            continue
        student, teacher = _pair(family, head, words)
        student.zero_grad()
        shapes = [model_dims(model.config, head, labels=len(LABELS)) for model in (student, teacher)]
        method = Distiller(student, kind(*shapes))
        batch = batch_of(LENGTHS, head, words)
        batch = toy.packed(batch, 16) if spans else batch
        with torch.no_grad():
            target = (
                compute_outputs(teacher, batch, method.objective.teacher_outputs) if kind.requires_teacher else None
            )
        loss, _ = method(batch, target)
        loss.backward()
        gradient = sum(p.grad.abs().sum() for p in encoder_layers(student).parameters() if p.grad is not None)
        if not (loss.isfinite() and gradient > 0):
            return False
    return True


@pytest.mark.parametrize("family", SIZES)
def test_the_readme_says_what_each_family_can_do(family: str, words: Any) -> None:
    able = [name for name in OBJECTIVES if learns(family, name, words(family))]
    runs = "flat" if families.FAMILIES[toy_families.kind(family)].flat else "padded"
    (row,) = [line for line in TABLE.splitlines() if line.startswith(f"| {TITLES[family]} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == runs
    assert cells[2] == ("all" if able == list(OBJECTIVES) else ", ".join(able))


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


def saved(model: PreTrainedModel, words: PreTrainedTokenizerFast, folder: Path) -> Path:
    save_model(model, folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", SIZES)
def test_a_family_is_distilled_for_a_task(family: str, words: Any, tmp_path: Path) -> None:
    """Two steps of LAD into half the layers; the export answers in transformers as its results say."""
    teacher = saved(
        toy_families.made(family, "classification", words(family), toy.LABELS), words(family), tmp_path / "teacher"
    )
    files = toy.task_files(tmp_path / "task", train=16, dev=8)
    outcome = train(toy.parsed(toy.task_config(tmp_path, files, teacher, teacher), {"run.steps": 2}))
    assert outcome.results is not None
    export = tmp_path / "toy" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    assert model.config.num_hidden_layers == 2
    tokenizer = load_tokenizer(export)
    rows = (tmp_path / "task" / "dev.jsonl").read_text().splitlines()
    right = 0
    for row in map(json.loads, rows):
        inputs = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
        inputs = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            right += toy.LABELS[int(model(**inputs).logits.argmax())] == row["label"]
    assert outcome.results["metrics"]["accuracy"] == pytest.approx(right / len(rows))


@pytest.fixture(scope="module")
def corpora(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Token shards in a family's tokenizer."""
    texts = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (texts / f"{number}.txt").write_text("\n".join(toy.sentence(100 * number + n, most=30) for n in range(12)))

    def prepared(family: str) -> Path:
        out = tmp_path_factory.mktemp("shards") / family
        source = {"kind": "text", "path": str(texts)}
        request = {"out": str(out), "tokenizer": str(folders(family)), "held_out": 0.1, "source": [source]}
        prepare(PrepareConfig.model_validate(request | {"num_workers": 1}))
        return out

    return cache(prepared)


@pytest.mark.parametrize("family", SIZES)
def test_a_family_is_distilled_on_a_corpus(family: str, words: Any, corpora: Any, tmp_path: Path) -> None:
    """Two steps of MiniLMv2 from a teacher without a head."""
    teacher = saved(toy_families.made(family, "none", words(family)), words(family), tmp_path / "teacher")
    tables = toy.corpus_config(tmp_path, corpora(family), teacher, teacher, objective={"name": "minilm2"})
    outcome = train(toy.parsed(tables, {"run.steps": 2, "data.num_workers": 0}))
    assert outcome.results is not None
    assert 0 < outcome.results["metrics"]["loss"] < 10
    assert loading.load_model(str(tmp_path / "toy" / "export"), "none").config.num_hidden_layers == 2


# From one family to another


def test_roberta_teaches_bert_that_reads_its_tokens(words: Any, tmp_path: Path) -> None:
    """LAD compares hidden states token by token: the new model of another family takes the teacher's tokenizer."""
    teacher = saved(
        toy_families.made("roberta", "classification", words("roberta"), toy.LABELS), words("roberta"), tmp_path / "t"
    )
    files = toy.task_files(tmp_path / "task", train=16, dev=8)
    tables = toy.task_config(tmp_path, files, teacher, teacher)
    architecture = toy_families.architecture("bert", num_hidden_layers=2)
    tables["student"] = {"architecture": architecture, "tokenizer": str(teacher)}
    assert train(toy.parsed(tables, {"run.steps": 2})).results is not None
    student = load_hf_config(str(tmp_path / "toy" / "export"))
    assert (student.model_type, student.pad_token_id) == ("bert", words("roberta").pad_token_id)


def test_answers_to_a_task_may_come_from_a_teacher_with_another_tokenizer(words: Any, tmp_path: Path) -> None:
    """Each reads the examples in its own tokens, asked once or at each step."""
    files = toy.task_files(tmp_path / "task", train=16, dev=24)
    tables = of_two_tokenizers(words, tmp_path, files)
    teacher = Path(tables["teacher"]["path"])
    kept, asked = (
        train(toy.parsed(tables, {"run.steps": 3, "run.name": name, "teacher.cache_gb": size})).results
        for name, size in (("kept", 1.0), ("asked", 0.0))
    )
    assert kept is not None
    assert asked is not None
    assert kept["metrics"]["accuracy"] == asked["metrics"]["accuracy"]
    curves = [[row["soft"] for row in losses(tmp_path / name)] for name in ("kept", "asked")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)

    alone = evaluate(evaluation(teacher, None, files))["model"]
    both = evaluate(evaluation(tmp_path / "kept" / "export", teacher, files))
    assert kept["teacher"]["accuracy"] == both["teacher"]["accuracy"] == alone["accuracy"]
    assert both["model"]["accuracy"] == kept["metrics"]["accuracy"]


def test_tokens_of_another_tokenizer_are_not_compared(
    words: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tables = of_two_tokenizers(words, tmp_path, toy.task_files(tmp_path / "task", train=16, dev=24))
    request.getfixturevalue("no_weights")  # not earlier: they are drawn above
    with pytest.raises(UserError, match=r"the teacher's vocabulary .* and lad compares them token by token"):
        train(toy.parsed(tables, {"objective": {"name": "lad"}}))


def of_two_tokenizers(words: Any, folder: Path, files: dict[str, str]) -> dict[str, Any]:
    teacher, student = (
        saved(toy_families.made(family, "classification", words(family), toy.LABELS), words(family), folder / family)
        for family in ("modernbert", "bert")
    )
    return toy.task_config(folder, files, teacher, student, objective={"name": "kd"})


def losses(run: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "soft" in row]


def evaluation(model: Path, teacher: Path | None, files: dict[str, str]) -> EvaluateConfig:
    tables: dict[str, Any] = {"model": {"path": str(model)}, "data": files | {"max_length": 32}}
    return EvaluateConfig.model_validate(tables | ({} if teacher is None else {"teacher": {"path": str(teacher)}}))
