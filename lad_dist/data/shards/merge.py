"""Finished chunks to shards: short and repeated documents dropped, the rest divided into splits.

Documents are taken in the order of the chunks. One that is too short is dropped as such and never counts as repeated;
of the others with equal texts the first stays, whatever its source. Memory does not grow with the corpus: documents
pass through in blocks, and repeated ones are searched for among those whose hashes begin alike, some at a time.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.data.shards.chunks import MAX_MESSAGES, TextChunk, records_of, token_blocks
from lad_dist.data.shards.reader import SPLITS
from lad_dist.utils.atomic_io import sha256

# A document that is looked for among the others: its hash, and its number in the order of the corpus.
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
BUCKET_BITS = 6  # of the hash: 64 files, one in memory at a time


class MergeJob(NamedTuple):
    """What is merged, from where to where."""

    config: PrepareConfig
    chunks: Sequence[TextChunk]
    chunk_infos: Sequence[Mapping[str, Any]]  # of each chunk, by `read_chunk_info`
    work: Path  # folder of the chunks
    out: Path  # folder for the shards
    dtype: np.dtype
    separator: int  # ids of one
    check_stop: Callable[[], None]  # called for each chunk: raises where the process was asked to stop


def merge_chunks(job: MergeJob) -> dict[str, Any]:
    """Write the shards, and return {"sources", "errors"} of the manifest."""
    repeated = find_repeated(job)
    limit = held_out_limit(job.config.held_out, *_hash_range(job))
    sources = []
    begin = 0
    for number, source in enumerate(job.config.source):
        chunks = [chunk for chunk in job.chunks if chunk.source == number]
        counts = _merge_source(job, chunks, source.folder, repeated[begin:], limit)
        begin += counts["documents_read"]
        skipped = sum(job.chunk_infos[chunk.number]["skipped"] for chunk in chunks)
        sources.append(source.settings() | counts | {"skipped": skipped})
    errors = [message for info in job.chunk_infos for message in info["errors"]]
    return {"sources": sources, "errors": errors[:MAX_MESSAGES]}


def held_out_limit(share: float, least: int, greatest: int) -> np.uint64:
    """Return what the first half of a document's hash must be below for the document to be held out.

    So a document is held out by its text alone: neither the order nor the other documents count. Few documents are the
    exception: with a `share` above 0 the one of the `least` hash is held out, and never the one of the `greatest`.
    """
    limit = _share_of_hashes(share)
    return np.uint64(min(max(limit, least + 1), greatest) if limit else 0)


def _share_of_hashes(share: float) -> int:
    """Return the number that this share of all first halves of hashes is below."""
    return int(share * 2**64)


def _hash_range(job: MergeJob) -> tuple[int, int]:
    """Return the least and the greatest first half of the hashes of documents that are long enough.

    Reading ends once there are documents on both sides of the limit: then more of them do not move it.
    """
    limit = _share_of_hashes(job.config.held_out)
    least, greatest = 2**64 - 1, 0
    for chunk in job.chunks:
        for records in records_of(job.work, chunk):
            high = records["high"][~_short(records, job)]
            if len(high):
                least, greatest = min(least, int(high.min())), max(greatest, int(high.max()))
            if least < limit <= greatest or not limit:
                return least, greatest
        job.check_stop()
    return least, greatest


def find_repeated(job: MergeJob) -> np.ndarray:
    """Return bool [documents], whether each has the text of an earlier one: a mapped file beside the chunks."""
    documents = sum(info["documents"] for info in job.chunk_infos)
    with open(job.work / "repeated", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, documents))  # a full disk is an error here, and a crash in the map
    repeated = np.memmap(job.work / "repeated", dtype=bool, mode="r+")
    if job.config.deduplicate:
        for bucket in _buckets(job):
            keys = np.fromfile(bucket, dtype=KEY)
            bucket.unlink()
            keys = keys[np.lexsort((keys["low"], keys["high"]))]  # stable: equal ones stay in the corpus's order
            same = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
            repeated[keys["number"][1:][same]] = True
            job.check_stop()
    return repeated


def _buckets(job: MergeJob) -> list[Path]:
    """Write files of KEYs: every document that is long enough in the one of the first bits of its hash."""
    files = [job.work / f"bucket-{number}" for number in range(2**BUCKET_BITS)]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(open(file, "wb")) for file in files]
        begin = 0
        for chunk in job.chunks:
            for records in records_of(job.work, chunk):
                keys = np.empty(len(records), dtype=KEY)
                keys["high"], keys["low"] = records["high"], records["low"]
                keys["number"] = np.arange(begin, begin + len(records))
                begin += len(records)
                keys = keys[~_short(records, job)]
                buckets = keys["high"] >> np.uint64(64 - BUCKET_BITS)
                for bucket in np.unique(buckets).tolist():
                    streams[bucket].write(keys[buckets == bucket].data)
            job.check_stop()
    return files


def _short(records: np.ndarray, job: MergeJob) -> np.ndarray:
    return records["ids"] - job.separator < job.config.min_tokens


def _merge_source(
    job: MergeJob, chunks: Sequence[TextChunk], name: str, repeated: np.ndarray, limit: np.uint64
) -> dict[str, Any]:
    """Write the shards of one source, and return its counts; `repeated` begins at the first document of the source."""
    writers = {
        split: ShardWriter(job.out, f"{name}/{split}", job.dtype, job.config.tokens_per_shard) for split in SPLITS
    }
    read = Counter(documents=0, bytes=0)
    dropped = Counter(duplicate=0, short=0)
    written = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    for chunk in chunks:
        for records, ids in token_blocks(job.work, chunk, job.dtype):
            short, duplicate = _short(records, job), repeated[read["documents"] :][: len(records)]
            read.update(documents=len(records), bytes=int(records["bytes"].sum()))
            dropped.update(duplicate=int(duplicate.sum()), short=int(short.sum()))
            is_held_out = records["high"] < limit
            for split, selected in zip(SPLITS, (~is_held_out, is_held_out), strict=True):
                selected &= ~short & ~duplicate
                documents = records[selected]
                writers[split].add(ids[np.repeat(selected, records["ids"])], documents["ids"])
                tokens = int(documents["ids"].sum()) - job.separator * len(documents)
                size = int(documents["bytes"].sum())
                written[split].update(documents=len(documents), tokens=tokens, bytes=size)
        job.check_stop()
    splits = {split: dict(written[split]) | {"shards": writers[split].close()} for split in SPLITS}
    counts = {"documents_read": read["documents"], "bytes_read": read["bytes"], "dropped": dict(dropped)}
    return counts | {"splits": splits}


class ShardWriter:
    """Writes documents into `folder/NAME-00000.bin`, and their offsets beside it.

    A new file begins when the next document would make one longer than `max_ids`.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, max_ids: int) -> None:
        self._folder, self._name, self._dtype, self._max_ids = folder, name, dtype, max_ids
        self._shards: list[dict[str, Any]] = []
        self._stream: IO[bytes] | None = None
        self._length = 0
        self._lengths: list[np.ndarray] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their ids end to end, separators included, and the number of ids of each, int64 [n]."""
        ends = np.cumsum(lengths)
        document = start = 0
        while document < len(lengths):
            fitting = int(np.searchsorted(ends, start + self._max_ids - self._length, side="right"))
            if self._length == 0:
                fitting = max(fitting, document + 1)  # a document longer than a shard
            if fitting > document:
                end = int(ends[fitting - 1])
                self._append(ids[start:end], lengths[document:fitting])
                document, start = fitting, end
            if document < len(lengths):
                self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard, and return the shards' tables of the manifest."""
        if self._stream is not None:
            self._finish()
        return self._shards

    def _append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        if self._stream is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self._file, "wb")  # noqa: SIM115 (closed when the shard is full)
        self._stream.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._length += len(ids)
        self._lengths.append(lengths.copy())  # not a view, which would hold all records in memory

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._name}-{len(self._shards):05d}.bin"

    def _finish(self) -> None:
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        offsets_file = self._file.with_suffix(".offsets.npy")
        offsets = np.concatenate([[0], *self._lengths]).cumsum(dtype=np.int64)
        np.save(offsets_file, offsets)
        self._shards.append(
            {
                "file": str(self._file.relative_to(self._folder)),
                "sha256": sha256(self._file),
                "length": self._length,
                "documents": len(offsets) - 1,
                "offsets": str(offsets_file.relative_to(self._folder)),
                "offsets_sha256": sha256(offsets_file),
                "offsets_bytes": offsets_file.stat().st_size,
            }
        )
        self._length, self._lengths = 0, []
