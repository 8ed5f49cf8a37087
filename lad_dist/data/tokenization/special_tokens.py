"""Special tokens and word boundaries of a tokenizer."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from lad_dist.config.errors import UserError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Frame(NamedTuple):
    """The special tokens before and after a single sequence, and what fills a span after them."""

    before: np.ndarray  # int64
    after: np.ndarray  # int64
    pad: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int64, ascending: the ids of padding, mask, unknown and whatever else stands for no text.

    Not `all_special_ids`: transformers counts the punctuation that ALBERT's sentencepiece model defines among those."""
    flagged = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.array(sorted(flagged | set(role_ids(tokenizer).values())), dtype=np.int64)


def framing_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
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
    parts = [part for place in ("normalizer", "pre_tokenizer", "decoder") for part in _components(state[place])]
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


def _components(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
    if description is None:
        return []
    inner = next((description[key] for key in ("normalizers", "pretokenizers", "decoders") if key in description), None)
    return [description] if inner is None else [part for step in inner for part in _components(step)]


def _space_mark(part: dict[str, Any]) -> str | None:
    """What a step writes for a space, if it is one that does."""
    if part["type"] == "Metaspace":
        return part["replacement"]
    if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
        return part["content"]
    return None


def frame_of(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """What the tokenizer's own template puts around one sequence. Raises UserError for one that makes nothing of a
    letter."""
    probe = rust_backend(tokenizer).encode("a")
    special = np.array(probe.special_tokens_mask, dtype=bool)
    content = np.flatnonzero(~special)
    if not len(content):
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer makes no token of a letter, not even an unknown one")
    ids = np.array(probe.ids, dtype=np.int64)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Frame(ids[: content[0]], ids[content[-1] + 1 :], pad)


def rust_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The Rust tokenizer, without the truncation and padding that an earlier call may have left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
