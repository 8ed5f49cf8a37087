"""Merging against a few lines of plain Python that do the same."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.data.shards import chunks
from lad_dist.data.shards import merge as merging
from lad_dist.data.shards.chunks import RECORD, TextChunk
from lad_dist.data.shards.merge import MergeJob, ShardWriter, held_out_limit, merge_chunks

SEPARATOR = [3, 2]


class Document(NamedTuple):
    text: int  # equal texts, equal hashes and ids
    length: int

    @property
    def ids(self) -> list[int]:
        return [10 + self.text, *range(100, 100 + self.length)][: self.length]

    @property
    def halves(self) -> tuple[int, int]:
        digest = hashlib.blake2b(str(self.text).encode(), digest_size=16).digest()
        # Some differ in one half alone.
        high = 7 << 40 if self.text % 5 == 0 else int.from_bytes(digest[:8], "big")
        return high, 9 if self.text % 5 == 1 else int.from_bytes(digest[8:], "big")


Corpus = list[list[list[Document]]]  # of sources, of chunks
documents = st.integers(0, 60).map(lambda text: Document(text, text % 7))
corpora: st.SearchStrategy[Corpus] = st.lists(
    st.lists(st.lists(documents, max_size=12), min_size=1, max_size=4), min_size=1, max_size=3
)


def job_of(folder: Path, corpus: Corpus, **settings: Any) -> MergeJob:
    """Write chunks by hand, and return the job of merging them."""
    work, out = folder / "work", folder / "out"
    for place in (work, out):
        place.mkdir(parents=True)
    planned, infos = [], []
    for number, source in enumerate(corpus):
        for nth, texts in enumerate(source):
            ids = [i for document in texts for i in (*document.ids, *SEPARATOR)]
            records = [(len(d.ids) + len(SEPARATOR), 5, *d.halves) for d in texts]
            np.array(ids, dtype=np.uint16).tofile(work / f"{len(planned)}.ids")
            np.array(records, dtype=RECORD).tofile(work / f"{len(planned)}.documents")
            skipped = len(planned) % 2
            errors = [f"chunk {len(planned)}"] * skipped
            infos.append({"documents": len(texts), "ids": len(ids), "skipped": skipped, "errors": errors})
            planned.append(TextChunk(len(planned), number, nth == 0, ()))
    sources = [{"kind": "text", "path": f"s{number}"} for number in range(len(corpus))]
    config = PrepareConfig.model_validate({"out": str(out), "tokenizer": "t", "source": sources} | settings)
    return MergeJob(config, planned, infos, work, out, np.dtype(np.uint16), len(SEPARATOR), lambda: None)


def expected(corpus: Corpus, config: PrepareConfig) -> list[dict[str, Any]]:
    texts_before: set[int] = set()
    hashes = [d.halves[0] for chunks in corpus for texts in chunks for d in texts if d.length >= config.min_tokens]
    evaluated = {high for high in hashes if high / 2**64 < config.held_out}
    if config.held_out and hashes:
        evaluated = (evaluated or {min(hashes)}) - {max(hashes)}
    counts_of_sources = []
    for source in corpus:
        counts: dict[str, Any] = {"read": 0, "duplicate": 0, "short": 0, "train": [], "held_out": []}
        for document in (document for texts in source for document in texts):
            counts["read"] += 1
            if document.length < config.min_tokens:
                counts["short"] += 1
            elif config.deduplicate and document.text in texts_before:
                counts["duplicate"] += 1
            else:
                counts["held_out" if document.halves[0] in evaluated else "train"].append(document.ids)
            if document.length >= config.min_tokens:
                texts_before.add(document.text)
        counts_of_sources.append(counts)
    return counts_of_sources


def read_back(out: Path, shards: list[dict[str, Any]]) -> list[list[int]]:
    documents = []
    for shard in shards:
        ids = np.fromfile(out / shard["file"], dtype=np.uint16)
        offsets = np.load(out / shard["offsets"])
        assert (len(ids), len(offsets) - 1) == (shard["length"], shard["documents"])
        assert (offsets[0], offsets[-1]) == (0, len(ids))
        rows = np.split(ids, offsets[1:-1])
        assert all(row[-2:].tolist() == SEPARATOR for row in rows)
        documents += [row[:-2].tolist() for row in rows]
        for file, digest in ((shard["file"], shard["sha256"]), (shard["offsets"], shard["offsets_sha256"])):
            assert hashlib.sha256((out / file).read_bytes()).hexdigest() == digest
        assert (out / shard["offsets"]).stat().st_size == shard["offsets_bytes"]
    return documents


@given(
    corpora,
    st.sampled_from([0.0, 0.3, 0.9]),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 6),
)
@settings(max_examples=150)
def test_every_document_is_in_one_split_or_dropped_for_one_reason(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Corpus,
    share: float,
    min_tokens: int,
    deduplicate: bool,
    tokens_per_shard: int,
    block: int,
    bucket_bits: int,
) -> None:
    options = {"held_out": share, "min_tokens": min_tokens, "deduplicate": deduplicate}
    job = job_of(tmp_path_factory.mktemp("merge"), corpus, tokens_per_shard=tokens_per_shard, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "BLOCK_IDS", block)
        patch.setattr(chunks, "BLOCK_DOCUMENTS", block)
        patch.setattr(merging, "BUCKET_BITS", bucket_bits)
        merged = merge_chunks(job)
    for source, counts_expected in zip(merged["sources"], expected(corpus, job.config), strict=True):
        assert source["documents_read"] == counts_expected["read"]
        assert source["bytes_read"] == 5 * counts_expected["read"]
        assert source["dropped"] == {"duplicate": counts_expected["duplicate"], "short": counts_expected["short"]}
        for split in ("train", "held_out"):
            counts = source["splits"][split]
            assert read_back(job.out, counts["shards"]) == counts_expected[split]
            assert counts["documents"] == len(counts_expected[split])
            assert counts["tokens"] == sum(map(len, counts_expected[split]))
            assert counts["bytes"] == 5 * len(counts_expected[split])
            assert all(shard["length"] <= tokens_per_shard or shard["documents"] == 1 for shard in counts["shards"])
    assert merged["errors"] == [f"chunk {n}" for n in range(1, len(job.chunks), 2)]
    assert sum(source["skipped"] for source in merged["sources"]) == len(merged["errors"])


def test_buckets_are_gone_after_the_merge(tmp_path: Path) -> None:
    job = job_of(tmp_path, [[[Document(n, 6) for n in range(30)]]], min_tokens=1)
    merge_chunks(job)
    assert sorted(file.name for file in job.work.iterdir()) == ["0.documents", "0.ids", "repeated"]


def test_the_split_depends_on_the_hash_alone() -> None:
    texts = [str(number).encode() for number in range(4000)]
    high = np.array([int.from_bytes(hashlib.blake2b(text, digest_size=16).digest()[:8], "big") for text in texts])
    low, half, none = (high < held_out_limit(share, int(high.min()), int(high.max())) for share in (0.1, 0.2, 0.0))
    assert 300 < low.sum() < 500
    assert not (low & ~half).any()
    assert not none.any()


def test_shards_are_filled_as_far_as_whole_documents_allow(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "s/train", np.dtype(np.uint16), 10)
    lengths = np.array([4, 6, 3, 12, 5, 5, 1])
    ids = np.arange(lengths.sum())
    writer.add(ids[:10], lengths[:2])
    writer.add(ids[10:], lengths[2:])
    shards = writer.close()
    assert [shard["length"] for shard in shards] == [10, 3, 12, 10, 1]
    assert [shard["file"] for shard in shards] == [f"s/train-{n:05d}.bin" for n in range(5)]
    read = np.concatenate([np.fromfile(tmp_path / shard["file"], dtype=np.uint16) for shard in shards])
    assert read.tolist() == ids.tolist()
    assert json.dumps(shards)  # plain numbers
