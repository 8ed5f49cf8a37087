"""A tokenizer out of a corpus: WordPiece or a unigram model learns from a sample of the sources' lines."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lad_dist.config.corpus_schema import SourceConfig, TokenizerConfig
from lad_dist.config.errors import UserError
from lad_dist.data.requests import read_json_table, require_same_request, require_unused
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization.algorithms import train_unigram, train_wordpiece
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import vocabulary_size
from lad_dist.distributed.logs import get_logger
from lad_dist.utils import progress
from lad_dist.utils.atomic_io import commit

REQUEST = "request.json"
LINES_PER_REPORT = 10_000  # of progress
TRAINERS = {"wordpiece": train_wordpiece, "unigram": train_unigram}

logger = get_logger(__name__)


def train_tokenizer(config: TokenizerConfig) -> int:
    """Write the tokenizer into config.out, a folder for AutoTokenizer, and return its number of tokens.

    A finished folder of the same request is left as it is; another one exists as a whole or not at all. The same config
    and text give the same bytes. Raise UserError when the folder is of another request, a source is missing, damaged or
    empty, or config.vocab_size is too small for the characters of the text.
    """
    out = Path(config.out)
    sources = [source.model_dump(exclude={"name"}, exclude_none=True) for source in config.source]
    request = config.model_dump(exclude={"out"}) | {"source": sources}
    try:
        if (out / REQUEST).exists():
            require_same_request(out, read_json_table(out / REQUEST, f"remove {out} and train it again"), request)
            logger.info("%s: already trained by this request; nothing to do", out)
        else:
            require_unused(out, "tokenizer trained here")
            for source in config.source:
                corpus.check(source)
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
                folder = Path(name) / "tokenizer"
                _train(config, folder)
                (folder / REQUEST).write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
                commit(folder, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    return vocabulary_size(load_tokenizer(out))


def _train(config: TokenizerConfig, folder: Path) -> None:
    lines: list[str] = []
    characters = 0
    for line in sample(config.source, config.max_characters):
        lines.append(line)
        characters += len(line)
        if len(lines) % LINES_PER_REPORT == 0:
            progress.report(f"{config.out}: reading text", characters, config.max_characters, "characters")
    if not lines:
        raise UserError(f"{config.source[0].path}: no text in it to learn from")
    progress.report(f"{config.out}: reading text", characters, characters, "characters")
    learning = f"{config.out}: learning {config.vocab_size} tokens"
    progress.report(learning, 0, 1)
    TRAINERS[config.kind](lines, config.vocab_size, folder, config.lowercase)
    progress.report(learning, 1, 1)
    logger.info("%s: trained on %s characters", config.out, f"{characters:,}")


def sample(sources: Sequence[SourceConfig], characters: int) -> Iterator[str]:
    """Yield lines of about so many characters, no empty ones, in order.

    The characters are divided among the sources by weight; what a source lacks goes to those after it. A source on disk
    is read twice, and its lines are spread evenly over its text. A hub dataset is streamed, and gives its first lines:
    nothing after them is fetched.
    """
    left = characters
    for number, source in enumerate(sources):
        share = round(left * source.weight / sum(later.weight for later in sources[number:]))
        for line in _spread(source, share):
            left -= len(line)
            yield line


def _spread(source: SourceConfig, share: int) -> Iterator[str]:
    """Yield the lines of a source at which the characters yielded lag behind the characters read."""
    size = share if source.kind == "hub" else sum(map(len, _lines(source)))
    yielded = read = 0
    for line in _lines(source):
        if yielded >= share:
            return
        read += len(line)
        if yielded * size < share * read:
            yielded += len(line)
            yield line


def _lines(source: SourceConfig) -> Iterator[str]:
    for document in corpus.documents(source):
        yield from filter(str.strip, document.split("\n"))
