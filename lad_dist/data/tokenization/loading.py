"""Tokenizers in and out of folders.

load_tokenizer(path)        folder or hub name -> fast tokenizer
save_tokenizer(...)         a folder that load_tokenizer reads
save_beside_model(...)      the same beside a model, whose inputs it gives
fingerprint(tokenizer)      equal for tokenizers that give the same ids
tokenizer_of_teacher(...)   the student's tokenizer where both have one vocabulary, else the teacher's own
"""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, logging

from lad_dist.config.errors import UserError


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder or of a hub name: WordPiece, BPE, or sentencepiece, also where only its model file is
    there. Raises UserError when there is none, or none that is fast."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what goes wrong is said below, in one line
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises anything from OSError to KeyError here: the user gets one line
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path}: only a slow tokenizer there; save it with a tokenizer.json first")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up from a config.json alone
        raise UserError(f"{path}: a tokenizer without a vocabulary; the folder lacks tokenizer.json or vocab.txt")
    return tokenizer


def _why_unreadable(path: str | Path, error: Exception) -> str:
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


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the folder for AutoTokenizer. Raises OSError when it cannot, as on a full disk."""
    try:
        tokenizer.save_pretrained(out)
    except OSError:
        raise
    except Exception as error:  # what the Rust library raises when the disk is full has no class of its own
        raise OSError(str(error)) from None


def save_beside_model(tokenizer: PreTrainedTokenizerFast, folder: Path, segments: bool) -> None:
    """Writes the folder for AutoTokenizer beside a model. Whoever calls it there gets token type ids if the model tells
    `segments` apart, and none if it does not know them."""
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = [names[0], *(["token_type_ids"] if segments else []), *names[1:]]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    save_tokenizer(tokenizer, folder)
