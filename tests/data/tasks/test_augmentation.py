"""TinyBERT's augmentation: which words are replaced, by what, and how often."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
import toy
import toy_families
from conftest import World
from launching import run_command
from transformers import AutoModelForMaskedLM

from lad_dist.config.errors import UserError
from lad_dist.data.tasks.augmentation import Augmentation, Word, WordProposer, augment
from lad_dist.data.tasks.files import Texts
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.models.loading import save_model

CPU = torch.device("cpu")
TEXT = "Ban,  fisk 7 banbart! golu"


@pytest.fixture(scope="module")
def proposer(world: World) -> WordProposer:
    return WordProposer(str(world.pretrained), max_length=32, candidates=4, device=CPU)


def test_proposals_are_those_of_the_equations(proposer: WordProposer, world: World) -> None:
    """Masked one at a time, in transformers' own forward; or nearest by the cosine of embeddings."""
    tokenizer, model = load_tokenizer(str(world.tokenizer)), AutoModelForMaskedLM.from_pretrained(world.pretrained)
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if token.isalpha()}
    embeddings = model.get_input_embeddings().weight.detach().double()
    (words,) = proposer([TEXT])
    assert [TEXT[word.begin : word.end] for word in words] == ["Ban", "fisk", "banbart", "golu"]
    kinds = set()
    for word in words:
        encoded = tokenizer(TEXT, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        places = [n for n, (begin, end) in enumerate(offsets) if word.begin <= begin < end <= word.end]
        kinds.add(len(places) > 1)
        if len(places) > 1:
            mean = embeddings[encoded["input_ids"][0, places]].mean(dim=0)
            scores = {token: torch.cosine_similarity(embeddings[n], mean, dim=0) for token, n in vocabulary.items()}
        else:
            encoded["input_ids"][0, places] = tokenizer.mask_token_id
            logits = model.eval()(**encoded).logits[0, places[0]]
            scores = {token: logits[n] for token, n in vocabulary.items()}
        assert word.candidates == sorted(scores, key=lambda token: -scores[token].item())[:4]
    assert kinds == {False, True}


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "albert"])
def test_words_are_the_same_to_other_tokenizers(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(toy_families.tokenizer(family, tmp_path)))
    save_model(toy_families.new_model(family, "mlm", tokenizer), tmp_path)
    proposer, text = WordProposer(str(tmp_path), max_length=32, candidates=3, device=CPU), "ban,  fisk 7 banfisk! golu"
    (words,) = proposer([text])
    assert [text[word.begin : word.end] for word in words] == ["ban", "fisk", "banfisk", "golu"]
    assert all(len(set(word.candidates)) == 3 for word in words)
    assert all(candidate.isalpha() for word in words for candidate in word.candidates)


def test_words_beyond_the_longest_sequence_stay(world: World) -> None:
    proposer = WordProposer(str(world.pretrained), max_length=8, candidates=2, device=CPU)
    (words,) = proposer(["ban fisk golu maba banbart"])
    assert len(words) < 5
    assert proposer(["", "7 !"]) == [[], []]


class ToyProposer:
    """Proposes x0 and x1 for each word between blanks."""

    def __call__(self, texts: list[str]) -> list[list[Word]]:
        result = []
        for text in texts:
            begins = [n for n in range(len(text)) if text[n] != " " and (n == 0 or text[n - 1] == " ")]
            result.append([Word(n, n + len(text[n:].split()[0]), ["x0", "x1"]) for n in begins])
        return result


def augmented(texts: Texts, **settings: Any) -> list[tuple[str, ...]]:
    return list(augment(texts, ToyProposer(), Augmentation(candidates=2, **settings)))  # type: ignore[arg-type]


def toy_texts(count: int, pairs: bool = False) -> Texts:
    texts = [" ".join(f"w{n}.{place}" for place in range(10)) for n in range(count)]
    return Texts(texts, [f"second  of {n}" for n in range(count)] if pairs else None, np.zeros(count, dtype=np.int64))


def test_words_are_replaced_with_the_probability_by_each_candidate_alike() -> None:
    samples = augmented(toy_texts(50), samples=20, probability=0.4)
    assert len(samples) == len(set(samples)) == pytest.approx(1000, abs=10)  # some equal the example
    words = [word for (text,) in samples for word in text.split(" ")]
    assert len(words) == 10 * len(samples)
    for candidate in ("x0", "x1"):
        assert words.count(candidate) / len(words) == pytest.approx(0.2, abs=0.02)
    everything = augmented(toy_texts(2), samples=3, probability=1.0)
    assert {word for (text,) in everything for word in text.split(" ")} == {"x0", "x1"}


def test_samples_are_a_function_of_seed_and_example(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many, other = (augmented(toy_texts(count), samples=5, seed=seed) for count, seed in ((3, 0), (40, 0), (3, 1)))
    assert many[: len(few)] == few
    assert few != other
    assert augmented(toy_texts(3), samples=2)[:2] == few[:2]
    monkeypatch.setattr("lad_dist.data.tasks.augmentation.EXAMPLES_AT_ONCE", 7)
    assert augmented(toy_texts(40), samples=5) == many


def test_pairs_stay_pairs_and_what_is_no_word_stays() -> None:
    samples = augmented(toy_texts(5, pairs=True), samples=4)
    assert len(samples) > 15
    for text, second in samples:
        assert (len(text.split(" ")), second.count("  ")) == (10, 1)
    assert len({second for _, second in samples}) > 5
    assert augmented(Texts(["", "a"], None, np.zeros(2)), samples=9, probability=1.0) == [("x1",), ("x0",)]


def test_the_command_writes_what_a_training_reads(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "more.jsonl", tmp_path / "task.toml"
    config.write_text(tomli_w.dumps(toy.task_config(tmp_path, world.files, world.teacher, world.pretrained)))
    options = ["--model", str(world.pretrained), "--out", str(out), "--samples", "2"]
    assert run_command("augment", str(config), *options, f"data.unlabelled={out}") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(list(row) == ["text"] for row in rows)
    assert f"{out}: {len(rows)} texts like the 64 of train\n" in capfd.readouterr().out
    assert run_command("distill", str(config), f"data.unlabelled={out}", "run.steps=1") == 0
    assert f"64 labelled and {len(rows)} unlabelled training examples" in capfd.readouterr().err
    for changed, message in (
        ([str(config), *options], f"augment: --out {out}: give a .jsonl file that does not exist yet"),
        ([str(config), *options, "--samples", "0"], "augment: --samples 0: at least 1"),
        ([str(config), *options, "--probability", "1.5"], "augment: --probability 1.5: above 0 and at most 1"),
        (["configs:pretrain/kd.toml", *options[:3], "a.jsonl"], "augment takes a config of a task whose examples"),
    ):
        assert run_command("augment", *changed) == 2
        assert message in capfd.readouterr().err


def test_models_that_cannot_propose_are_refused(world: World) -> None:
    for path, candidates, message in (
        (world.teacher, 4, "teacher"),
        (world.pretrained, 5000, "words of letters, less than 5000"),
    ):
        with pytest.raises(UserError, match=message):
            WordProposer(str(path), 32, candidates, CPU)
    with pytest.raises(UserError, match="65 tokens, but"):
        WordProposer(str(world.pretrained), 65, 4, CPU)
