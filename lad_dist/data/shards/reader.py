"""Token shards: a prepared corpus on disk.

manifest.json                        format, tokenizer, sources, counts, and sha256 of every file
tokenizer/                           the tokenizer of these tokens
SOURCE/train-00000.bin               token ids: whole documents end to end, a separator after each
SOURCE/train-00000.offsets.npy       int64 [documents + 1]: where each begins in the .bin
SOURCE/held_out-00000.bin …          the same for evaluation

A separator is what the tokenizer puts after a text and what it puts before one ([SEP] [CLS]). Special tokens occur
nowhere else. So a window of the stream, put between such a pair, is a row of whole sequences wherever it is cut.
"""

import hashlib
import json
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lad_dist.config.errors import UserError
from lad_dist.config.load import first_mistake
from lad_dist.utils import progress
from lad_dist.utils.strict_json import parse_json
from lad_dist.utils.text import byte_size, one_line

FORMAT = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")
OPEN_FILES = 64
READ_BYTES = 1 << 22  # at a time, when verifying


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared corpus. Raise UserError when this version finds none that it can read."""
    file = folder / MANIFEST
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: holds no token shards; write them with lad-dist prepare") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); prepare the corpus again") from None
    stored = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(stored, int) and stored > FORMAT:
        raise UserError(f"{file}: format {stored} is of a later lad_dist; update it, or prepare the corpus again")
    if stored != FORMAT:
        raise UserError(f"{file}: not format {FORMAT} of token shards; prepare the corpus again")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise UserError(f"{file}: damaged ({first_mistake(error)}); prepare the corpus again") from None
    return manifest


class _ManifestTable(BaseModel):
    """A table of a manifest, with the keys that are read later."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0)]
SourceFile = Annotated[str, Field(pattern=r"^[^/\x00]+/[^/\x00]+$")]  # a file of a source's folder
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Shard(_ManifestTable):
    file: SourceFile
    length: Count
    documents: Count
    sha256: Sha256
    offsets: SourceFile
    offsets_bytes: Count
    offsets_sha256: Sha256


class _Counts(_ManifestTable):
    tokens: Count
    shards: list[_Shard]


class _Splits(_ManifestTable):
    train: _Counts
    held_out: _Counts


class _Source(_ManifestTable):
    name: str
    weight: float = Field(gt=0)
    splits: _Splits


class _Tokenizer(_ManifestTable):
    fingerprint: str


class _Manifest(_ManifestTable):
    dtype: Literal["uint16", "uint32"]
    vocabulary: int = Field(ge=1)
    tokenizer: _Tokenizer
    sources: list[_Source] = Field(min_length=1)
    request: dict[str, Any] = {}


class Shards:
    """One split of a prepared corpus. `streams` are those of its sources that have documents in this split."""

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        """Open the shards. Raise UserError when the folder holds none, or files of sizes that the manifest denies."""
        assert split in SPLITS
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        dtype = np.dtype(self.manifest["dtype"])
        streams = [Stream(self.folder, source, split, dtype) for source in self.manifest["sources"]]
        self.streams = [stream for stream in streams if stream.length]

    @property
    def fingerprint(self) -> str:
        """Return a hash of all tokens, out of the hashes in the manifest."""
        hashed = [self.manifest["tokenizer"]["fingerprint"], self.manifest["sources"]]
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_folder(self) -> Path:
        """Return the folder of the tokenizer that the shards were prepared with."""
        return self.folder / "tokenizer"


class Stream:
    """The ids of one source and split, end to end. Reading costs no memory, whatever the size."""

    def __init__(self, folder: Path, source: dict[str, Any], split: str, dtype: np.dtype) -> None:
        counts = source["splits"][split]
        self.name: str = source["name"]
        self.weight: float = source["weight"]
        self.tokens: int = counts["tokens"]  # without separators
        self._shards = counts["shards"]
        self._folder, self._dtype = folder, dtype
        for shard in self._shards:
            _require_sizes(folder, shard, dtype)
        self._begins = np.cumsum([0, *(shard["length"] for shard in self._shards)])
        self.length = int(self._begins[-1])  # ids, separators included
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the last used at the end

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return ids begin … end - 1 of the stream, in the shards' own type."""
        shard = int(np.searchsorted(self._begins, begin, side="right")) - 1
        spans = []
        while begin < end:
            until = min(end, int(self._begins[shard + 1]))
            spans.append(self._read(shard, begin - int(self._begins[shard]), until - begin))
            begin, shard = until, shard + 1
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    def _read(self, shard: int, begin: int, count: int) -> np.ndarray:
        # Not a memory map: its pages would count as this process's memory, and grow with all that it has read.
        width = self._dtype.itemsize
        data = os.pread(self._descriptor(shard), count * width, begin * width)
        if len(data) < count * width:
            raise UserError(f"{self._folder / self._shards[shard]['file']}: has become shorter while it was read")
        return np.frombuffer(data, dtype=self._dtype)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self._folder / self._shards[shard]["file"], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _require_sizes(folder: Path, shard: dict[str, Any], dtype: np.dtype) -> None:
    _require_size(folder / shard["file"], shard["length"] * dtype.itemsize)
    _require_size(folder / shard["offsets"], shard["offsets_bytes"])


def _require_size(file: Path, size: int) -> None:
    actual = file.stat().st_size if file.exists() else None
    if actual != size:
        state = "missing" if actual is None else f"{actual} bytes, not {size}"
        raise UserError(f"{file}: {state}; copy the folder again or prepare the corpus again")


def verify(folder: str | Path) -> int:
    """Compare every shard with the manifest, and return the number of bytes that were read.

    Sizes, sha256 sums and offsets are compared, and ids must be within the vocabulary. Raise UserError, which names
    the file, for the first one that differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    sources = manifest["sources"]
    shards = [shard for source in sources for split in SPLITS for shard in source["splits"][split]["shards"]]
    for shard in shards:
        _require_sizes(folder, shard, dtype)
    listed = {shard[key] for shard in shards for key in ("file", "offsets")}
    for source in sources:
        for file in sorted((folder / source["name"]).glob("*")):
            if str(file.relative_to(folder)) not in listed:  # the folder was put together out of several
                raise UserError(f"{file}: the manifest does not name it; remove it, or prepare the corpus again")
    bytes_read = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sizes = pool.map(lambda shard: _verify(folder, shard, dtype, manifest["vocabulary"]), shards)
        for done, size in enumerate(sizes, 1):
            bytes_read += size
            progress.report(f"verifying {folder}", done, len(shards), byte_size(bytes_read))
    return bytes_read


def _verify(folder: Path, shard: dict[str, Any], dtype: np.dtype, vocabulary: int) -> int:
    file, offsets_file = folder / shard["file"], folder / shard["offsets"]
    largest = _read_through(file, shard["sha256"], dtype)
    if largest >= vocabulary:
        raise UserError(f"{file}: holds id {largest}, the vocabulary has {vocabulary}; prepare the corpus again")
    _read_through(offsets_file, shard["offsets_sha256"], np.dtype(np.uint8))
    offsets = _offsets(offsets_file)
    ends = (len(offsets) - 1, int(offsets[0]), int(offsets[-1]))
    if ends != (shard["documents"], 0, shard["length"]) or (np.diff(offsets) <= 0).any():
        raise UserError(f"{offsets_file}: does not fit the .bin file; prepare the corpus again")
    return int(shard["length"] * dtype.itemsize + shard["offsets_bytes"])


def _offsets(file: Path) -> np.ndarray:
    """Return int64 [documents + 1]. A file of Python objects is not unpickled."""
    try:
        offsets = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged ({one_line(error)}); prepare the corpus again") from None
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise UserError(f"{file}: damaged, it holds no offsets; prepare the corpus again")
    return offsets


def _read_through(file: Path, sha256: str, dtype: np.dtype) -> int:
    """Return the largest number in the file. Raise UserError where the file has another sum."""
    digest, largest = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
    if digest.hexdigest() != sha256:
        raise UserError(f"{file}: damaged, not the sha256 of the manifest; copy it again or prepare the corpus again")
    return largest
