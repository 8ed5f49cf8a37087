"""Tokenizers in and out of folders."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, logging

from lad_dist.config.errors import UserError
from lad_dist.data.tokenization.special_tokens import rust_backend
from lad_dist.distributed.logs import get_logger
from lad_dist.utils.text import one_line

COMPARED_TOKENS = 2000
VARIANTS = "Ünïcode e\u0301 ÀÉ ﬁ ① ｱ 東京 (don't)  x\ty"  # tokenizers differ in accents, compatibility and spaces
TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens", "post_processor")  # of tokenizer.json

logger = get_logger(__name__)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a folder or hub name: WordPiece, BPE, or sentencepiece.

    A sentencepiece model file is enough. Raise UserError when no tokenizer can be read, or only a slow one.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the exception below says in one line what is wrong
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises anything from OSError to KeyError here: the user gets one line
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path}: only a slow tokenizer; save it with a tokenizer.json first")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up from a config.json alone
        raise UserError(f"{path}: a tokenizer without a vocabulary; the folder lacks tokenizer.json or vocab.txt")
    return tokenizer


def _why_unreadable(path: str | Path, error: Exception) -> str:
    reason = one_line(error, 200)
    # A sentencepiece model that transformers cannot read it takes for tiktoken's, and complains of that.
    if "tiktoken" not in reason and not any(Path(path).glob("*.model")):
        return f"no tokenizer, neither a folder of one nor a hub name ({reason})"
    if not is_protobuf_available():
        return "the sentencepiece model cannot be read without protobuf; pip install protobuf"
    return "the sentencepiece model cannot be read; the .model file is damaged, or of another kind"


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of normaliser, vocabulary, merges and post-processor, but not of padding and truncation."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenizer_of_teacher(
    path: str, tokenizer: PreTrainedTokenizerFast, token_level: str | None
) -> PreTrainedTokenizerFast:
    """Return the student's `tokenizer` where it has vocabulary and tokens of the teacher's at `path`, else the latter.

    Where something compares teacher and student token by token, `token_level` is its name, None elsewhere. Then the
    teacher has to read the student's tokens: a tokenizer of the same vocabulary that reads text otherwise (in lower
    case) is named in a warning. Raise UserError where the vocabularies differ.
    """
    teacher = load_tokenizer(path)
    teacher_vocabulary, student_vocabulary = teacher.get_vocab(), tokenizer.get_vocab()
    if teacher_vocabulary == student_vocabulary:
        if _read_alike(teacher, tokenizer):
            return tokenizer
        if token_level is None:
            return teacher
        states = [json.loads(each.backend_tokenizer.to_str()) for each in (teacher, tokenizer)]
        parts = ", ".join(part for part in TOKENIZER_PARTS if states[0][part] != states[1][part])
        message = (
            "%s: this teacher's tokenizer has the student's vocabulary, but reads text otherwise (another %s); as %s "
            "compares token by token, the teacher reads the student's tokens; set student.tokenizer if it must not"
        )
        logger.warning(message, path, parts, token_level)
        return tokenizer
    if token_level is None:
        return teacher
    differing = min(set(teacher_vocabulary.items()) ^ set(student_vocabulary.items()))[0]
    raise UserError(
        f"{path}: the teacher's vocabulary ({len(teacher_vocabulary)} tokens) is not the student's "
        f"({len(student_vocabulary)}), they differ at {differing!r}, and {token_level} compares "
        "them token by token; take a student with the teacher's tokenizer, "
        "or kd on a classification or a regression"
    )


def _read_alike(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Return whether two tokenizers give the same ids for words of their common vocabulary, in any case."""
    tokens = sorted(one.get_vocab())
    sample = " ".join(tokens[:: max(1, len(tokens) // COMPARED_TOKENS)])
    texts = [sample, sample.upper(), sample.title(), VARIANTS]
    ids = [[encoding.ids for encoding in rust_backend(each).encode_batch(texts)] for each in (one, other)]
    return ids[0] == ids[1]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a folder for AutoTokenizer. Raise OSError when that fails, as on a full disk."""
    try:
        tokenizer.save_pretrained(out)
    except OSError:
        raise
    except Exception as error:  # what the Rust library raises when the disk is full has no class of its own
        raise OSError(str(error)) from None


def save_beside_model(tokenizer: PreTrainedTokenizerFast, folder: Path, segments: bool, positions: int) -> None:
    """Write the tokenizer for AutoTokenizer into the folder of a model.

    The tokenizer of that folder returns token type ids where the model tells `segments` apart, and none elsewhere. It
    cuts texts to at most as many tokens as the model has `positions`: in transformers where `truncation` is set, and
    always where tokenizer.json is read without transformers.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    rust_backend(tokenizer).enable_truncation(tokenizer.model_max_length)
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = [names[0], *(["token_type_ids"] if segments else []), *names[1:]]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    save_tokenizer(tokenizer, folder)
