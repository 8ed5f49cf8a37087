"""Text to token shards, once, before training: `prepare(config)`.

documents -> batches -> the tokenizer's threads -> train or held-out by a hash of the text -> shards -> manifest, then
a rename: the folder `out` is there as a whole or not at all. What a document becomes depends on its text and the
tokenizer alone.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import __version__ as tokenizers_version

from lad_dist.config import PrepareConfig, Source, UserError
from lad_dist.data import corpus, tokenizers
from lad_dist.data.shards import FORMAT, MANIFEST, SPLITS, ShardWriter, read_manifest

BATCH_CHARACTERS = 1_000_000  # encoded at once: enough to keep every thread busy
REPORT_TOKENS = 10_000_000
UINT16_IDS = 65536


def prepare(config: PrepareConfig, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the shards into config.out and returns their manifest. `progress` is called with lines for people.

    A finished folder made by the same request is left as it is. Raises UserError for one made by another, for sources
    that are missing, damaged or empty, and for a tokenizer that does not know the text."""
    for source in config.source:
        corpus.check(source)
    tokenizer = tokenizers.load_tokenizer(config.tokenizer)
    request = _request(config, tokenizers.fingerprint(tokenizer))
    out = Path(config.out)
    if (out / MANIFEST).exists():
        return _finished(out, request, progress)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and holds no token shards; give another folder for out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "shards"
        folder.mkdir()
        manifest = _write(config, request, tokenizer, folder, progress)
        folder.rename(out)
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    progress(f"{out}: {_summary(train)} to train on, {_summary(held_out)} held out")
    return manifest


def is_held_out(text: str, share: float) -> bool:
    """Whether the document with this text is kept for evaluation: by a hash, so whatever the order and the other
    documents."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _request(config: PrepareConfig, fingerprint: str) -> dict[str, Any]:
    """What the shards are a function of."""
    settings = config.model_dump(exclude={"out", "tokenizer"}, exclude_none=True)
    return settings | {"tokenizer": fingerprint}


def _finished(out: Path, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    manifest = read_manifest(out)
    differing = sorted(key for key in request if manifest["request"].get(key) != request[key])
    if differing:
        raise UserError(f"{out}: made with another {', '.join(differing)}; remove it or give another folder for out")
    progress(f"{out}: already prepared with this tokenizer and these sources; nothing to do")
    return manifest


def _write(
    config: PrepareConfig, request: dict[str, Any], tokenizer: Any, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Everything of the folder; the manifest."""
    vocabulary = tokenizers.vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if vocabulary <= UINT16_IDS else np.uint32)
    writers = {split: ShardWriter(folder, split, dtype, config.tokens_per_shard) for split in SPLITS}
    sources = []
    for source in config.source:
        counts = _write_source(source, tokenizer, config.held_out, writers, progress)
        sources.append(source.model_dump(exclude_none=True) | counts)
    for writer in writers.values():
        writer.close()
    if not writers["train"].shards:
        raise UserError(f"{config.source[0].path}: no document left to train on; add text or lower held_out")
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest = {
        "format": FORMAT,
        "request": request,
        "tokenizer": {"path": config.tokenizer, "fingerprint": request["tokenizer"], "library": tokenizers_version},
        "vocabulary": vocabulary,
        "dtype": dtype.name,
        "dropped": sum(source["dropped"] for source in sources),
        "splits": {split: _totals(sources, split) | {"shards": writers[split].shards} for split in SPLITS},
        "sources": sources,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _write_source(
    source: Source,
    tokenizer: Any,
    held_out: float,
    writers: dict[str, ShardWriter],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The source's documents into the writers; the counts of each split, and of the empty documents that were
    dropped."""
    counts = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    dropped = reported = 0
    for number, texts in enumerate(_batches(corpus.documents(source))):
        encoded = tokenizers.encode_plain(tokenizer, texts)
        if number == 0:
            tokenizers.refuse_unknown(tokenizer, encoded, source.path)
        for text, tokens in zip(texts, encoded, strict=True):
            if not len(tokens):
                dropped += 1
                continue
            split = "held_out" if is_held_out(text, held_out) else "train"
            writers[split].add(tokens)
            counts[split].update(documents=1, tokens=len(tokens), bytes=len(text.encode()))
        done = sum(count["tokens"] for count in counts.values())
        if done - reported >= REPORT_TOKENS:
            reported = done
            progress(f"{source.path}: {done / 1e6:.0f} million tokens")
    return {split: dict(count) for split, count in counts.items()} | {"dropped": dropped}


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of at least BATCH_CHARACTERS, but for the last."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _totals(sources: list[dict[str, Any]], split: str) -> dict[str, int]:
    return {key: sum(source[split][key] for source in sources) for key in ("documents", "tokens", "bytes")}


def _summary(split: dict[str, Any]) -> str:
    return f"{split['documents']} documents, {split['tokens']} tokens"
