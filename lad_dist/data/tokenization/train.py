"""A tokenizer out of a corpus: `train(config)`.

sources -> a sample of their lines -> WordPiece or unigram -> a rename: the folder `out` is there as a whole or not at
all. The same config and text give the same bytes.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.config.schema import SourceConfig, TokenizerConfig
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization.algorithms import train_unigram, train_wordpiece
from lad_dist.data.tokenization.loading import load_tokenizer
from lad_dist.data.tokenization.special_tokens import vocabulary_size
from lad_dist.utils.atomic_io import commit
from lad_dist.utils.strict_json import parse_json

REQUEST = "request.json"
TRAINERS = {"wordpiece": train_wordpiece, "unigram": train_unigram}


def train_tokenizer(config: TokenizerConfig, progress: Callable[[str], None] = print) -> None:
    """Writes the tokenizer into config.out, a folder for AutoTokenizer. `progress` is called with lines for people.

    A finished folder made by the same request is left as it is. Raises UserError for one made by another, for sources
    that are missing, damaged or empty, and for a vocabulary that is too small for the characters of the text."""
    out = Path(config.out)
    request = _request(config)
    try:
        if (out / REQUEST).exists():
            _finished(out, request, progress)
        else:
            _train(config, request, progress)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


def _train(config: TokenizerConfig, request: dict[str, Any], progress: Callable[[str], None]) -> None:
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and holds no tokenizer trained here; give another folder for out")
    for source in config.source:
        corpus.check(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / "tokenizer"
        characters = _write(config, request, folder, progress)
        commit(folder, out)
    size = vocabulary_size(load_tokenizer(out))
    progress(f"{out}: {size} tokens, learnt from {characters:,} characters")


def _request(config: TokenizerConfig) -> dict[str, Any]:
    """What the tokenizer is a function of."""
    sources = [source.model_dump(exclude={"name"}, exclude_none=True) for source in config.source]
    return config.model_dump(exclude={"out"}) | {"source": sources}


def _finished(out: Path, request: dict[str, Any], progress: Callable[[str], None]) -> None:
    try:
        made_by = dict(parse_json((out / REQUEST).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{out / REQUEST}: damaged ({error}); remove {out} and train it again") from None
    differing = sorted(key for key in request if made_by.get(key) != request[key])
    if differing:
        raise UserError(f"{out}: made with another {', '.join(differing)}; remove it or give another folder for out")
    progress(f"{out}: already trained by this request; nothing to do")


def _write(config: TokenizerConfig, request: dict[str, Any], folder: Path, progress: Callable[[str], None]) -> int:
    """Everything of the folder; the number of characters learnt from."""
    progress(f"{config.out}: reading {len(config.source)} source{'s' * (len(config.source) > 1)}")
    lines = list(sample(config.source, config.max_characters))
    if not lines:
        raise UserError(f"{config.source[0].path}: no text in it to learn from")
    characters = sum(map(len, lines))
    progress(f"{config.out}: learning {config.vocab_size} tokens from {characters:,} characters")
    TRAINERS[config.kind](lines, config.vocab_size, folder, config.lowercase)
    (folder / REQUEST).write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
    return characters


def sample(sources: Sequence[SourceConfig], characters: int) -> Iterator[str]:
    """Lines of about so many characters, no empty ones, in order.

    The characters are shared out over the sources by weight; what a source is short of goes to those after it. Of a
    source on disk, which is read twice, the lines are spread evenly over all its text. Of a hub dataset, which is
    streamed, they are the first: nothing after them is fetched."""
    left = characters
    for number, source in enumerate(sources):
        share = round(left * source.weight / sum(later.weight for later in sources[number:]))
        for line in _spread(source, share):
            left -= len(line)
            yield line


def _spread(source: SourceConfig, share: int) -> Iterator[str]:
    """The lines of a source at which what was taken lags behind what was passed."""
    size = share if source.kind == "hub" else sum(map(len, _lines(source)))
    taken = passed = 0
    for line in _lines(source):
        if taken >= share:
            return
        passed += len(line)
        if taken * size < share * passed:
            taken += len(line)
            yield line


def _lines(source: SourceConfig) -> Iterator[str]:
    for document in corpus.documents(source):
        yield from filter(str.strip, document.split("\n"))
