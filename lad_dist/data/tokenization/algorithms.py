"""Training of WordPiece and unigram tokenizers on texts."""

import importlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available

from lad_dist.config.errors import UserError
from lad_dist.data.tokenization.loading import save_tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of the tokenizers trained here: ids 0 to 4
ALPHABET = 1000  # WordPiece has so many characters, as BERT's trainers do
MODEL_FILE = "spiece.model"
SCORES_PER_UNIT = 256
UNIGRAM_THREADS = 16  # whatever the machine: which floats are added up first depends on it
WITHOUT_LIMIT = 2**30  # bytes
# What the fast tokenizer looks up together with the character before it.
COMBINING = r"\p{M}\p{Cf}\u0e33\u0eb3\uff9e\uff9f"
# What sentencepiece deletes. The fast tokenizer's own map does too, except for a text's first character.
DELETED = r"\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f"


def train_wordpiece(texts: Iterable[str], vocab_size: int, out: Path, lowercase: bool = True) -> None:
    """Train a WordPiece tokenizer of `vocab_size` tokens into the folder `out`, for AutoTokenizer.

    With `lowercase` it reads text in lower case and without accents, as uncased BERT's does. The vocabulary holds the
    ALPHABET most frequent characters. Text with too few distinct pieces gives a smaller vocabulary. The same texts give
    the same files. Raise UserError for a `vocab_size` that is too small for the characters.
    """
    texts = list(texts)
    alphabet = _alphabet(texts, lowercase)
    # The trainer numbers continuations as it meets them, in the order of a hash map that differs from process to
    # process, and breaks ties between pieces by number: naming them first gives the same tokenizer every time.
    known = [*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet if _continues(character, lowercase))]
    if vocab_size < len(known) + len(alphabet):
        raise _too_small(vocab_size, len(known) + len(alphabet))
    learner = _wordpiece({}, lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=known,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [*SPECIAL_TOKENS, *sorted(learner.get_vocab().keys() - set(SPECIAL_TOKENS))]
    _save(_wordpiece({piece: number for number, piece in enumerate(pieces)}, lowercase), out)


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(texts: Iterable[str], lowercase: bool) -> list[str]:
    """Return the ALPHABET most frequent characters as BERT's normaliser leaves them, ties broken by code point."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        counts.update(dict.fromkeys(normalizer.normalize_str(character).replace(" ", ""), count))
    return sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET]


def _continues(character: str, lowercase: bool) -> bool:
    """Return whether a character can stand inside a word, where BERT splits text into words."""
    word = normalizers.BertNormalizer(lowercase=lowercase).normalize_str(f"a{character}")
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(word)) == 1


def _too_small(vocab_size: int, needed: int) -> UserError:
    return UserError(f"vocab_size = {vocab_size} is too small: characters and special tokens alone are {needed}")


def train_unigram(texts: Iterable[str], vocab_size: int, out: Path, lowercase: bool = False) -> None:
    """Train a sentencepiece unigram model of `vocab_size` pieces into the folder `out`.

    The folder holds MODEL_FILE for sentencepiece, and the fast tokenizer of that model for AutoTokenizer. Special
    tokens have the ids of SPECIAL_TOKENS; [CLS], [SEP] and [MASK] are control symbols, which no text yields. Text is
    normalised by NFKC; with `lowercase` also by case folding.

    Both tokenizers give the same ids for text in NFC, Unicode's composed form, that has no accents on compatibility
    characters (as in halfwidth katakana). The fast tokenizer composes other text first; sentencepiece reads it as it
    is.

    The vocabulary holds the characters that make up 99.95 % of the text; others are [UNK]. Text with too few distinct
    pieces gives a smaller vocabulary. The same texts give the same files. Raise UserError when `vocab_size` is too
    small for the characters, or protobuf is not installed.
    """
    model = _sentencepiece_model(texts, vocab_size, lowercase)
    # Multiples of 1/256 are added without rounding, in sentencepiece's 32 bits as in the fast tokenizer's 64: pieces
    # of equal sums are then equal for both, and both choose the same.
    for piece in model.pieces:
        piece.score = round(piece.score * SCORES_PER_UNIT) / SCORES_PER_UNIT
    _save(_unigram(model), out)
    (out / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))


def _sentencepiece_model(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Any:
    """Return what sentencepiece learns from the texts, as the message that a model file holds."""
    if not is_protobuf_available():
        raise UserError("a unigram tokenizer cannot be trained without protobuf; pip install protobuf")
    pad, unknown, *control = SPECIAL_TOKENS
    options: dict[str, Any] = {
        "model_type": "unigram",
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "normalization_rule_name": "nmt_nfkc_cf" if lowercase else "nmt_nfkc",
        # A text that spells "[SEP]" must be made of other pieces.
        "required_chars": "" if lowercase else "".join(sorted(set("".join(SPECIAL_TOKENS)))),
        "max_sentence_length": WITHOUT_LIMIT,
        "num_threads": UNIGRAM_THREADS,
        "minloglevel": 2,
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": -1,
        "eos_id": -1,
        "pad_piece": pad,
        "unk_piece": unknown,
        "control_symbols": control,
    }
    composed = (unicodedata.normalize("NFC", text) for text in texts)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=composed, model_writer=written, **options)
    except RuntimeError as error:
        if too_small := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise _too_small(vocab_size, int(too_small[1])) from None
        reason = str(error).rpartition("]")[2].strip() or "no text"
        raise UserError(f"sentencepiece cannot learn from this text ({reason})") from None
    messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # needs protobuf
    return messages.ModelProto.FromString(written.getvalue())


def _unigram(model: Any) -> Tokenizer:
    """Return the fast tokenizer that gives the ids of a sentencepiece model."""
    learnt = model.SentencePiece.NORMAL
    lowest = min(piece.score for piece in model.pieces if piece.type == learnt)
    # The fast tokenizer knows no control symbols: a score below that of any other way to spell one keeps it out.
    never = (lowest - 10) * 8
    pieces = [(piece.piece, piece.score if piece.type == learnt else never) for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            # The fast tokenizer looks a character up together with its accents, and loses those that the map lacks:
            # composed first and then separated by a character that the map deletes, each is looked up by itself.
            normalizers.NFC(),
            normalizers.Replace(Regex(rf"(?=[{COMBINING}])"), "\x01"),
            normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(rf"\A[ {DELETED}]+| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder for AutoTokenizer, with BERT's template and special tokens."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), out)
