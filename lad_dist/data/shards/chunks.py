"""The work of preparing, in pieces: a part of one source each, tokenized by itself and kept on disk until the merge.

    plan(sources)        the pieces in the order of the corpus: a function of the files' names and sizes alone
    identity(…)          what the content of the pieces depends on
    write(piece, job)    tokenizes a piece into the job's folder
    written(folder, …)   what is said of a finished one, None for one that is not
    chunks(folder, …)    its documents and ids, as many at a time as memory should hold

On disk a piece is NUMBER.ids, every document with the separator after it; NUMBER.documents, a RECORD for each; and
NUMBER.json, written last: without it the piece is not there.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lad_dist.config.errors import UserError
from lad_dist.config.schema import SourceConfig
from lad_dist.data.sources import corpus, hub
from lad_dist.data.sources.text_files import Span
from lad_dist.data.tokenization.encoding import FlatIds, encode_flat, refuse_unknown
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast
from lad_dist.utils.atomic_io import fsync, temporary_path, write_text

MIN_CHUNKS = (
    512  # about as many, while they are neither too small to be worth a file nor too long to be lost when killed
)
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 1 << 26  # bytes of text
BATCH_CHARACTERS = 1_000_000  # encoded at once
LISTED = 1000  # complaints kept with their words
BLOCK_DOCUMENTS, BLOCK_IDS = 1 << 16, 1 << 22  # read at once

# ids with the separator, bytes of the text in UTF-8, and 128 bits of its BLAKE2b
RECORD = np.dtype([("ids", "<i8"), ("bytes", "<i8"), ("high", "<u8"), ("low", "<u8")])


class Stopped(Exception):
    """The work was asked to stop; what is not finished is gone."""


class TextChunk(NamedTuple):
    number: int
    source: int
    first: bool  # of its source
    spans: tuple[Span, ...]


class TokenizeJob(NamedTuple):
    """What all pieces have in common."""

    sources: Sequence[SourceConfig]
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    dtype: np.dtype
    separator: np.ndarray
    skip: bool  # what cannot be read
    stopping: Callable[[], bool]


@dataclass
class ErrorLog:
    """About documents that cannot be read: how many, and the first of them."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, messages: Sequence[str], count: int) -> None:
        self.count += count
        self.messages += messages[: LISTED - len(self.messages)]


def plan_chunks(sources: Sequence[SourceConfig]) -> list[TextChunk]:
    """Files that can be cut are cut, small ones put together. Raises UserError for a source without documents."""
    spans = [_shards(source) if source.kind == "hub" else corpus.spans(source) for source in sources]
    total = sum(span.end for source, its in zip(sources, spans, strict=True) for span in its if source.kind != "hub")
    size = min(max(total // MIN_CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    pieces: list[TextChunk] = []
    for number, (source, its) in enumerate(zip(sources, spans, strict=True)):
        groups = [(span,) for span in its] if source.kind == "hub" else _grouped(_cut(source, its, size), size)
        for nth, group in enumerate(groups):
            pieces.append(TextChunk(len(pieces), number, nth == 0, group))
    return pieces


def _shards(source: SourceConfig) -> list[Span]:
    data = hub.load(source.path, source.config, source.split, [source.column], streaming=True)
    count = hub.shards(data)
    return [Span(Path(source.path), shard, count) for shard in range(count)]


def _cut(source: SourceConfig, spans: Iterable[Span], size: int) -> Iterator[Span]:
    for span in spans:
        if span.end > size and corpus.can_be_cut(source, span.file):
            yield from (Span(span.file, at, min(at + size, span.end)) for at in range(0, span.end, size))
        else:
            yield span


def _grouped(spans: Iterable[Span], size: int) -> Iterator[tuple[Span, ...]]:
    group: list[Span] = []
    held = 0
    for span in spans:
        group.append(span)
        held += span.end - span.begin
        if held >= size:
            yield tuple(group)
            group, held = [], 0
    if group:
        yield tuple(group)


def identity(
    sources: Sequence[SourceConfig], pieces: Sequence[TextChunk], fingerprint: str, library: str
) -> dict[str, str]:
    """Pieces of the same identity are the same, whoever writes them."""
    digest = hashlib.sha256()
    for source in sources:
        settings = {key: value for key, value in source.settings().items() if key not in ("name", "weight")}
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for piece in pieces:
        digest.update(repr([(piece.source, str(span.file), span.begin, span.end) for span in piece.spans]).encode())
    return {"sources": digest.hexdigest(), "tokenizer": fingerprint, "version of tokenizers": library}


def read_chunk_info(folder: Path, piece: TextChunk, dtype: np.dtype) -> dict[str, Any] | None:
    """{"documents", "ids", "skipped", "errors"} of a finished piece."""
    try:
        said: dict[str, Any] = json.loads((folder / f"{piece.number}.json").read_text(encoding="utf-8"))
        ids, records = ((folder / f"{piece.number}.{kind}").stat().st_size for kind in ("ids", "documents"))
    except (OSError, ValueError):
        return None
    whole = ids == said["ids"] * dtype.itemsize and records == said["documents"] * RECORD.itemsize
    return said if whole else None


def write_chunk(piece: TextChunk, job: TokenizeJob) -> None:
    """Raises UserError for what cannot be read, unless that is skipped, and for a tokenizer that does not know the
    text; Stopped when asked to. Then nothing of the piece is on disk."""
    complaints = ErrorLog()
    documents = ids = 0
    with _committed(job.folder, piece.number) as (id_file, document_file):
        for texts in _batches(_texts(piece, job, complaints)):
            encoded = encode_flat(job.tokenizer, texts)
            if piece.first and documents == 0:
                refuse_unknown(job.tokenizer, [encoded.ids], job.sources[piece.source].path)
            records = _records(texts, encoded.lengths + len(job.separator))
            id_file.write(_with_separators(encoded, job).data)
            document_file.write(records.data)
            documents, ids = documents + len(records), ids + int(records["ids"].sum())
    said = {"documents": documents, "ids": ids, "skipped": complaints.count, "errors": complaints.messages}
    write_text(job.folder / f"{piece.number}.json", json.dumps(said))


def _texts(piece: TextChunk, job: TokenizeJob, complaints: ErrorLog) -> Iterator[str]:
    for span in piece.spans:
        for document in corpus.read(job.sources[piece.source], span):
            if isinstance(document, str):
                yield document
            elif job.skip:
                complaints.add([document.message], 1)
            else:
                raise stop_at(document.message)
            if job.stopping():
                raise Stopped


def stop_at(complaint: str) -> UserError:
    return UserError(f'{complaint}; mend or remove it, or set on_error = "skip"')


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


def _records(texts: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    data = [text.encode() for text in texts]
    digests = b"".join(hashlib.blake2b(each, digest_size=16).digest() for each in data)
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    records = np.empty(len(texts), dtype=RECORD)
    records["ids"], records["bytes"] = lengths, [len(each) for each in data]
    records["high"], records["low"] = halves[:, 0], halves[:, 1]
    return records


def _with_separators(encoded: FlatIds, job: TokenizeJob) -> np.ndarray:
    """The ids, a separator after those of each text."""
    size = len(job.separator)
    places = np.cumsum(encoded.lengths + size)[:, None] + np.arange(-size, 0)
    ids = np.empty(len(encoded.ids) + places.size, dtype=job.dtype)
    content = np.ones(len(ids), dtype=bool)
    content[places] = False
    ids[content] = encoded.ids
    ids[places] = job.separator
    return ids


@contextlib.contextmanager
def _committed(folder: Path, number: int) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The files of ids and of documents: on the disk and in their places after the block, gone when it fails."""
    finals = [folder / f"{number}.{kind}" for kind in ("ids", "documents")]
    drafts = [temporary_path(final) for final in finals]
    try:
        with open(drafts[0], "wb") as ids, open(drafts[1], "wb") as documents:
            yield ids, documents
        for draft, final in zip(drafts, finals, strict=True):
            fsync(draft)
            os.replace(draft, final)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def token_blocks(folder: Path, piece: TextChunk, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(records, ids) of the documents in order, a few million ids at a time, or one document that has more."""
    with open(folder / f"{piece.number}.ids", "rb") as ids:
        for records in records_of(folder, piece):
            ends = np.cumsum(records["ids"])
            begin = 0
            while begin < len(records):
                before = int(ends[begin - 1]) if begin else 0
                end = max(begin + 1, int(np.searchsorted(ends, before + BLOCK_IDS, side="right")))
                yield records[begin:end], np.fromfile(ids, dtype=dtype, count=int(ends[end - 1]) - before)
                begin = end


def records_of(folder: Path, piece: TextChunk) -> Iterator[np.ndarray]:
    """The RECORDs of its documents, a few thousand at a time."""
    with open(folder / f"{piece.number}.documents", "rb") as documents:
        while len(records := np.fromfile(documents, dtype=RECORD, count=BLOCK_DOCUMENTS)):
            yield records
