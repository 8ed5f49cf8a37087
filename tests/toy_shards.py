"""Token shards written by hand, as `shards` documents them: an independent twin of what prepare writes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lad_dist.data.tokenization.loading import fingerprint
from lad_dist.data.tokenization.special_tokens import SpecialTokenFrame, special_token_frame, vocabulary_size

Documents = Sequence[Sequence[int]]


def write_shards(
    folder: Path,
    tokenizer: Any,
    sources: Mapping[str, Documents],
    held_out: Documents = (),
    weights: Mapping[str, float] | None = None,
    shard: int = 3,
) -> Path:
    """Sources of documents, `shard` documents a file; what is held out belongs to the first source."""
    frame = special_token_frame(tokenizer)
    listed = []
    for number, (name, documents) in enumerate(sources.items()):
        (folder / name).mkdir(parents=True)
        splits = {"train": documents, "held_out": held_out if number == 0 else ()}
        written = {
            split: {
                "documents": len(texts),
                "tokens": sum(map(len, texts)),
                "shards": [
                    _write(folder, f"{name}/{split}-{i // shard:05d}", texts[i : i + shard], frame)
                    for i in range(0, len(texts), shard)
                ],
            }
            for split, texts in splits.items()
        }
        listed.append({"name": name, "weight": (weights or {}).get(name, 1.0), "splits": written})
    manifest = {
        "format": 2,
        "tokenizer": {"fingerprint": fingerprint(tokenizer)},
        "vocabulary": vocabulary_size(tokenizer),
        "dtype": "uint16",
        "sources": listed,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _write(folder: Path, name: str, documents: Documents, frame: SpecialTokenFrame) -> dict[str, Any]:
    separator = [*frame.after.tolist(), *frame.before.tolist()]
    ids = np.array([token for document in documents for token in (*document, *separator)], dtype=np.uint16)
    ids.tofile(folder / f"{name}.bin")
    np.save(folder / f"{name}.offsets.npy", np.cumsum([0, *(len(d) + len(separator) for d in documents)]))
    data, offsets = ((folder / f"{name}{end}").read_bytes() for end in (".bin", ".offsets.npy"))
    return {
        "file": f"{name}.bin",
        "sha256": hashlib.sha256(data).hexdigest(),
        "length": len(ids),
        "documents": len(documents),
        "offsets": f"{name}.offsets.npy",
        "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
        "offsets_bytes": len(offsets),
    }
