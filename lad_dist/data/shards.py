"""Token shards: a prepared corpus on disk.

manifest.json                     format, tokenizer, sources, counts, and sha256 of every file
tokenizer/                        the tokenizer that made the tokens
train/00000.bin                   tokens of whole documents end to end, without special tokens
train/00000.offsets.npy           int64 [documents + 1]: where each begins in the .bin
held_out/…                        the same for evaluation

Shards        reads one split through memory maps
ShardWriter   writes one
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lad_dist.config import UserError

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises UserError when the folder has none, or one that this version cannot
    read."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no token shards there; write them with launch/prepare_corpus.py") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); prepare the corpus again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file}: not format {FORMAT} of token shards; prepare the corpus again")
    return manifest


class Shards:
    """One split of a prepared corpus. Documents are numbered from 0 through all shards."""

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        """Raises UserError when the folder holds no shards, or files of other sizes than its manifest says."""
        assert split in SPLITS
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        shards = self.manifest["splits"][split]["shards"]
        dtype = np.dtype(self.manifest["dtype"])
        self._tokens = [self._open(shard, dtype) for shard in shards]
        self._offsets = [np.load(self.folder / shard["offsets"]) for shard in shards]
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self.lengths = np.concatenate([np.empty(0, dtype=np.int64), *(np.diff(each) for each in self._offsets)])

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def tokens(self, document: int, begin: int, end: int) -> np.ndarray:
        """Tokens begin … end - 1 of a document, int64."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        start = self._offsets[shard][document - self._first[shard]]
        return self._tokens[shard][start + begin : start + end].astype(np.int64)

    def _open(self, shard: dict[str, Any], dtype: np.dtype) -> np.ndarray:
        self._require_size(shard["file"], shard["tokens"] * dtype.itemsize)
        self._require_size(shard["offsets"], shard["offsets_bytes"])
        return np.memmap(self.folder / shard["file"], dtype=dtype, mode="r")

    def _require_size(self, name: str, size: int) -> None:
        file = self.folder / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes, not {size}"
            raise UserError(f"{file}: {state}; copy the folder again or prepare the corpus again")


class ShardWriter:
    """Writes one split into `folder/split`, a new shard when the next document would make one longer than
    tokens_per_shard."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, tokens_per_shard: int) -> None:
        self._folder, self._split, self._dtype, self._most = folder, split, dtype, tokens_per_shard
        self._documents: list[np.ndarray] = []
        self._size = 0
        self.shards: list[dict[str, Any]] = []
        (folder / split).mkdir()

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document, int [n >= 1]."""
        if self._size and self._size + len(tokens) > self._most:
            self.close()
        self._documents.append(tokens.astype(self._dtype))
        self._size += len(tokens)

    def close(self) -> None:
        """Writes what is left."""
        if not self._documents:
            return
        name = f"{self._split}/{len(self.shards):05d}"
        offsets = np.cumsum([0, *map(len, self._documents)], dtype=np.int64)
        sha256 = _write(self._folder / f"{name}.bin", self._documents)
        np.save(self._folder / f"{name}.offsets.npy", offsets)
        written = (self._folder / f"{name}.offsets.npy").read_bytes()
        self.shards.append(
            {
                "file": f"{name}.bin",
                "sha256": sha256,
                "tokens": self._size,
                "documents": len(self._documents),
                "offsets": f"{name}.offsets.npy",
                "offsets_sha256": hashlib.sha256(written).hexdigest(),
                "offsets_bytes": len(written),
            }
        )
        self._documents, self._size = [], 0


def _write(file: Path, arrays: Sequence[np.ndarray]) -> str:
    """Writes the arrays end to end, down to the disk; sha256 of the file."""
    digest = hashlib.sha256()
    with open(file, "wb") as stream:
        for array in arrays:
            data = array.tobytes()
            digest.update(data)
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()
