"""Chunks of text: some spans of one source, tokenized together and stored on disk until the merge.

On disk a chunk is NUMBER.ids, every document with the separator after it; NUMBER.documents, a RECORD for each; and
NUMBER.json, which is written last: a chunk without it is not finished.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lad_dist.config.corpus_schema import SourceConfig
from lad_dist.config.errors import UserError
from lad_dist.data.sources import corpus, hub
from lad_dist.data.sources.text_files import Span
from lad_dist.data.tokenization.encoding import FlatIds, encode_flat, refuse_unknown
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast
from lad_dist.utils.atomic_io import fsync, write_text

# About so many chunks, while they are neither too small to be worth a file nor too long to be lost when killed.
MIN_CHUNKS = 512
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 1 << 26  # bytes of text
BATCH_CHARACTERS = 1_000_000  # encoded at once
MAX_MESSAGES = 1000  # of unreadable documents, in the manifest
BLOCK_DOCUMENTS, BLOCK_IDS = 1 << 16, 1 << 22  # read at once

# ids with the separator, bytes of the text in UTF-8, and 128 bits of its BLAKE2b
RECORD = np.dtype([("ids", "<i8"), ("bytes", "<i8"), ("high", "<u8"), ("low", "<u8")])

Item = TypeVar("Item")


class Stopped(Exception):
    """The process was asked to stop."""


class TextChunk(NamedTuple):
    """What is tokenized together: spans of one source."""

    number: int
    source: int
    first: bool  # of its source
    spans: tuple[Span, ...]


class TokenizeJob(NamedTuple):
    """What the tokenizing of all chunks has in common."""

    sources: Sequence[SourceConfig]
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    dtype: np.dtype
    separator: np.ndarray
    skip_errors: bool  # skip documents that cannot be read
    should_stop: Callable[[], bool]


def plan_chunks(sources: Sequence[SourceConfig]) -> list[TextChunk]:
    """Return the chunks in the order of the corpus: files that can be cut are cut, small ones put together.

    They are a function of the files' names and sizes alone. Raise UserError for a source without documents.
    """
    total = sum(span.end for source in sources if source.kind != "hub" for span in corpus.spans(source))
    size = min(max(total // MIN_CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    chunks: list[TextChunk] = []
    for number, source in enumerate(sources):
        groups: Iterable[list[Span]]
        if source.kind == "hub":
            data = hub.load(source.path, source.config, source.split, [source.column], streaming=True)
            count = int(getattr(data, "num_shards", 1))  # 1: a split that cannot be divided
            groups = [[Span(Path(source.path), shard, count)] for shard in range(count)]
        else:
            groups = _grouped(_cut(source, corpus.spans(source), size), lambda span: span.end - span.begin, size)
        for nth, group in enumerate(groups):
            chunks.append(TextChunk(len(chunks), number, nth == 0, tuple(group)))
    return chunks


def _cut(source: SourceConfig, spans: Iterable[Span], size: int) -> Iterator[Span]:
    for span in spans:
        if span.end > size and corpus.can_be_cut(source, span.file):
            yield from (Span(span.file, at, min(at + size, span.end)) for at in range(0, span.end, size))
        else:
            yield span


def _grouped(items: Iterable[Item], size_of: Callable[[Item], int], size: int) -> Iterator[list[Item]]:
    """Yield neighbours together, of at least this size in all, but for the last."""
    group: list[Item] = []
    group_size = 0
    for item in items:
        group.append(item)
        group_size += size_of(item)
        if group_size >= size:
            yield group
            group, group_size = [], 0
    if group:
        yield group


def identity(
    sources: Sequence[SourceConfig], chunks: Sequence[TextChunk], fingerprint: str, library: str
) -> dict[str, str]:
    """Return what the content of the chunks depends on: chunks of the same identity are the same."""
    digest = hashlib.sha256()
    for source in sources:
        settings = {key: value for key, value in source.settings().items() if key not in ("name", "weight")}
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for chunk in chunks:
        digest.update(repr([(chunk.source, str(span.file), span.begin, span.end) for span in chunk.spans]).encode())
    versions = {"version of tokenizers": library, "version of readers": corpus.READING}
    return {"sources": digest.hexdigest(), "tokenizer": fingerprint, **versions}


def read_chunk_info(folder: Path, chunk: TextChunk, dtype: np.dtype) -> dict[str, Any] | None:
    """Return {"documents", "ids", "skipped", "errors"} of a finished chunk, None for one that is not finished."""
    try:
        info: dict[str, Any] = json.loads((folder / f"{chunk.number}.json").read_text(encoding="utf-8"))
        ids, records = ((folder / f"{chunk.number}.{kind}").stat().st_size for kind in ("ids", "documents"))
    except (OSError, ValueError):
        return None
    complete = ids == info["ids"] * dtype.itemsize and records == info["documents"] * RECORD.itemsize
    return info if complete else None


def write_chunk(chunk: TextChunk, job: TokenizeJob) -> dict[str, Any]:
    """Tokenize a chunk into the job's folder, and return what `read_chunk_info` does of it.

    Raise Stopped when the process was asked to stop, and UserError when a document that is not to be skipped cannot be
    read or the tokenizer does not know the text.
    """
    errors: list[str] = []
    documents = ids = 0
    files = [job.folder / f"{chunk.number}.{kind}" for kind in ("ids", "documents")]
    with open(files[0], "wb") as id_file, open(files[1], "wb") as document_file:
        for texts in _grouped(_texts(chunk, job, errors), len, BATCH_CHARACTERS):
            encoded = encode_flat(job.tokenizer, texts)
            if chunk.first and documents == 0:
                refuse_unknown(job.tokenizer, [encoded.ids], job.sources[chunk.source].path)
            records = _records(texts, encoded.lengths + len(job.separator))
            id_file.write(_with_separators(encoded, job).data)
            document_file.write(records.data)
            documents, ids = documents + len(records), ids + int(records["ids"].sum())
    for file in files:
        fsync(file)
    info = {"documents": documents, "ids": ids, "skipped": len(errors), "errors": errors[:MAX_MESSAGES]}
    write_text(job.folder / f"{chunk.number}.json", json.dumps(info))
    return info


def _texts(chunk: TextChunk, job: TokenizeJob, errors: list[str]) -> Iterator[str]:
    for span in chunk.spans:
        for document in corpus.read(job.sources[chunk.source], span):
            if isinstance(document, str):
                yield document
            elif job.skip_errors:
                errors.append(document.message)
            else:
                raise unreadable_document_error(document.message)
            if job.should_stop():
                raise Stopped


def unreadable_document_error(message: str) -> UserError:
    """Return what to raise for an unreadable document that is not to be skipped."""
    return UserError(f'{message}; mend or remove it, or set on_error = "skip"')


def _records(texts: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    data = [text.encode() for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in data)
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    records = np.empty(len(texts), dtype=RECORD)
    records["ids"], records["bytes"] = lengths, [len(text) for text in data]
    records["high"], records["low"] = halves[:, 0], halves[:, 1]
    return records


def _with_separators(encoded: FlatIds, job: TokenizeJob) -> np.ndarray:
    """Return the ids, with a separator after those of each text."""
    size = len(job.separator)
    places = np.cumsum(encoded.lengths + size)[:, None] + np.arange(-size, 0)
    ids = np.empty(len(encoded.ids) + places.size, dtype=job.dtype)
    content = np.ones(len(ids), dtype=bool)
    content[places] = False
    ids[content] = encoded.ids
    ids[places] = job.separator
    return ids


def token_blocks(folder: Path, chunk: TextChunk, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (records, ids) of the documents in order, a few million ids at a time, or one document that has more."""
    with open(folder / f"{chunk.number}.ids", "rb") as ids:
        for records in records_of(folder, chunk):
            ends = np.cumsum(records["ids"])
            begin = 0
            while begin < len(records):
                before = int(ends[begin - 1]) if begin else 0
                end = max(begin + 1, int(np.searchsorted(ends, before + BLOCK_IDS, side="right")))
                yield records[begin:end], np.fromfile(ids, dtype=dtype, count=int(ends[end - 1]) - before)
                begin = end


def records_of(folder: Path, chunk: TextChunk) -> Iterator[np.ndarray]:
    """Yield the RECORDs of a chunk's documents, a few thousand at a time."""
    with open(folder / f"{chunk.number}.documents", "rb") as documents:
        while len(records := np.fromfile(documents, dtype=RECORD, count=BLOCK_DOCUMENTS)):
            yield records
