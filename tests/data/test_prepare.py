import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_text import sentence

from lad_dist.config import PrepareConfig, UserError, dump
from lad_dist.data import corpus, prepare, tokenizers
from lad_dist.data.prepare import is_held_out
from lad_dist.data.shards import Shards

pytest_plugins = ["data_fixtures"]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def config(tmp_path: Path, toy_corpus: Path, toy_tokenizer_folder: Path) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "out": str(tmp_path / "shards"),
            "tokenizer": str(toy_tokenizer_folder),
            "held_out": 0.2,
            "tokens_per_shard": 200,
            "source": [{"kind": "text", "path": str(toy_corpus)}],
        }
    )


def changed(config: PrepareConfig, **changes: object) -> PrepareConfig:
    return PrepareConfig.model_validate(config.model_dump() | changes)


def all_documents(folder: str | Path, split: str) -> list[list[int]]:
    shards = Shards(folder, split)
    return [shards.tokens(i, 0, int(n)).tolist() for i, n in enumerate(shards.lengths)]


def test_every_document_is_in_one_split_as_the_tokenizer_reads_it(config: PrepareConfig, toy_tokenizer) -> None:
    manifest = prepare.prepare(config, quiet)
    texts = list(corpus.documents(config.source[0]))
    for split, held in (("train", False), ("held_out", True)):
        mine = [text for text in texts if is_held_out(text, 0.2) == held]
        expected = [toy_tokenizer.encode(text, add_special_tokens=False) for text in mine]
        assert all_documents(config.out, split) == expected
        counts = manifest["splits"][split]
        assert counts["documents"] == len(mine) > 0
        assert counts["tokens"] == sum(map(len, expected))
        assert counts["bytes"] == sum(map(len, mine))  # the toy text is ASCII
    assert Shards(config.out).manifest == manifest


def test_shards_hold_whole_documents_and_their_sums_are_in_the_manifest(config: PrepareConfig) -> None:
    manifest = prepare.prepare(config, quiet)
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 2
    for shard in shards:
        data = (Path(config.out) / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert shard["tokens"] <= 200
        offsets = np.load(Path(config.out) / shard["offsets"])
        assert (offsets[0], offsets[-1], len(offsets)) == (0, shard["tokens"], shard["documents"] + 1)
    assert manifest["dtype"] == "uint16"


def test_slices_of_documents(config: PrepareConfig) -> None:
    prepare.prepare(config, quiet)
    shards = Shards(config.out)
    longest = int(shards.lengths.argmax())
    whole = shards.tokens(longest, 0, int(shards.lengths[longest]))
    assert whole.dtype == np.int64
    assert shards.tokens(longest, 3, 8).tolist() == whole[3:8].tolist()


def test_large_vocabularies_take_four_bytes(config: PrepareConfig, toy_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((toy_tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = vocabulary | {f"filler{i}": len(vocabulary) + i for i in range(65536)}
    large = tmp_path / "large"
    tokenizers.load_tokenizer(toy_tokenizer_folder).save_pretrained(large)
    (large / "tokenizer.json").write_text(json.dumps(tokenizer))
    first = prepare.prepare(config, quiet)
    second = prepare.prepare(changed(config, out=config.out + "-large", tokenizer=str(large)), quiet)
    assert (first["dtype"], second["dtype"]) == ("uint16", "uint32")
    assert all_documents(config.out, "train") == all_documents(config.out + "-large", "train")


def test_what_is_held_out_depends_on_the_text_alone() -> None:
    texts = [sentence(i, 5) + str(i) for i in range(4000)]
    held = [text for text in texts if is_held_out(text, 0.1)]
    assert 300 < len(held) < 500
    assert set(held) <= {text for text in texts if is_held_out(text, 0.2)}
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_order_of_the_sources_does_not_move_documents_between_splits(config: PrepareConfig, tmp_path: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text(sentence(99, 40))
    added = {"kind": "text", "path": str(more)}
    old = config.model_dump()["source"]
    prepare.prepare(changed(config, source=[*old, added]), quiet)
    prepare.prepare(changed(config, source=[added, *old], out=config.out + "2"), quiet)
    for split in ("train", "held_out"):
        assert sorted(all_documents(config.out, split)) == sorted(all_documents(config.out + "2", split))


def test_empty_documents_are_dropped_and_counted(config: PrepareConfig, toy_corpus: Path) -> None:
    (toy_corpus / "a.txt").write_text("")
    (toy_corpus / "b.txt").write_text("\n \n")
    manifest = prepare.prepare(config, quiet)
    assert manifest["dropped"] == manifest["sources"][0]["dropped"] == 2
    assert sum(manifest["splits"][split]["documents"] for split in ("train", "held_out")) == 60


def test_a_finished_folder_is_left_alone_and_another_request_refused(config: PrepareConfig) -> None:
    first = prepare.prepare(config, quiet)
    before = {file: file.stat().st_mtime_ns for file in Path(config.out).rglob("*")}
    said: list[str] = []
    assert prepare.prepare(config, said.append) == first
    assert len(said) == 1
    assert "already prepared" in said[0]
    with pytest.raises(UserError, match="shards: made with another held_out"):
        prepare.prepare(changed(config, held_out=0.3), quiet)
    assert {file: file.stat().st_mtime_ns for file in Path(config.out).rglob("*")} == before


def test_a_folder_of_something_else_is_refused(config: PrepareConfig) -> None:
    Path(config.out).mkdir()
    (Path(config.out) / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and holds no token shards"):
        prepare.prepare(config, quiet)


def test_nothing_is_left_behind_by_a_failure(config: PrepareConfig, toy_corpus: Path, tmp_path: Path) -> None:
    (toy_corpus / "zzz.txt").write_bytes(b"\xff")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"zzz\.txt:1: not UTF-8"):
        prepare.prepare(config, quiet)
    assert set(tmp_path.iterdir()) == before


def test_a_tokenizer_that_does_not_know_the_text_is_refused(config: PrepareConfig, toy_corpus: Path) -> None:
    for file in toy_corpus.iterdir():
        file.write_text("ζωή και θάνατος the")
    with pytest.raises(UserError, match=r"texts: 180 of the first 240 tokens are \[UNK\]"):
        prepare.prepare(config, quiet)


def test_nothing_to_train_on_is_refused(config: PrepareConfig, toy_corpus: Path) -> None:
    for file in toy_corpus.iterdir():
        file.write_text("")
    with pytest.raises(UserError, match="texts: no document left to train on"):
        prepare.prepare(config, quiet)


def test_damaged_shards_are_named(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no token shards there"):
        Shards(tmp_path / "nowhere")
    prepare.prepare(config, quiet)
    file = Path(config.out) / "train" / "00001.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train/00001\.bin: \d+ bytes, not \d+"):
        Shards(config.out)
    file.unlink()
    with pytest.raises(UserError, match=r"train/00001\.bin: missing"):
        Shards(config.out)
    manifest = Path(config.out) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="not format 1"):
        Shards(config.out)
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        Shards(config.out)


PREPARE_IN_A_PROCESS = """
import sys
from lad_dist.config import PrepareConfig, load
from lad_dist.data.prepare import prepare
prepare(load(PrepareConfig, sys.argv[1], [f"out={sys.argv[2]}"]))
"""


@pytest.mark.data
def test_real_corpus_end_to_end_and_whatever_the_threads(real_data: Path, tmp_path: Path) -> None:
    """Two WikiExtractor files and two books, a toy tokenizer trained on them; tokens do not depend on parallelism."""
    wikipedia, books = tmp_path / "wikipedia" / "AA", tmp_path / "books"
    for folder, files in (
        (wikipedia, ["wikipedia/AA/wiki_00", "wikipedia/AA/wiki_01"]),
        (books, ["books/11_alices_adventures_in_wonderland.txt", "books/1064_the_masque_of_the_red_death.txt"]),
    ):
        folder.mkdir(parents=True)
        for file in files:
            (folder / Path(file).name).symlink_to(real_data / file)
    config = PrepareConfig.model_validate(
        {
            "out": "unused",
            "tokenizer": str(tmp_path / "tokenizer"),
            "held_out": 0.1,
            "source": [
                {"kind": "wikiextractor", "path": str(wikipedia.parent)},
                {"kind": "text", "path": str(books)},
            ],
        }
    )
    texts = [text for source in config.source for text in corpus.documents(source)]
    tokenizers.train_wordpiece(texts, 3000, Path(config.tokenizer))
    (tmp_path / "prepare.toml").write_text(dump(config))
    for parallel in ("true", "false"):
        subprocess.run(
            [sys.executable, "-c", PREPARE_IN_A_PROCESS, tmp_path / "prepare.toml", tmp_path / parallel],
            env=os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=True,
        )
    files = sorted(f.relative_to(tmp_path / "true") for f in (tmp_path / "true").rglob("*") if f.is_file())
    assert len(files) >= 7
    for name in files:
        assert (tmp_path / "true" / name).read_bytes() == (tmp_path / "false" / name).read_bytes(), name
    train, held_out = Shards(tmp_path / "true"), Shards(tmp_path / "true", "held_out")
    manifest = train.manifest
    assert len(train.lengths) + len(held_out.lengths) + manifest["dropped"] == len(texts) == 93
    assert manifest["vocabulary"] == 3000
    assert train.lengths.sum() > 450_000
    tokenizer = tokenizers.load_tokenizer(train.tokenizer_folder)
    first = tokenizer.decode(train.tokens(0, 0, 40))
    assert first.startswith("anarchism anarchism is a political philosophy that advocates stateless societies")
