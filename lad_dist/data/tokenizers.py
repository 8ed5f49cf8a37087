"""Tokenizers: the one room of transformers in lad_dist.data.

    load_tokenizer(path)        folder or hub name -> fast tokenizer
    train_wordpiece(…)          texts -> folder with a BERT-style WordPiece tokenizer
    train_unigram(…)            texts -> folder with a sentencepiece model and the fast tokenizer equal to it
    save(tokenizer, out)        a folder that load_tokenizer reads
    save_beside(…)              the same beside a model, whose inputs it gives
    fingerprint(tokenizer)      equal for tokenizers that give the same ids
    vocabulary_size(tokenizer)  one more than the largest id
    special_ids, ordinary_ids   the ids of special tokens, and all others
    role_ids(tokenizer)         the ids of padding, mask and so on, as a model's config names them
    word_starts(tokenizer)      which tokens begin a word
    frame(tokenizer)            the special tokens around a sequence
    encode_flat                 text -> ids without special tokens (corpora)
    encode_framed               text -> ids with special tokens, truncated (tasks)
    encode_words                words of a sentence -> ids without special tokens, and where each word begins
    encode_windows              question and context -> windows of the context, with special tokens
    tokenizer_of_teacher(…)     the student's, which must be its own where they are compared token by token
    refuse_unknown(…)           a tokenizer that does not know the text is the user's mistake, and trains in silence

Everything that depends on a tokenizer's special tokens goes through here.
"""

import hashlib
import importlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, logging

from lad_dist.config.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of the tokenizers trained here: ids 0 to 4
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ALPHABET = 1000  # WordPiece keeps so many characters, as BERT's trainers do
MODEL_FILE = "spiece.model"
SCORES_PER_UNIT = 256
UNIGRAM_THREADS = 16  # whatever the machine: which floats are added up first depends on it
WITHOUT_LIMIT = 2**30  # bytes
# What the fast tokenizer looks up together with the character before it.
COMBINING = r"\p{M}\p{Cf}\u0e33\u0eb3\uff9e\uff9f"
# What sentencepiece deletes. The fast tokenizer's own map does too, except for a text's first character.
DELETED = r"\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f"
MOST_UNKNOWN = 0.2
UNKNOWN_SAMPLE = 5000  # tokens looked at
ENCODED_AT_ONCE = 10_000  # texts: the lists that the library returns are large
WINDOWED_AT_ONCE = 1000  # contexts, which are longer


class Frame(NamedTuple):
    """The special tokens before and after a single sequence, and what fills a span after them."""

    before: np.ndarray  # int64
    after: np.ndarray  # int64
    pad: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


class Flat(NamedTuple):
    """Texts as ids, end to end."""

    ids: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64, one per text; their sum is N


class Encoded(NamedTuple):
    """Sequences with their special tokens. `segments` are the token type ids."""

    ids: list[np.ndarray]  # int32, one per text
    segments: list[np.ndarray]  # uint8, as long


class Words(NamedTuple):
    """A sentence as ids without special tokens, and the first token of each of its words."""

    ids: np.ndarray  # int32
    firsts: np.ndarray  # int64, strictly ascending


class Windows(NamedTuple):
    """Sequences with their special tokens, each of a question and as much of its context as there is room for."""

    encoded: Encoded
    question: np.ndarray  # int64, which question each is of, ascending
    context: list[slice]  # its tokens of the context
    characters: list[np.ndarray]  # int64 [tokens of the context, 2], which characters of the context they stand for


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder or of a hub name: WordPiece, BPE, or sentencepiece, also where only its model file is
    there. Raises UserError when there is none, or none that is fast."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what goes wrong is said below, in one line
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises anything from OSError to KeyError here: the user gets one line
        raise UserError(f"{path}: {_why_none(path, error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path}: only a slow tokenizer there; save it with a tokenizer.json first")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up from a config.json alone
        raise UserError(f"{path}: a tokenizer without a vocabulary; the folder lacks tokenizer.json or vocab.txt")
    return tokenizer


def _why_none(path: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    # A sentencepiece model that transformers cannot read it takes for tiktoken's, and complains of that.
    if "tiktoken" not in reason and not any(Path(path).glob("*.model")):
        return f"no tokenizer there, neither a folder nor a hub name ({reason})"
    if not is_protobuf_available():
        return "its sentencepiece model cannot be read without protobuf; pip install protobuf"
    return "its sentencepiece model cannot be read; the .model file is damaged, or of another kind"


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of normaliser, vocabulary, merges and post-processor; not of the transient padding and truncation."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenizer_of_teacher(
    path: str, tokenizer: PreTrainedTokenizerFast, compared: str | None
) -> PreTrainedTokenizerFast:
    """What the teacher at that path reads: the student's `tokenizer` where they have one vocabulary, or else its own.
    Raises UserError where they do not and something, called `compared`, goes token by token through what they say."""
    teacher = load_tokenizer(path)
    its, ours = teacher.get_vocab(), tokenizer.get_vocab()
    if its == ours:
        return tokenizer
    if compared is None:
        return teacher
    differing = next(iter(sorted(set(its.items()) ^ set(ours.items()))))[0]
    raise UserError(
        f"{path}: the teacher's vocabulary ({len(its)} tokens) is not the student's ({len(ours)}), they differ at "
        f"{differing!r}, and {compared} compares them token by token; take a student with the teacher's tokenizer, "
        "or kd on a classification or a regression"
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int64, ascending: the ids of padding, mask, unknown and whatever else stands for no text.

    Not `all_special_ids`: transformers counts the punctuation that ALBERT's sentencepiece model defines among those."""
    flagged = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.array(sorted(flagged | set(role_ids(tokenizer).values())), dtype=np.int64)


def _framing_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The ids of the special tokens that are no content: all but the unknown token."""
    special = special_ids(tokenizer)
    return special if tokenizer.unk_token_id is None else special[special != tokenizer.unk_token_id]


def role_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of special tokens by the names that configs of models have for them: pad_token_id and so on."""
    found = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    return {name: number for name, number in found.items() if number is not None}


def ordinary_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int64, ascending: the ids of the vocabulary that are no special tokens."""
    return np.setdiff1d(np.array(list(tokenizer.get_vocab().values()), dtype=np.int64), special_ids(tokenizer))


def word_starts(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """bool [V]: whether each token begins a word. The first token after a special one begins a word in any case.

    A word is what its tokenizer takes for one. To WordPiece a punctuation mark is a word of its own. To byte-level BPE
    and sentencepiece a word is what stands between spaces, with the punctuation that touches it (text without spaces is
    one word); line breaks and tabs that are tokens begin the word that follows. Special tokens and tokens added to the
    vocabulary are words.

    Raises UserError for a tokenizer of another kind."""
    begins = _begins_word(tokenizer)
    starts = np.ones(vocabulary_size(tokenizer), dtype=bool)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        starts[number] = number in added or begins(token)
    starts[special_ids(tokenizer)] = True
    return starts


def _begins_word(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], bool]:
    """Whether a token begins a word, by what the backend says of itself."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix = state["model"].get("continuing_subword_prefix")
    if state["model"]["type"] == "WordPiece" and prefix:
        return lambda token: not token.startswith(prefix)
    parts = [part for place in ("normalizer", "pre_tokenizer", "decoder") for part in _parts(state[place])]
    if any(part["type"] == "ByteLevel" for part in parts):
        decode = decoders.ByteLevel().decode
        return lambda token: decode([token])[:1].isspace()
    mark = next(filter(None, map(_space_mark, parts)), None)
    if mark is not None:
        return lambda token: token.startswith(mark) or token[:1].isspace()
    raise UserError(
        f"{tokenizer.name_or_path}: whole words cannot be told from its tokens ({state['model']['type']}); "
        "they can for WordPiece, byte-level BPE and sentencepiece"
    )


def _parts(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
    if description is None:
        return []
    inner = next((description[key] for key in ("normalizers", "pretokenizers", "decoders") if key in description), None)
    return [description] if inner is None else [part for step in inner for part in _parts(step)]


def _space_mark(part: dict[str, Any]) -> str | None:
    """What a step writes for a space, if it is one that does."""
    if part["type"] == "Metaspace":
        return part["replacement"]
    if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
        return part["content"]
    return None


def train_wordpiece(texts: Iterable[str], vocabulary: int, out: Path, lowercase: bool = True) -> None:
    """Trains a WordPiece tokenizer of `vocabulary` tokens into the folder `out`, for AutoTokenizer. With `lowercase`
    it reads text in lower case and without accents, as uncased BERT's does.

    Of the characters the ALPHABET most frequent ones are in. Text that does not hold enough distinct pieces gives a
    smaller vocabulary. The same texts give the same files. Raises UserError for a vocabulary that is too small for the
    characters."""
    texts = list(texts)
    alphabet = _alphabet(texts, lowercase)
    # The trainer numbers continuations as it meets them, in the order of a hash map that differs from process to
    # process, and breaks ties between pieces by number: naming them first gives the same tokenizer every time.
    known = [*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet if _continues(character, lowercase))]
    if vocabulary < len(known) + len(alphabet):
        raise UserError(_too_small(vocabulary, len(known) + len(alphabet)))
    learner = _wordpiece({}, lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
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
    """The ALPHABET most frequent characters as BERT's normaliser leaves them, ties broken by code point."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        counts.update(dict.fromkeys(normalizer.normalize_str(character).replace(" ", ""), count))
    return sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET]


def _continues(character: str, lowercase: bool) -> bool:
    """Whether it can stand inside a word, where BERT splits text into words."""
    word = normalizers.BertNormalizer(lowercase=lowercase).normalize_str(f"a{character}")
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(word)) == 1


def _too_small(vocabulary: int, needed: int) -> str:
    return f"vocabulary = {vocabulary} is too small: characters and special tokens alone are {needed}"


def train_unigram(texts: Iterable[str], vocabulary: int, out: Path, lowercase: bool = False) -> None:
    """Trains a sentencepiece unigram model of `vocabulary` pieces into the folder `out`: MODEL_FILE for sentencepiece,
    and the fast tokenizer made from it for AutoTokenizer. Special tokens have the ids of SPECIAL_TOKENS; [CLS], [SEP]
    and [MASK] are control symbols, which no text yields. Text is normalised by NFKC; with `lowercase` also by case
    folding.

    Both give the same ids for text in NFC, Unicode's composed form, that has no accents on compatibility characters
    (as in halfwidth katakana). Other text the fast tokenizer composes first, and sentencepiece takes as it is.

    The characters that make up 99.95 % of the text are in; others are [UNK]. Text that does not hold enough distinct
    pieces gives a smaller vocabulary. The same texts give the same files. Raises UserError for a vocabulary that is
    too small for the characters, and where protobuf is not installed."""
    model = _sentencepiece_model(texts, vocabulary, lowercase)
    # Multiples of 1/256 are added without rounding, in sentencepiece's 32 bits as in the fast tokenizer's 64: pieces
    # of equal sums are then equal for both, and both take the same.
    for piece in model.pieces:
        piece.score = round(piece.score * SCORES_PER_UNIT) / SCORES_PER_UNIT
    _save(_unigram(model), out)
    (out / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))


def _sentencepiece_model(texts: Iterable[str], vocabulary: int, lowercase: bool) -> Any:
    """What sentencepiece learns from the texts, as the message that its file holds."""
    if not is_protobuf_available():
        raise UserError("a unigram tokenizer cannot be trained without protobuf; pip install protobuf")
    pad, unknown, *control = SPECIAL_TOKENS
    options: dict[str, Any] = {
        "model_type": "unigram",
        "vocab_size": vocabulary,
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
        raise UserError(_why_untrained(vocabulary, str(error))) from None
    messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # needs protobuf
    return messages.ModelProto.FromString(written.getvalue())


def _why_untrained(vocabulary: int, error: str) -> str:
    too_small = re.search(r"required_chars\. \d+ vs (\d+)", error)
    if too_small:
        return _too_small(vocabulary, int(too_small[1]))
    return f"sentencepiece cannot learn from this text ({error.rpartition(']')[2].strip() or 'there is none'})"


def _unigram(model: Any) -> Tokenizer:
    """The fast tokenizer that gives the ids of a sentencepiece model."""
    learnt = model.SentencePiece.NORMAL
    lowest = min(piece.score for piece in model.pieces if piece.type == learnt)
    # The fast tokenizer knows no control symbols: a score below that of any other way to spell one keeps it out.
    never = (lowest - 10) * 8
    pieces = [(piece.piece, piece.score if piece.type == learnt else never) for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            # The fast tokenizer looks a character up together with its accents, and loses those that it does not find:
            # composed first and then kept apart by a character that the map deletes, each is looked up by itself.
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
    """The folder for AutoTokenizer, with BERT's template and special tokens."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    save(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), out)


def save(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the folder for AutoTokenizer. Raises OSError when it cannot, as on a full disk."""
    try:
        tokenizer.save_pretrained(out)
    except OSError:
        raise
    except Exception as error:  # what the Rust library raises when the disk is full has no class of its own
        raise OSError(str(error)) from None


def save_beside(tokenizer: PreTrainedTokenizerFast, folder: Path, segments: bool) -> None:
    """Writes the folder for AutoTokenizer beside a model. Whoever calls it there gets token type ids if the model tells
    `segments` apart, and none if it does not know them."""
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = [names[0], *(["token_type_ids"] if segments else []), *names[1:]]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    save(tokenizer, folder)


def frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """What the tokenizer's own template puts around one sequence. Raises UserError for one that makes nothing of a
    letter."""
    probe = _backend(tokenizer).encode("a")
    special = np.array(probe.special_tokens_mask, dtype=bool)
    content = np.flatnonzero(~special)
    if not len(content):
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer makes no token of a letter, not even an unknown one")
    ids = np.array(probe.ids, dtype=np.int64)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Frame(ids[: content[0]], ids[content[-1] + 1 :], pad)


def encode_flat(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Flat:
    """The ids of each whole text without special tokens: neither added, nor read out of a text that spells one. Only
    the unknown token occurs. Runs on the library's threads; the result does not depend on them."""
    backend = _backend(tokenizer)
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    backend.encode_special_tokens = False
    rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    # Sentencepiece vocabularies hold "</s>" as a piece like any other: a text that spells it yields its id.
    spelt = np.isin(ids, _framing_ids(tokenizer))
    if spelt.any():
        lengths -= np.bincount(np.repeat(np.arange(len(rows)), lengths)[spelt], minlength=len(rows))
        ids = ids[~spelt]
    return Flat(ids, lengths)


def encode_framed(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Encoded:
    """Each text, or pair of texts, with special tokens, cut to max_length tokens where longer: the longer text
    first."""
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    for begin in range(0, len(texts), ENCODED_AT_ONCE):
        chunk = slice(begin, begin + ENCODED_AT_ONCE)
        encoded = tokenizer(
            list(texts[chunk]),
            None if pairs is None else list(pairs[chunk]),
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids += [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
        segments += [np.array(row, dtype=np.uint8) for row in encoded["token_type_ids"]]
    return Encoded(ids, segments)


def encode_words(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sequence[str]]) -> list[Words]:
    """Each sentence as the text that its words and blanks between them make. A word that has no token of its own (a
    control character, or one joined to the word before it) becomes the unknown token: every word has a first token."""
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else frame(tokenizer).pad
    found = []
    for begin in range(0, len(sentences), ENCODED_AT_ONCE):
        chunk = sentences[begin : begin + ENCODED_AT_ONCE]
        encodings = _backend(tokenizer).encode_batch([" ".join(words) for words in chunk], add_special_tokens=False)
        for words, encoding in zip(chunk, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            characters = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            found.append(_first_tokens(ids, characters, words, unknown))
    return found


def _first_tokens(ids: np.ndarray, characters: np.ndarray, words: Sequence[str], unknown: int) -> Words:
    """characters: int64 [tokens, 2], begin and end of each token in the text."""
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    ends = np.cumsum(lengths + 1) - 1
    begins = ends - lengths
    token = np.searchsorted(np.maximum.accumulate(characters[:, 1]), begins, side="right")
    starts = np.append(characters[:, 0], len(" ".join(words)) + 1)[token]
    of_earlier = starts < begins - 1  # some tokens begin with the blank before their word
    lacking = of_earlier | (starts >= ends)
    place = token + of_earlier
    inserted_before: np.ndarray = np.cumsum(lacking) - lacking
    return Words(np.insert(ids, place[lacking], unknown), place + inserted_before)


def encode_windows(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int,
    stride: int,
) -> Windows:
    """Each question with its context, in as many windows of max_length tokens as hold the whole of it; neighbours
    share `stride` tokens, less than half of max_length. Of a question there is at most what fills half a window."""
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    found = Windows(Encoded(ids, segments), np.empty(0, dtype=np.int64), [], [])
    numbers: list[int] = []
    special = tokenizer.num_special_tokens_to_add(pair=True)
    questions = _cut(tokenizer, questions, max(0, max_length // 2 - special))
    for begin in range(0, len(questions), WINDOWED_AT_ONCE):
        chunk = slice(begin, begin + WINDOWED_AT_ONCE)
        encoded = tokenizer(
            list(questions[chunk]),
            list(contexts[chunk]),
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids += [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
        segments += [np.array(row, dtype=np.uint8) for row in encoded["token_type_ids"]]
        numbers += [begin + number for number in encoded["overflow_to_sample_mapping"]]
        for window, characters in enumerate(encoded["offset_mapping"]):
            mine = np.flatnonzero([side == 1 for side in encoded.sequence_ids(window)])
            context = slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)
            found.context.append(context)
            found.characters.append(np.array(characters[context], dtype=np.int64).reshape(-1, 2))
    return found._replace(question=np.array(numbers, dtype=np.int64))


def _cut(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], most: int) -> list[str]:
    """The texts, each to the end of its token number `most`, or of an earlier one where a beginning of the text is read
    as more tokens than it was as a part of it."""
    cut, long, aim = list(texts), list(range(len(texts))), most
    while long:
        encodings = _backend(tokenizer).encode_batch([cut[n] for n in long], add_special_tokens=False)
        ends = {n: encoding.offsets for n, encoding in zip(long, encodings, strict=True) if len(encoding) > most}
        for n, offsets in ends.items():
            cut[n] = cut[n][: offsets[aim - 1][1]] if aim else ""
        long, aim = list(ends), aim - 1
    return cut


def _backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The Rust tokenizer, without the truncation and padding that an earlier call may have left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def refuse_unknown(tokenizer: PreTrainedTokenizerFast, sequences: Iterable[np.ndarray], what: str) -> None:
    """Raises UserError when more than a fifth of the first few thousand tokens of `what` are the unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    framing = _framing_ids(tokenizer)
    seen = bad = 0
    for sequence in sequences:
        content = sequence[~np.isin(sequence, framing)]
        seen, bad = seen + len(content), bad + int((content == unknown).sum())
        if seen >= UNKNOWN_SAMPLE:
            break
    if bad > MOST_UNKNOWN * seen:
        raise UserError(
            f"{what}: {bad} of the first {seen} tokens are {tokenizer.unk_token}; "
            "this tokenizer does not know the text: wrong tokenizer, or wrong language"
        )
