"""From text to shards: what they hold, and that it is the same however the work was done."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import alive, wait_until
from toy_text import sentence

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import UserError
from lad_dist.data.shards import chunks, prepare
from lad_dist.data.shards.reader import Shards, read_manifest, verify
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, fingerprint, load_tokenizer
from lad_dist.utils import progress

pytest_plugins = ["data_fixtures"]

KILLS = int(os.environ.get("LAD_DIST_KILLS", "6"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several chunks of toy text, and several batches of a chunk.

    Tests kill processes, but not the machine: writing need not wait for the disk.
    """
    monkeypatch.setattr(chunks, "MIN_CHUNK_BYTES", 1000)
    monkeypatch.setattr(chunks, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def config(tmp_path: Path, toy_corpus: Path, toy_tokenizer_folder: Path) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "out": str(tmp_path / "shards"),
            "tokenizer": str(toy_tokenizer_folder),
            "held_out": 0.2,
            "tokens_per_shard": 200,
            "min_tokens": 1,
            "num_workers": 1,
            "source": [{"kind": "text", "path": str(toy_corpus)}],
        }
    )


@pytest.fixture
def mixed(config: PrepareConfig, tmp_path: Path) -> PrepareConfig:
    """Two sources, repeated and damaged documents among them."""
    texts = [sentence(n, n % 31) for n in range(300)]
    rows = [json.dumps({"text": text}) if n % 50 else "{" for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    added = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    return changed(config, source=[*config.model_dump()["source"], added], on_error="skip", min_tokens=3)


def changed(config: PrepareConfig, **changes: object) -> PrepareConfig:
    return PrepareConfig.model_validate(config.model_dump() | changes)


def prepared(config: PrepareConfig) -> dict[str, Any]:
    assert prepare.prepare(config)
    return read_manifest(Path(config.out))


def all_documents(folder: str | Path, split: str) -> list[list[int]]:
    """The ids of each document without the separator [3, 2] after it."""
    documents: list[list[int]] = []
    for stream in Shards(folder, split).streams:
        ids = stream.read(0, stream.length)
        ends = np.flatnonzero((ids[:-1] == 3) & (ids[1:] == 2)) + 2
        assert ends[-1] == len(ids)
        documents += [document.tolist()[:-2] for document in np.split(ids, ends[:-1])]
    return documents


def content(folder: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def chunk_folder(config: PrepareConfig) -> Path:
    return Path(config.out).with_name(f".{Path(config.out).name}.chunks")


def test_every_document_is_in_one_split_as_the_tokenizer_reads_it(config: PrepareConfig, toy_tokenizer) -> None:
    manifest = prepared(config)
    (source,) = manifest["sources"]
    texts = list(corpus.documents(config.source[0]))
    expected = [toy_tokenizer.encode(text, add_special_tokens=False) for text in texts]
    actual = {split: all_documents(config.out, split) for split in ("train", "held_out")}
    assert sorted(actual["train"] + actual["held_out"]) == sorted(expected)
    for split, documents in actual.items():
        assert documents == [ids for ids in expected if ids in documents]  # in order
        counts = source["splits"][split]
        assert counts["documents"] == len(documents) > 0
        assert counts["tokens"] == sum(map(len, documents))
    assert source["documents_read"] == len(texts)
    assert source["bytes_read"] == sum(map(len, texts))  # the toy text is ASCII
    assert sum(source["splits"][split]["bytes"] for split in actual) == source["bytes_read"]
    assert Shards(config.out).manifest == manifest
    assert verify(config.out) > 0
    counts = {split: len(documents) for split, documents in actual.items()}
    summary = prepare.corpus_summary(config.out)
    assert summary.startswith(f"{config.out}: {counts['train']} documents, ")
    assert f" to train on; {counts['held_out']} documents, " in summary
    assert summary.endswith("; 0 duplicates and 0 short ones dropped, 0 damaged skipped")


def test_manifest(mixed: PrepareConfig, toy_tokenizer) -> None:
    manifest = prepared(changed(mixed, num_workers=2))
    assert manifest["format"] == 2
    assert manifest["frame"] == {"before": [2], "after": [3]}
    assert manifest["dtype"] == "uint16"
    assert manifest["tokenizer"]["fingerprint"] == fingerprint(toy_tokenizer)
    texts, rows = manifest["sources"]
    assert (texts["name"], texts["kind"], texts["weight"], texts["document"]) == ("texts", "text", 1.0, "file")
    assert (rows["name"], rows["kind"], rows["column"], rows["skipped"]) == ("rows", "jsonl", "text", 6)
    for source in (texts, rows):
        written = sum(source["splits"][split]["documents"] for split in ("train", "held_out"))
        assert written + sum(source["dropped"].values()) == source["documents_read"]
    assert texts["documents_read"] == 60
    assert rows["documents_read"] == 294
    assert rows["dropped"]["duplicate"] > 10
    assert [error.partition(": ")[0] for error in manifest["errors"]] == [
        f"{mixed.source[1].path}:{line}" for line in range(1, 300, 50)
    ]
    everything = all_documents(mixed.out, "train") + all_documents(mixed.out, "held_out")
    assert len(everything) == len(set(map(tuple, everything)))
    assert {"num_workers", "part", "parts", "out"} & manifest["request"].keys() == set()


def test_large_vocabularies_take_four_bytes(config: PrepareConfig, toy_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((toy_tokenizer_folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = vocabulary | {f"filler{i}": len(vocabulary) + i for i in range(65536)}
    large = tmp_path / "large"
    load_tokenizer(toy_tokenizer_folder).save_pretrained(large)
    (large / "tokenizer.json").write_text(json.dumps(tokenizer))
    first = prepared(config)
    second = prepared(changed(config, out=config.out + "-large", tokenizer=str(large)))
    assert (first["dtype"], second["dtype"]) == ("uint16", "uint32")
    assert all_documents(config.out, "train") == all_documents(config.out + "-large", "train")


def test_special_tokens_part_documents_and_nothing_else(config: PrepareConfig, toy_corpus: Path) -> None:
    for file in toy_corpus.iterdir():
        file.write_text(f"[SEP] [PAD] {sentence(int(file.stem), 30)} [CLS]")
    prepared(config)
    for document in all_documents(config.out, "train"):
        assert not {0, 2, 3, 4} & set(document)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_number_of_processes_changes_nothing(mixed: PrepareConfig, num_workers: int) -> None:
    prepared(mixed)
    several = changed(mixed, out=mixed.out + "2", num_workers=num_workers)
    prepared(several)
    assert content(several.out) == content(mixed.out)
    assert len(content(mixed.out)) > 10


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_in_any_order_change_nothing(mixed: PrepareConfig, parts: int) -> None:
    prepared(mixed)
    for number, order in enumerate(random.Random(parts).sample(list(permutations(range(parts))), k=min(2, parts))):
        shared = changed(mixed, out=f"{mixed.out}{number}")
        for part in order:
            assert prepare.prepare(changed(shared, part=part, parts=parts))
            assert not Path(shared.out).exists()
        done = sorted(chunk_folder(shared).glob("*.json"))
        times = [file.stat().st_mtime_ns for file in done]
        prepared(changed(shared, num_workers=2))
        assert len(times) > 10
        assert content(shared.out) == content(mixed.out)
        assert not chunk_folder(shared).exists()


def test_a_part_that_is_missing_is_done_by_the_merge_and_no_other_again(
    mixed: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = chunks.plan_chunks(mixed.source)
    assert prepare.prepare(changed(mixed, part=1, parts=3))
    write = chunks.write_chunk

    def write_if_missing(chunk: chunks.TextChunk, job: chunks.TokenizeJob) -> dict[str, Any]:
        assert chunk.number % 3 != 1
        return write(chunk, job)

    monkeypatch.setattr(chunks, "write_chunk", write_if_missing)
    prepared(mixed)
    assert len(planned) > 3


def forked(config: PrepareConfig) -> multiprocessing.Process:
    """Call prepare(config) in another process."""
    process = multiprocessing.get_context("fork").Process(target=prepare.prepare, args=(config,))
    process.start()
    return process


def descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [pid for child in children for pid in descendants(child)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_killed_at_any_time_and_run_again_it_writes_the_same(mixed: PrepareConfig) -> None:
    begin = time.monotonic()
    forked(mixed).join()
    duration = time.monotonic() - begin
    reference = content(mixed.out)
    assert reference
    again = changed(mixed, out=mixed.out + "2", num_workers=2)
    delays = random.Random(0)
    kills = kills_with_chunks = 0
    while kills < KILLS:
        process = forked(again)
        process.join(delays.uniform(0, 1.5 * duration))
        if process.is_alive():
            family = descendants(process.pid or 0)
            process.kill()
            process.join()
            wait_until(lambda: not any(map(alive, family)), 10)  # noqa: B023
            kills += 1
            kills_with_chunks += any(chunk_folder(again).glob("*.json"))
        if Path(again.out).exists():  # nothing is left to be killed: check, and begin anew
            assert content(again.out) == reference
            assert prepare.prepare(again)
            assert not chunk_folder(again).exists()
            shutil.rmtree(again.out)
    assert kills_with_chunks
    prepared(again)
    assert content(again.out) == reference
    assert not chunk_folder(again).exists()


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_leaves_finished_chunks(
    mixed: PrepareConfig, num_workers: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(mixed, num_workers=num_workers)
    write = chunks.write_chunk

    def slow(chunk: chunks.TextChunk, job: chunks.TokenizeJob) -> dict[str, Any]:
        time.sleep(0.1)  # or the children are done with all of them before the parent hears of the fourth
        return write(chunk, job)

    monkeypatch.setattr(chunks, "write_chunk", slow)
    handler = signal.getsignal(number)
    reports: list[tuple[float, float]] = []

    def stop_later(task: str, done: float, total: float, detail: str) -> None:
        assert task == config.out
        assert detail.endswith("million tokens")
        reports.append((done, total))
        if done == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(progress, "_reporter", stop_later)
    assert not prepare.prepare(config)
    assert signal.getsignal(number) == handler
    assert not Path(config.out).exists()
    finished = [file for file in chunk_folder(config).iterdir() if file.suffix == ".json"]
    assert 4 <= len(finished) < reports[0][1]
    monkeypatch.setattr(chunks, "write_chunk", write)
    reports.clear()
    monkeypatch.setattr(progress, "_reporter", lambda task, done, total, detail: reports.append((done, total)))
    assert prepare.prepare(config)
    assert reports[0][0] == len(finished)
    assert reports[-1][0] == reports[-1][1]
    prepared(changed(mixed, out=config.out + "2"))
    assert content(config.out) == content(config.out + "2")


def test_a_run_stops_while_it_merges(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at_the_end(task: str, done: float, total: float, detail: str) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(progress, "_reporter", stop_at_the_end)
        assert not prepare.prepare(config)
    assert not Path(config.out).exists()
    prepared(config)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_first_damaged_document_stops_it_and_finished_chunks_stay(
    config: PrepareConfig, toy_corpus: Path, num_workers: int
) -> None:
    for name in ("030.txt", "059.txt"):
        (toy_corpus / name).write_bytes(b"one\n\xff")
    several = changed(config, num_workers=num_workers)
    for _ in range(2):
        with pytest.raises(UserError, match=r'030\.txt:2: not UTF-8 .*; mend or remove it, or set on_error = "skip"'):
            prepare.prepare(several)
        assert not Path(config.out).exists()
        assert list(chunk_folder(config).glob("*.json"))
    manifest = prepared(changed(several, on_error="skip"))
    assert manifest["sources"][0]["skipped"] == 2
    assert [error.split(":")[-2:] for error in manifest["errors"]] == [["2", " not UTF-8 (byte 0xff)"]] * 2


def test_what_one_run_skipped_stops_another(mixed: PrepareConfig) -> None:
    assert prepare.prepare(changed(mixed, part=0, parts=1))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not valid JSON"):
        prepare.prepare(changed(mixed, on_error="stop"))


def test_nothing_is_left_behind_when_nothing_was_finished(
    config: PrepareConfig, toy_corpus: Path, tmp_path: Path
) -> None:
    (toy_corpus / "000.txt").write_bytes(b"\xff")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"000\.txt:1: not UTF-8"):
        prepare.prepare(config)
    assert set(tmp_path.iterdir()) == before


def test_a_finished_folder_is_left_alone_and_another_request_refused(
    config: PrepareConfig, toy_corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepared(config)
    before = {file: file.stat().st_mtime_ns for file in Path(config.out).rglob("*")}
    for file in toy_corpus.iterdir():
        file.unlink()  # they are not read again
    caplog.clear()
    assert prepare.prepare(changed(config, num_workers=3))
    assert read_manifest(Path(config.out)) == first
    assert caplog.messages == [f"{config.out}: already prepared with this tokenizer and these sources; nothing to do"]
    with pytest.raises(UserError, match="shards: written with another held_out, min_tokens;"):
        prepare.prepare(changed(config, held_out=0.3, min_tokens=9))
    assert {file: file.stat().st_mtime_ns for file in Path(config.out).rglob("*")} == before


def test_chunks_of_something_else_are_refused(config: PrepareConfig, toy_corpus: Path) -> None:
    assert prepare.prepare(changed(config, part=0, parts=2))
    (toy_corpus / "more.txt").write_text("the fox")
    with pytest.raises(
        UserError, match=r"\.shards\.chunks: holds chunks of another corpus, differing in sources; remove"
    ):
        prepare.prepare(config)
    (toy_corpus / "more.txt").unlink()
    prepared(changed(config, held_out=0.5, min_tokens=2, deduplicate=False, tokens_per_shard=10))


def test_one_at_a_time_but_parts_together(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def beside(busy: PrepareConfig, other: PrepareConfig) -> list[int | None]:
        """Return the exit code of `other` in another process while `busy` is at work."""
        codes: list[int | None] = []

        def start_other(task: str, done: float, total: float, detail: str) -> None:
            if task == busy.out and done == 2 and not codes:
                codes.append(None)
                process = forked(other)
                process.join(20)
                codes[0] = process.exitcode

        monkeypatch.setattr(progress, "_reporter", start_other)
        prepare.prepare(busy)
        return codes

    part, other_part = (changed(config, part=part, parts=2) for part in range(2))
    assert beside(part, other_part) == [0]
    again = changed(config, out=config.out + "2")
    assert beside(again, again) == [1]
    again = changed(config, out=config.out + "3")
    assert beside(changed(again, part=0, parts=2), again) == [1]


def test_a_tokenizer_that_does_not_know_the_text_is_refused(config: PrepareConfig, toy_corpus: Path) -> None:
    for file in toy_corpus.iterdir():
        file.write_text("ζωή και θάνατος the")
    with pytest.raises(UserError, match=r"texts: \d+ of the first \d+ tokens are \[UNK\]"):
        prepare.prepare(config)


def test_a_tokenizer_without_a_frame_is_refused(
    config: PrepareConfig, toy_tokenizer_folder: Path, tmp_path: Path
) -> None:
    load_tokenizer(toy_tokenizer_folder).save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    with pytest.raises(UserError, match="bare: puts no special tokens around a text"):
        prepare.prepare(changed(config, tokenizer=str(tmp_path / "bare")))


def test_nothing_to_train_on_is_refused_and_can_be_mended(config: PrepareConfig) -> None:
    with pytest.raises(UserError, match="texts: no document left to train on"):
        prepare.prepare(changed(config, min_tokens=500))
    assert not Path(config.out).exists()
    prepared(config)


def test_one_of_few_documents_is_held_out_and_of_one_none(
    config: PrepareConfig, toy_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = changed(config, held_out=0.0001)
    counts = prepared(few)["sources"][0]["splits"]
    assert (counts["train"]["documents"], counts["held_out"]["documents"]) == (59, 1)
    assert not [message for message in caplog.messages if "evaluates nothing" in message]
    one = {"kind": "text", "path": str(toy_corpus / "050.txt")}
    assert prepare.prepare(changed(few, out=f"{few.out}-one", source=[one]))
    assert f"{few.out}-one: held_out = 0.0001, but the corpus is one document" in caplog.text


def test_a_full_disk_is_one_line(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "0.ids")

    monkeypatch.setattr(chunks, "fsync", full)
    for num_workers in (1, 2):
        with pytest.raises(UserError, match=r"0\.ids: No space left on device; finished chunks stay on disk"):
            prepare.prepare(changed(config, num_workers=num_workers))


def test_a_disk_that_is_full_only_for_the_tokenizer_is_one_line(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as the Rust library does

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(UserError, match=r"shards: No space left on device .*; finished chunks stay on disk"):
            prepare.prepare(config)
    assert not Path(config.out).exists()
    prepared(config)


@pytest.mark.parametrize(
    ("out", "message"), [("/", "/: exists and holds no token shards"), ("x" * 300, "File name too long")]
)
def test_a_name_that_no_folder_can_have_is_one_line(config: PrepareConfig, out: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare.prepare(changed(config, out=out))


def test_a_process_that_is_ended_from_outside_is_one_line(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(chunks, "write_chunk", end)
    with pytest.raises(UserError, match="run again, with a lower num_workers"):
        prepare.prepare(changed(config, num_workers=2))
