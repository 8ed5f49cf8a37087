"""Special tokens and word boundaries of a tokenizer."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from lad_dist.config.errors import UserError
from lad_dist.core.batch import TEXT_HEADS
from lad_dist.distributed.logs import get_logger

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

logger = get_logger(__name__)


class SpecialTokenFrame(NamedTuple):
    """The special tokens before and after a single sequence, and the token of padding."""

    before: np.ndarray  # int64
    after: np.ndarray  # int64
    pad: int

    @property
    def size(self) -> int:
        """Return the number of special tokens around a sequence."""
        return len(self.before) + len(self.after)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest token id plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return int64, ascending: the ids of padding, mask, unknown and whatever else stands for no text.

    Not `all_special_ids`: transformers counts the punctuation that ALBERT's sentencepiece model defines among those.
    """
    flagged = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.array(sorted(flagged | set(role_ids(tokenizer).values())), dtype=np.int64)


def framing_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the ids of the special tokens that are no content: all but the unknown token."""
    special = special_ids(tokenizer)
    return special if tokenizer.unk_token_id is None else special[special != tokenizer.unk_token_id]


def role_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of special tokens by the names that configs of models have for them: pad_token_id and so on."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    return {name: number for name, number in ids.items() if number is not None}


def ordinary_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return int64, ascending: the ids of the vocabulary that are no special tokens."""
    return np.setdiff1d(np.array(list(tokenizer.get_vocab().values()), dtype=np.int64), special_ids(tokenizer))


def word_starts(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return bool [V]: whether each token begins a word.

    The first token after a special one begins a word in any case. The tokenizer decides what a word is. To WordPiece a
    punctuation mark is a word of its own. To byte-level BPE and sentencepiece a word stands between spaces, with the
    punctuation that touches it (text without spaces is one word); line breaks and tabs that are tokens begin the word
    that follows. Special tokens and tokens added to the vocabulary are words.

    Raise UserError for a tokenizer of another kind.
    """
    begins = _begins_word(tokenizer)
    starts = np.ones(vocabulary_size(tokenizer), dtype=bool)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        starts[number] = number in added or begins(token)
    starts[special_ids(tokenizer)] = True
    return starts


def _begins_word(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], bool]:
    """Return a function that tells whether a token begins a word, by the description of the backend."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix = state["model"].get("continuing_subword_prefix")
    if state["model"]["type"] == "WordPiece" and prefix:
        return lambda token: not token.startswith(prefix)
    steps = list(_steps([state["normalizer"], state["pre_tokenizer"], state["decoder"]]))
    if any(step["type"] == "ByteLevel" for step in steps):
        decode = decoders.ByteLevel().decode
        return lambda token: decode([token])[:1].isspace()
    marks = [step["replacement"] for step in steps if step["type"] == "Metaspace"]  # what stands for a space
    marks += [
        s["content"] for s in steps if s["type"] == "Replace" and s["pattern"] == {"String": " "} and s["content"]
    ]
    if marks:
        return lambda token: token.startswith(marks[0]) or token[:1].isspace()
    raise UserError(
        f"{tokenizer.name_or_path}: the tokens do not show where words begin ({state['model']['type']}); "
        "those of the following do: WordPiece, byte-level BPE and sentencepiece"
    )


def _steps(descriptions: Iterable[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    """Yield the steps of normalizers, pre-tokenizers and decoders, sequences unrolled."""
    for step in filter(None, descriptions):
        if step["type"] == "Sequence":
            yield from _steps(next(value for key, value in step.items() if key != "type"))
        else:
            yield step


def special_token_frame(tokenizer: PreTrainedTokenizerFast) -> SpecialTokenFrame:
    """Return what the tokenizer's template puts around one sequence.

    Raise UserError for a tokenizer that gives no token for a letter.
    """
    probe = rust_backend(tokenizer).encode("a")
    special = np.array(probe.special_tokens_mask, dtype=bool)
    content = np.flatnonzero(~special)
    if not len(content):
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer gives no token for a letter, not even an unknown one")
    ids = np.array(probe.ids, dtype=np.int64)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return SpecialTokenFrame(ids[: content[0]], ids[content[-1] + 1 :], pad)


def check_frame(tokenizer: PreTrainedTokenizerFast, head: str) -> None:
    """Raise UserError where the head would read a word for the first token; warn where no special token is around text.

    To tag words without special tokens is possible, but hardly what the model has learnt.
    """
    if head in (*TEXT_HEADS, "question_answering"):
        require_first_token(tokenizer)
    elif special_token_frame(tokenizer).size == 0:
        logger.warning(
            "%s: the tokenizer puts no special tokens around a text; does tokenizer.json lack the template?",
            tokenizer.name_or_path,
        )


def require_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError where the tokenizer puts no special token before a text: a head would read the first word."""
    if not len(special_token_frame(tokenizer).before):
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer puts no special token before a text, so the head would read the "
            "first word; give tokenizer.json the template of the model ([CLS] $A [SEP] in BERT's)"
        )


def rust_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the Rust tokenizer, without the truncation and padding that an earlier call may have left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
