import json
import shutil
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import sweep
import toy_families
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as backend_decoders
from toy_text import WORDS, apart, sentence
from transformers import PreTrainedTokenizerFast

from lad_dist.config.corpus_schema import SourceConfig
from lad_dist.config.errors import UserError
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization import algorithms
from lad_dist.data.tokenization.algorithms import MODEL_FILE, SPECIAL_TOKENS, train_unigram, train_wordpiece
from lad_dist.data.tokenization.encoding import encode_flat, encode_framed, encode_windows
from lad_dist.data.tokenization.loading import fingerprint, load_tokenizer, tokenizer_of_teacher
from lad_dist.data.tokenization.special_tokens import (
    check_frame,
    ordinary_ids,
    special_ids,
    special_token_frame,
    vocabulary_size,
    word_starts,
)

pytest_plugins = ["data_fixtures"]

MANY_SCRIPTS = (
    "The naïve café of Ångström, Straße 7: ΣΊΣΥΦΟΣ στον λόφο, привет мир "
    "(İstanbul, Iğdir) ½ ﬁnd ① \uff5e x² [M] 東京タワー"
)
COMPOUNDS = [a + b for a in WORDS[:8] for b in WORDS[8:]]
PLAIN = [" ".join(COMPOUNDS[(7 * n + 3 * i) % len(COMPOUNDS)] for i in range(12)) for n in range(60)]
TEXTS = PLAIN + [MANY_SCRIPTS] * 20


@pytest.fixture(scope="module")
def unigrams(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether it lowers case."""
    folder = tmp_path_factory.mktemp("unigrams")
    for lowercase in (False, True):
        train_unigram(TEXTS, 300, folder / str(lowercase), lowercase)
    return {lowercase: folder / str(lowercase) for lowercase in (False, True)}


@pytest.fixture(scope="module")
def unigram(unigrams: dict[bool, Path]) -> PreTrainedTokenizerFast:
    return load_tokenizer(unigrams[False])


def roberta(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer laid out like RoBERTa's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = backend_decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    roles = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", **roles).save_pretrained(
        folder
    )
    return load_tokenizer(folder)


def source(kind: str, path: Path) -> SourceConfig:
    return SourceConfig.model_validate({"kind": kind, "path": str(path)})


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    (ids,) = apart(tokenizer, [text])
    return tokenizer.convert_ids_to_tokens(ids.tolist())


# Loading


def test_a_missing_or_empty_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer, neither a folder of one") as caught:
        load_tokenizer(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 200}')
    with pytest.raises(UserError, match="without a vocabulary"):
        load_tokenizer(tmp_path)


def test_fingerprint_depends_on_the_tokens_alone(toy_tokenizer, toy_tokenizer_folder: Path, tmp_path: Path) -> None:
    before = fingerprint(toy_tokenizer)
    toy_tokenizer("the fox", truncation=True, max_length=8, padding="max_length")
    assert fingerprint(toy_tokenizer) == before
    toy_tokenizer.save_pretrained(tmp_path / "copy")
    assert fingerprint(load_tokenizer(tmp_path / "copy")) == before
    toy_tokenizer.add_tokens(["extra"])
    assert fingerprint(toy_tokenizer) != before


# Of each family: the name of its model file, how its pieces are laid out, the frame and what is special afterwards.
ALBERT: dict[str, Any] = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "<pad>"}
ALBERT |= {"control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]", "(", ")", "."]}
DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
DEBERTA |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
FAMILIES = {
    "albert": ("spiece.model", ALBERT, "[CLS]", "[SEP]", {"<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"}),
    "xlm-roberta": ("sentencepiece.bpe.model", {}, "<s>", "</s>", {"<s>", "<pad>", "</s>", "<unk>", "<mask>"}),
    "deberta-v2": ("spm.model", DEBERTA, "[CLS]", "[SEP]", {"[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"}),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family a folder with nothing but a sentencepiece model and a config."""
    root = tmp_path_factory.mktemp("families")
    for family, (file, layout, *_) in FAMILIES.items():
        toy_families.write_sentencepiece(root / family, family, file, PLAIN, vocab_size=70, **layout)
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_a_sentencepiece_model_alone_is_a_tokenizer(family: str, families: Path) -> None:
    file, _, before, after, special = FAMILIES[family]
    tokenizer = load_tokenizer(families / family)
    frame = special_token_frame(tokenizer)
    assert tokenizer.convert_ids_to_tokens(frame.before.tolist()) == [before]
    assert tokenizer.convert_ids_to_tokens(frame.after.tolist()) == [after]
    assert set(tokenizer.convert_ids_to_tokens(special_ids(tokenizer).tolist())) == special
    text = " ".join(WORDS)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(families / family / file)).encode(text, out_type=str)
    assert tokens_of(tokenizer, text) == pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_spells_special_tokens_yields_none(family: str, families: Path) -> None:
    tokenizer = load_tokenizer(families / family)
    special = special_ids(tokenizer)
    spelt = " ".join(tokenizer.convert_ids_to_tokens(special.tolist()))
    ids, lengths = encode_flat(tokenizer, ["the fox", f"the {spelt} fox", "", spelt, "dog"])
    assert set(ids.tolist()) & set(special.tolist()) <= {tokenizer.unk_token_id}
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    tokens = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in rows]
    assert tokens[0] == tokens_of(tokenizer, "the fox")
    assert tokens[1][0] == tokens[0][0]
    assert tokens[1][-len(tokens[0]) + 1 :] == tokens[0][1:]
    assert tokens[2] == []
    assert tokens[4] == tokens_of(tokenizer, "dog")


def test_the_punctuation_that_albert_defines_is_text(families: Path) -> None:
    tokenizer = load_tokenizer(families / "albert")
    assert [token for token in tokens_of(tokenizer, "the (fox).") if token in "()."] == ["(", ")", "."]
    assert set(tokenizer.convert_tokens_to_ids(["(", ")", "."])) <= set(ordinary_ids(tokenizer).tolist())


@pytest.mark.parametrize(
    ("protobuf", "damaged", "message"),
    [(False, False, "without protobuf; pip install protobuf"), (True, True, "the .model file is damaged")],
)
def test_a_sentencepiece_model_that_cannot_be_read_is_one_line(
    protobuf: bool,
    damaged: bool,
    message: str,
    families: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = (families / "albert" / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(model[: len(model) // 3] if damaged else model)
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    if not protobuf:
        without_protobuf(monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert "tiktoken" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def without_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    missing = (lambda: False, import_utils.PROTOBUF_IMPORT_ERROR)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "protobuf", missing)
    for module in ("loading", "algorithms"):
        monkeypatch.setattr(f"lad_dist.data.tokenization.{module}.is_protobuf_available", missing[0])


def changed(source: Path, folder: Path, **parts: Any) -> Path:
    """A copy of a tokenizer with other parts of its tokenizer.json."""
    shutil.copytree(source, folder)
    tables = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tables | parts))
    return folder


def test_a_teacher_that_reads_other_tokens_of_the_same_vocabulary(
    toy_tokenizer, toy_tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same, cased = str(toy_tokenizer_folder), str(changed(toy_tokenizer_folder, tmp_path / "cased", normalizer=None))
    assert tokenizer_of_teacher(same, toy_tokenizer, None) is tokenizer_of_teacher(same, toy_tokenizer, "lad")
    assert tokenizer_of_teacher(cased, toy_tokenizer, None)("THE FOX")["input_ids"] == [2, 1, 1, 3]  # the teacher's
    assert caplog.messages == []
    assert tokenizer_of_teacher(cased, toy_tokenizer, "lad") is toy_tokenizer
    assert "reads text otherwise (another normalizer); as lad compares token by token, " in caplog.text


def test_a_head_that_reads_the_first_token_needs_a_special_one(
    toy_tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = load_tokenizer(changed(toy_tokenizer_folder, tmp_path / "bare", post_processor=None))
    check_frame(bare, "tagging")
    assert "puts no special tokens around a text" in caplog.text
    with pytest.raises(UserError, match="bare: the tokenizer puts no special token before a text"):
        encode_framed(bare, ["the fox", ""], None, 8)
    with pytest.raises(UserError, match="bare: the tokenizer puts no special token before a text"):
        encode_windows(bare, ["fox"], ["the fox"], 8, 2)


# Encoding


def test_frame_and_plain_encoding_ignore_what_an_earlier_call_left_behind(toy_tokenizer) -> None:
    toy_tokenizer("the fox", truncation=True, max_length=4, padding="max_length")
    frame = special_token_frame(toy_tokenizer)
    assert (frame.before.tolist(), frame.after.tolist(), frame.size) == ([2], [3], 2)
    (ids,) = apart(toy_tokenizer, ["the quick [SEP] fox jumps over"])
    assert not set(ids.tolist()) & {toy_tokenizer.sep_token_id, toy_tokenizer.cls_token_id, toy_tokenizer.pad_token_id}
    assert len(ids) >= 6


def test_flat_encoding_is_the_plain_one_end_to_end(toy_tokenizer) -> None:
    texts = ["", sentence(1, 9), "", sentence(2, 3), "[SEP]", ""]
    plain = apart(toy_tokenizer, texts)
    ids, lengths = encode_flat(toy_tokenizer, texts)
    assert ids.dtype == lengths.dtype == np.int64
    assert ids.tolist() == np.concatenate(plain).tolist()
    assert lengths.tolist() == [len(row) for row in plain]
    assert [row.tolist() for row in plain] == [toy_tokenizer.encode(t, add_special_tokens=False) for t in texts[:4]] + [
        toy_tokenizer.convert_tokens_to_ids(["[", "s", "##e", "##p", "]"]),
        [],
    ]
    assert apart(toy_tokenizer, []) == []


def test_ids_are_special_or_ordinary(toy_tokenizer) -> None:
    toy_tokenizer.add_tokens(["extra", AddedToken("<user>", special=True)])
    special, ordinary = special_ids(toy_tokenizer), ordinary_ids(toy_tokenizer)
    assert special.dtype == ordinary.dtype == np.int64
    assert special.tolist() == [0, 1, 2, 3, 4, toy_tokenizer.convert_tokens_to_ids("<user>")]
    assert sorted([*special, *ordinary]) == sorted(toy_tokenizer.get_vocab().values())
    assert toy_tokenizer.convert_tokens_to_ids("extra") in ordinary


# Words


def words_by(starts: np.ndarray, tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The text of each word, as far as `starts` tells words apart, without spaces around it."""
    (ids,) = apart(tokenizer, [text])
    begins = [n for n, token in enumerate(ids) if starts[token] or n == 0]
    groups = [ids[begin:end] for begin, end in pairwise([*begins, len(ids)])]
    return [word for word in (tokenizer.decode(group.tolist()).strip() for group in groups) if word]


def test_to_wordpiece_a_word_is_what_it_splits_text_into(toy_tokenizer) -> None:
    starts = word_starts(toy_tokenizer)
    assert starts.dtype == bool
    assert starts.shape == (vocabulary_size(toy_tokenizer),)
    text = "the wwatch foxes\nanold-lazy dog while"
    words = [word for word, _ in toy_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert len(tokens_of(toy_tokenizer, text)) > len(words)
    (ids,) = apart(toy_tokenizer, [text])
    assert starts[ids].sum() == len(words)
    known = [word for word in words if word != "-"]
    assert [word for word in words_by(starts, toy_tokenizer, text) if word != "[UNK]"] == known


SPACED = "the quick, brown\tfox's old-lazy\n\ndog  (while) owls.\r\nwatch 1234 über the oak"


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "unigram, lower case"])
def test_to_the_others_a_word_is_what_stands_between_spaces(
    kind: str, unigrams: dict[bool, Path], tmp_path: Path
) -> None:
    texts = [SPACED] * 20 + PLAIN
    if kind == "byte-level":
        tokenizer = roberta(texts, tmp_path)
    else:
        train_unigram(texts, 110, tmp_path, kind == "unigram, lower case")
        tokenizer = load_tokenizer(tmp_path)
    starts = word_starts(tokenizer)
    assert starts[special_ids(tokenizer)].all()
    assert not starts.all()
    for text in (SPACED, *PLAIN[:5]):
        assert len(tokens_of(tokenizer, text)) > len(text.split())
        assert words_by(starts, tokenizer, text) == text.split()


@pytest.mark.parametrize("family", FAMILIES)
def test_sentencepiece_families_have_words(family: str, families: Path) -> None:
    tokenizer = load_tokenizer(families / family)
    text = PLAIN[3]
    assert len(tokens_of(tokenizer, text)) > 12
    assert words_by(word_starts(tokenizer), tokenizer, text) == text.split()


def test_words_of_a_sentencepiece_bpe_without_a_pre_tokenizer(families: Path, tmp_path: Path) -> None:
    """As Llama's: the normaliser writes the mark."""
    layout = {"model_type": "bpe", "vocab_size": 70, "byte_fallback": False, "hard_vocab_limit": True}
    toy_families.write_sentencepiece(tmp_path, "llama", "tokenizer.model", PLAIN, **layout)
    tokenizer = load_tokenizer(tmp_path)
    text = PLAIN[3]
    assert words_by(word_starts(tokenizer), tokenizer, text) == text.split()


def test_tokens_added_to_the_vocabulary_are_words(toy_tokenizer) -> None:
    toy_tokenizer.add_tokens(["##extra"])
    assert word_starts(toy_tokenizer)[toy_tokenizer.convert_tokens_to_ids("##extra")]


def test_a_tokenizer_that_does_not_mark_words_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"the tokens do not show where words begin \(WordLevel\)"):
        word_starts(tokenizer)


# Training WordPiece


def test_trained_wordpiece_is_uncased_and_framed_like_berts(toy_tokenizer) -> None:
    encoded = toy_tokenizer("The FOX", "dog", return_token_type_ids=True)
    tokens = toy_tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "the", "fox", "[SEP]", "dog", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert toy_tokenizer.mask_token == "[MASK]"
    assert toy_tokenizer.pad_token_id == 0
    assert toy_tokenizer.tokenize("zebra ζωή") == ["z", "##e", "##b", "##r", "##a", "[UNK]"]


def test_cased_wordpiece_keeps_case_and_accents(tmp_path: Path) -> None:
    train_wordpiece(["The fox, the café"] * 9, 80, tmp_path, lowercase=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("The the café cafe") == ["The", "the", "café", "c", "##a", "##f", "##e"]


def test_the_most_frequent_characters_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "ALPHABET", 3)
    train_wordpiece(["aaaa bbb cc d"] * 5, 60, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("abc d") == ["a", "##b", "##c", "[UNK]"]


@pytest.mark.parametrize("train", [train_wordpiece, train_unigram])
def test_a_vocabulary_too_small_for_the_characters_is_refused(train: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size = 20 is too small: .* alone are (\d+)") as caught:
        train(TEXTS, 20, tmp_path / "out")
    enough = int(str(caught.value).rpartition(" ")[2])
    train(TEXTS, enough, tmp_path / "out")
    assert vocabulary_size(load_tokenizer(tmp_path / "out")) <= enough


# Training unigram


def test_unigram_is_laid_out_like_wordpiece(unigram) -> None:
    assert unigram.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    encoded = unigram("the fox", "dog", return_token_type_ids=True)
    tokens = unigram.convert_ids_to_tokens(encoded["input_ids"])
    assert (tokens[0], tokens.count("[SEP]"), tokens[-1]) == ("[CLS]", 2, "[SEP]")
    assert encoded["token_type_ids"][-2:] == [1, 1]
    assert unigram.decode(encoded["input_ids"], skip_special_tokens=True) == "the fox dog"
    assert (unigram.pad_token_id, unigram.unk_token_id, unigram.mask_token_id) == (0, 1, 4)


def test_case_folding_is_an_option(unigrams: dict[bool, Path]) -> None:
    uncased, cased = (load_tokenizer(unigrams[lowercase]) for lowercase in (True, False))
    assert tokens_of(uncased, "The Straße") == tokens_of(uncased, "the straße")
    assert tokens_of(cased, "The Straße") != tokens_of(cased, "the straße")


def test_text_of_few_pieces_gives_a_smaller_unigram_vocabulary(tmp_path: Path) -> None:
    train_unigram(["the fox"] * 3, 5000, tmp_path)
    assert 5 < vocabulary_size(load_tokenizer(tmp_path)) < 100


def test_training_unigram_without_protobuf_or_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"sentencepiece cannot learn from this text \(no text\)"):
        train_unigram(["", " "], 100, tmp_path / "out")
    without_protobuf(monkeypatch)
    with pytest.raises(UserError, match="without protobuf; pip install protobuf"):
        train_unigram(TEXTS, 300, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def composed(text: str) -> str:
    """In NFC and without accents on compatibility characters: what sentencepiece and the fast tokenizer read alike."""
    return unicodedata.normalize("NFC", "".join(_apart(text)))


def _apart(text: str) -> Iterator[str]:
    for before, character in pairwise("\n" + text):
        accent = unicodedata.category(character).startswith("M") or character in "ﾞﾟ"
        compatible = unicodedata.normalize("NFKC", before) != unicodedata.normalize("NFC", before)
        yield "." + character if accent and compatible else character


TRICKY = (
    "aeQq ſßẞİıΣς\u0301\u0323\u0307ﬁ\uff21ｶﾞ한ᄒ\u200d\u200b\t\r\n\u0085\u00a0👩\ufe0f①½\uff5e▁▅\x01\x00\x1f[]CLSEPMAK"
)
UNICODE = st.text(st.characters(exclude_categories=["Cs", "Cn"]))
SPELT = st.lists(st.sampled_from([*SPECIAL_TOKENS, *WORDS, *MANY_SCRIPTS.split(), "  ", "\n"])).map("".join)


@pytest.mark.parametrize("lowercase", [False, True])
def test_sentencepiece_and_the_fast_tokenizer_are_equal(lowercase: bool, unigrams: dict[bool, Path]) -> None:
    fast = load_tokenizer(unigrams[lowercase])
    slow = sentencepiece.SentencePieceProcessor(model_file=str(unigrams[lowercase] / MODEL_FILE))

    @settings(max_examples=300)
    @given(st.one_of(UNICODE, SPELT, st.text(TRICKY), st.text(MANY_SCRIPTS)).map(composed))
    def holds(text: str) -> None:
        (ids,) = apart(fast, [text])
        assert ids.tolist() == slow.encode(text)

    holds()


@pytest.mark.data
@pytest.mark.parametrize("lowercase", [False, True])
def test_they_are_equal_on_every_real_line(lowercase: bool, real_data: Path, tmp_path: Path) -> None:
    sources = [("wikiextractor", real_data / "wikipedia" / "AA"), ("text", real_data / "books")]
    documents = (text for kind, path in sources for text in corpus.documents(source(kind, path)))
    lines = [line for text in documents for line in text.split("\n")][:: 8 if sweep.enabled else 40]
    assert len(lines) > (10_000 if sweep.enabled else 2000)
    train_unigram(lines[:: 10 if sweep.enabled else 2], 4000, tmp_path, lowercase)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / MODEL_FILE))
    fast = apart(load_tokenizer(tmp_path), lines)
    assert [ids.tolist() for ids in fast] == slow.encode(lines)
