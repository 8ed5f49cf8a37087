"""Tokenizers: the one room of transformers in lad_dist.data.

    load_tokenizer(path)        folder or hub name -> fast tokenizer
    train_wordpiece(…)          texts -> folder with an uncased BERT-style WordPiece tokenizer
    fingerprint(tokenizer)      equal for tokenizers that give the same ids
    vocabulary_size(tokenizer)  one more than the largest id
    frame(tokenizer)            the special tokens around a sequence
    encode_plain, encode_framed text -> ids without special tokens (corpora), with them and truncated (tasks)
    check_vocabulary(…)         two models that read the same token ids must mean the same by them
    refuse_unknown(…)           a tokenizer that does not know the text is the user's mistake, and trains in silence

Everything that depends on a tokenizer's special tokens goes through here.
"""

import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lad_dist.config import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The trainer numbers continuations as it meets them, in the order of a hash map that differs from process to process,
# and breaks ties between pieces by number: naming them first gives the same tokenizer every time.
CONTINUATIONS = tuple(f"##{character}" for character in string.ascii_lowercase + string.digits)
MOST_UNKNOWN = 0.2
UNKNOWN_SAMPLE = 5000  # tokens looked at
ENCODED_AT_ONCE = 10_000  # texts: the lists that the library returns are large


class Frame(NamedTuple):
    """The special tokens before and after a single sequence, and what fills a span after them."""

    before: np.ndarray  # int64
    after: np.ndarray  # int64
    pad: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


class Encoded(NamedTuple):
    """Sequences with their special tokens. `segments` are the token type ids."""

    ids: list[np.ndarray]  # int32, one per text
    segments: list[np.ndarray]  # uint8, as long


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder or of a hub name. Raises UserError when there is none, or none that is fast."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises anything from OSError to KeyError here: the user gets one line
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no tokenizer there, neither a folder nor a hub name ({reason})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path}: only a slow tokenizer there; save it with a tokenizer.json first")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up from a config.json alone
        raise UserError(f"{path}: a tokenizer without a vocabulary; the folder lacks tokenizer.json or vocab.txt")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of normaliser, vocabulary, merges and post-processor; not of the transient padding and truncation."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def check_vocabulary(teacher: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError when the teacher at that path has another vocabulary than the student's `tokenizer`."""
    its, ours = load_tokenizer(teacher).get_vocab(), tokenizer.get_vocab()
    if its != ours:
        differing = next(iter(sorted(set(its.items()) ^ set(ours.items()))))[0]
        raise UserError(
            f"{teacher}: the teacher's vocabulary ({len(its)} tokens) is not the student's ({len(ours)}), "
            f"they differ at {differing!r}; both read the same token ids, so they must be equal"
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def train_wordpiece(texts: Iterable[str], vocabulary: int, out: Path) -> None:
    """Trains an uncased WordPiece tokenizer of `vocabulary` tokens into the folder `out`, for AutoTokenizer.

    Text that does not hold that many distinct pieces gives a smaller one; single characters are always in."""
    learner = _wordpiece({})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL_TOKENS, *CONTINUATIONS], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [*SPECIAL_TOKENS, *sorted(learner.get_vocab().keys() - set(SPECIAL_TOKENS))]
    tokenizer = _wordpiece({piece: number for number, piece in enumerate(pieces)})
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out)


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """What the tokenizer's own template puts around one sequence."""
    probe = _backend(tokenizer).encode("a")
    special = np.array(probe.special_tokens_mask, dtype=bool)
    content = np.flatnonzero(~special)
    ids = np.array(probe.ids, dtype=np.int64)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Frame(ids[: content[0]], ids[content[-1] + 1 :], pad)


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """int64 ids of each whole text, without special tokens: neither added, nor read out of a text that spells one.
    Runs on the library's threads; the result does not depend on them."""
    backend = _backend(tokenizer)
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    backend.encode_special_tokens = False
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


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
    framing = [token for token in tokenizer.all_special_ids if token != unknown]
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
