"""Text to token ids: of corpora without special tokens, of tasks with them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from lad_dist.config.errors import UserError
from lad_dist.data.tokenization.special_tokens import (
    framing_ids,
    require_first_token,
    rust_backend,
    special_token_frame,
)
from lad_dist.utils import progress

MAX_UNKNOWN_SHARE = 0.2
UNKNOWN_SAMPLE = 5000  # tokens looked at
TEXTS_PER_CALL = 10_000  # texts: the lists that the library returns are large
CONTEXTS_PER_CALL = 1000  # contexts, which are longer


class FlatIds(NamedTuple):
    """Texts as ids, end to end."""

    ids: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64, one per text; their sum is N


class EncodedSequences(NamedTuple):
    """Sequences with their special tokens. `segments` are the token type ids."""

    ids: list[np.ndarray]  # int32, one per text
    segments: list[np.ndarray]  # uint8, as long
    cut: int = 0  # texts of which tokens were left out


class EncodedWords(NamedTuple):
    """A sentence as ids without special tokens, and the first token of each of its words."""

    ids: np.ndarray  # int32
    firsts: np.ndarray  # int64, strictly ascending


class ContextWindows(NamedTuple):
    """Sequences with their special tokens, each of a question and as much of its context as there is room for."""

    encoded: EncodedSequences
    question: np.ndarray  # int64: the question of each, ascending
    context: list[slice]  # where each has tokens of the context
    characters: list[np.ndarray]  # int64 [tokens of the context, 2]: their characters in the context


def encode_flat(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> FlatIds:
    """Return the ids of each whole text without special tokens: neither added, nor read out of a text that spells one.

    Only the unknown token occurs. The library's threads do the work; the result does not depend on them.
    """
    backend = rust_backend(tokenizer)
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    backend.encode_special_tokens = False
    rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    # Sentencepiece vocabularies hold "</s>" as a piece like any other: a text that spells it yields its id.
    spelt = np.isin(ids, framing_ids(tokenizer))
    if spelt.any():
        lengths -= np.bincount(np.repeat(np.arange(len(rows)), lengths)[spelt], minlength=len(rows))
        ids = ids[~spelt]
    return FlatIds(ids, lengths)


def encode_framed(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> EncodedSequences:
    """Return each text, or pair of texts, with special tokens, cut to max_length tokens: the longer text first.

    Raise UserError where the first token of a sequence would be none of the special ones.
    """
    require_first_token(tokenizer)
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    cut = 0
    for begin in range(0, len(texts), TEXTS_PER_CALL):
        chunk = slice(begin, begin + TEXTS_PER_CALL)
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
        cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
        if len(texts) > TEXTS_PER_CALL:
            progress.report("tokenizing", len(ids), len(texts), "texts")
    return EncodedSequences(ids, segments, cut)


def encode_words(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sequence[str]]) -> list[EncodedWords]:
    """Return each sentence, its words joined by blanks, as ids.

    A word that has no token of its own (a control character, or one joined to the word before it) becomes the unknown
    token: every word has a first token.
    """
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else special_token_frame(tokenizer).pad
    encoded = []
    for begin in range(0, len(sentences), TEXTS_PER_CALL):
        chunk = sentences[begin : begin + TEXTS_PER_CALL]
        encodings = rust_backend(tokenizer).encode_batch([" ".join(words) for words in chunk], add_special_tokens=False)
        for words, encoding in zip(chunk, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            characters = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            encoded.append(_first_tokens(ids, characters, words, unknown))
    return encoded


def _first_tokens(ids: np.ndarray, characters: np.ndarray, words: Sequence[str], unknown: int) -> EncodedWords:
    """Return the sentence; characters: int64 [tokens, 2], begin and end of each token in the text."""
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    ends = np.cumsum(lengths + 1) - 1
    begins = ends - lengths
    token = np.searchsorted(np.maximum.accumulate(characters[:, 1]), begins, side="right")
    starts = np.append(characters[:, 0], len(" ".join(words)) + 1)[token]
    of_earlier = starts < begins - 1  # some tokens begin with the blank before their word
    lacking = of_earlier | (starts >= ends)
    place = token + of_earlier
    inserted_before: np.ndarray = np.cumsum(lacking) - lacking
    return EncodedWords(np.insert(ids, place[lacking], unknown), place + inserted_before)


def encode_windows(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int,
    stride: int,
) -> ContextWindows:
    """Return each question with its context, in as many windows of max_length tokens as hold the whole context.

    Neighbours share `stride` tokens, less than half of max_length. A question is cut where it would fill more than half
    a window. Raise UserError where the first token of a window would be none of the special ones.
    """
    require_first_token(tokenizer)
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    contexts_of_windows: list[slice] = []
    characters_of_windows: list[np.ndarray] = []
    numbers: list[int] = []
    special = tokenizer.num_special_tokens_to_add(pair=True)
    questions = _truncated(tokenizer, questions, max(0, max_length // 2 - special))
    for begin in range(0, len(questions), CONTEXTS_PER_CALL):
        chunk = slice(begin, begin + CONTEXTS_PER_CALL)
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
            places = np.flatnonzero([side == 1 for side in encoded.sequence_ids(window)])
            context = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
            contexts_of_windows.append(context)
            characters_of_windows.append(np.array(characters[context], dtype=np.int64).reshape(-1, 2))
    question = np.array(numbers, dtype=np.int64)
    return ContextWindows(EncodedSequences(ids, segments), question, contexts_of_windows, characters_of_windows)


def _truncated(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Return the texts, each cut to at most so many tokens.

    The beginning of a text may be read as more tokens than within the whole text; then it is cut at an earlier token.
    """
    cut, long, aim = list(texts), list(range(len(texts))), max_tokens
    while long:
        encodings = rust_backend(tokenizer).encode_batch([cut[n] for n in long], add_special_tokens=False)
        ends = {n: encoding.offsets for n, encoding in zip(long, encodings, strict=True) if len(encoding) > max_tokens}
        for n, offsets in ends.items():
            cut[n] = cut[n][: offsets[aim - 1][1]] if aim else ""
        long, aim = list(ends), aim - 1
    return cut


def refuse_unknown(tokenizer: PreTrainedTokenizerFast, sequences: Iterable[np.ndarray], source: str) -> None:
    """Raise UserError when more than a fifth of the first few thousand tokens are unknown; `source` names the text.

    Training would not show the mistake.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    framing = framing_ids(tokenizer)
    tokens = unknown_tokens = 0
    for sequence in sequences:
        content = sequence[~np.isin(sequence, framing)]
        tokens, unknown_tokens = tokens + len(content), unknown_tokens + int((content == unknown).sum())
        if tokens >= UNKNOWN_SAMPLE:
            break
    if unknown_tokens > MAX_UNKNOWN_SHARE * tokens:
        raise UserError(
            f"{source}: {unknown_tokens} of the first {tokens} tokens are {tokenizer.unk_token}; "
            "this tokenizer does not know the text: wrong tokenizer, or wrong language"
        )
