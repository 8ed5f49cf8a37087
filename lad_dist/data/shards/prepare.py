"""Text to token shards, once, before training: `prepare(config)`.

plan -> pieces, tokenized by processes, kept in `.NAME.pieces` beside the folder `out` -> merge -> manifest, then a
rename: `out` is there as a whole or not at all. What it holds is a function of the text, the tokenizer and the config,
whatever the processes and however often the work was stopped and taken up again: a finished piece is never done twice.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import __version__ as tokenizers_version

from lad_dist.config.errors import UserError
from lad_dist.config.schema import PrepareConfig
from lad_dist.data.shards import chunks
from lad_dist.data.shards.chunks import Stopped, TextChunk, TokenizeJob
from lad_dist.data.shards.merge import MergeJob, merge_chunks
from lad_dist.data.shards.reader import FORMAT, MANIFEST, SPLITS, read_manifest
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization import loading
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer, save_tokenizer
from lad_dist.data.tokenization.special_tokens import frame_of, vocabulary_size
from lad_dist.utils import worker_process
from lad_dist.utils.atomic_io import commit, file_lock, write_text
from lad_dist.utils.strict_json import parse_json

UINT16_IDS = 65536
RUNNING = {"out", "num_workers", "part", "parts"}  # settings that leave no trace in the shards

ChunkInfos = dict[str, Any]
Report = Callable[[Mapping[str, Any]], None]


def silent(row: Mapping[str, Any]) -> None:
    pass


def prepare(config: PrepareConfig, progress: Callable[[str], None] = print, report: Report = silent) -> bool:
    """Writes the shards into config.out, or with config.part a share of the pieces that a later run makes them of.
    Returns False when SIGINT, SIGTERM or SIGUSR1 ended it early: run again to go on.

    `progress` is called with lines for people, `report` with {"step", "steps", …} in pieces. A finished folder made by
    the same request is left as it is, but for the weights of its sources. Raises UserError for one made by another, for
    sources that are missing, damaged or empty, and for a tokenizer that does not know the text."""
    tokenizer = load_tokenizer(config.tokenizer)
    request = _request(config, loading.fingerprint(tokenizer))
    try:
        if (Path(config.out) / MANIFEST).exists():
            _finished(config, request, progress)
        else:
            _unfinished(config, request, tokenizer, progress, report)
    except Stopped:
        return False
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or config.out}: {reason}; what is finished is kept, run again") from None
    return True


def _work(config: PrepareConfig) -> Path:
    out = Path(config.out).absolute()
    return out.with_name(f".{out.name}.pieces")


def _unfinished(
    config: PrepareConfig,
    request: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    progress: Callable[[str], None],
    report: Report,
) -> None:
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{config.out}: exists and holds no token shards; give another folder for out")
    for source in config.source:
        corpus.check(source)
    work = _work(config)
    with _locked(work, alone=config.part is None), _stop_flag() as flag:
        _prepare(config, request, tokenizer, work, flag, progress, report)


def _request(config: PrepareConfig, fingerprint: str) -> dict[str, Any]:
    """What the shards are a function of."""
    settings = config.model_dump(exclude=RUNNING | {"tokenizer", "source"})
    return settings | {"tokenizer": fingerprint, "source": [source.settings() for source in config.source]}


def _finished(config: PrepareConfig, request: dict[str, Any], progress: Callable[[str], None]) -> None:
    """A folder whose shards are there: refuses another request, and takes over other weights."""
    out = Path(config.out)
    manifest = read_manifest(out)
    before = manifest.get("request")
    if not isinstance(before, dict) or not isinstance(before.get("source"), list):
        raise UserError(f"{out / MANIFEST}: damaged (no request in it); remove {out} and prepare the corpus again")
    differing = sorted(key for key in request if _unweighted(before).get(key) != _unweighted(request)[key])
    if differing:
        raise UserError(f"{out}: made with another {', '.join(differing)}; remove it or give another folder for out")
    if before == request:
        progress(f"{out}: already prepared with this tokenizer and these sources; nothing to do")
    else:
        for source, asked in zip(manifest["sources"], request["source"], strict=True):
            source["weight"] = asked["weight"]
        write_text(out / MANIFEST, _json(manifest | {"request": request}))
        progress(f"{out}: already prepared; the weights of its sources are now those of the config")
    shutil.rmtree(_work(config), ignore_errors=True)  # there when the run before was killed after its last step


def _unweighted(request: Mapping[str, Any]) -> dict[str, Any]:
    sources = [{**source, "weight": None} for source in request["source"]]
    return {**request, "source": sources}


def _json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


@contextlib.contextmanager
def _locked(work: Path, alone: bool) -> Iterator[None]:
    """The folder of the pieces, to itself or beside others that do other parts."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(work / "lock", alone=alone))
        except BlockingIOError:
            raise UserError(f"{work}: another process is preparing this corpus; wait for its end") from None
        if alone:
            for draft in work.glob("*.draft"):
                draft.unlink()  # of a process that was killed
        try:
            yield
        finally:
            if alone and not any(work.glob("[0-9]*.json")):
                shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _stop_flag() -> Iterator[Any]:
    """A flag, shared with processes forked inside the block, whose value is set when this process is asked to stop."""
    flag = RawValue("b", 0)

    def ask(*_: Any) -> None:
        flag.value = 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in numbers} if in_main else {}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(
    config: PrepareConfig,
    request: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    flag: Any,
    progress: Callable[[str], None],
    report: Report,
) -> None:
    planned = chunks.plan_chunks(config.source)
    _claim(work, chunks.identity(config.source, planned, request["tokenizer"], tokenizers_version))
    frame = frame_of(tokenizer)
    if frame.size == 0:
        raise UserError(f"{config.tokenizer}: puts no special tokens around a text, so nothing would part documents")
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= UINT16_IDS else np.uint32)
    separator = np.concatenate([frame.after, frame.before])
    job = TokenizeJob(
        config.source, tokenizer, work, dtype, separator, config.on_error == "skip", lambda: bool(flag.value)
    )
    mine = [piece for piece in planned if config.part is None or piece.number % (config.parts or 1) == config.part]
    said = _tokenize(job, mine, config.num_workers or len(os.sched_getaffinity(0)), flag, report)
    if config.part is not None:
        progress(f"{config.out}: part {config.part} of {config.parts} is done; run without part and parts to merge")
        return
    progress(f"{config.out}: {len(planned)} pieces are tokenized; merging them")
    _merge(config, request, job, planned, said, progress)


def _claim(work: Path, identity: dict[str, str]) -> None:
    """Raises UserError when the folder holds pieces of something else."""
    file = work / "identity"
    if not file.exists():
        write_text(file, json.dumps(identity))
    try:
        found = dict(parse_json(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove {work} and run again") from None
    differing = sorted(key for key in identity if found.get(key) != identity[key])
    if differing:
        raise UserError(
            f"{work}: holds pieces of another corpus, differing in {', '.join(differing)}; "
            "remove it, or give another folder for out"
        )


def _tokenize(job: TokenizeJob, mine: Sequence[TextChunk], workers: int, flag: Any, report: Report) -> list[ChunkInfos]:
    """Does what is not done; what is said of each piece, in order. Raises the UserError of the first piece that has
    one."""
    found = {piece.number: _accepted(chunks.read_chunk_info(job.folder, piece, job.dtype), job) for piece in mine}
    missing = [piece for piece in mine if found[piece.number] is None]
    ids, done = sum(each["ids"] for each in found.values() if each), len(mine) - len(missing)
    report({"step": done, "steps": len(mine), "million tokens": ids / 1e6})
    with _one_thread_each(), _written(job, missing, min(workers, len(missing)), flag) as finished:
        for piece in finished:
            said = found[piece.number] = chunks.read_chunk_info(job.folder, piece, job.dtype)
            assert said is not None
            ids, done = ids + said["ids"], done + 1
            report({"step": done, "steps": len(mine), "million tokens": ids / 1e6})
    return [said for said in found.values() if said is not None]


def _accepted(said: ChunkInfos | None, job: TokenizeJob) -> ChunkInfos | None:
    """Raises UserError for a piece in which an earlier run skipped what this one may not."""
    if said is not None and said["skipped"] and not job.skip:
        raise chunks.stop_at(said["errors"][0])
    return said


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keeps the tokenizer from threads of its own: processes are the parallelism, and threads do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def _written(job: TokenizeJob, missing: Sequence[TextChunk], workers: int, flag: Any) -> Iterator[Iterator[TextChunk]]:
    """The pieces in order, each when it is written."""
    if workers <= 1:
        yield (_write(job, piece) for piece in missing)
        return
    context = multiprocessing.get_context("fork")  # the tokenizer is loaded once, and handed over as it is
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job,)) as pool:
        futures = [pool.submit(_write_in_child, piece) for piece in missing]
        try:
            yield (future.result() for future in futures)
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenized was ended from outside, as by the system when memory is short; what is "
                "finished is kept: run again, with fewer workers"
            ) from None
        except BaseException:
            flag.value = 1
            pool.shutdown(cancel_futures=True)
            raise


def _write(job: TokenizeJob, piece: TextChunk) -> TextChunk:
    chunks.write_chunk(piece, job)
    return piece


_job: TokenizeJob | None = None  # of a child


def _begin(job: TokenizeJob) -> None:
    global _job
    worker_process.die_with_parent()
    _job = job


def _write_in_child(piece: TextChunk) -> TextChunk:
    assert _job is not None
    return _write(_job, piece)


def _merge(
    config: PrepareConfig,
    request: dict[str, Any],
    job: TokenizeJob,
    planned: Sequence[TextChunk],
    said: Sequence[ChunkInfos],
    progress: Callable[[str], None],
) -> None:
    """The pieces into the folder `out`."""

    def tick() -> None:
        if job.stopping():
            raise Stopped

    out = Path(config.out)
    draft = job.folder / "merged"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    merged = merge_chunks(MergeJob(config, planned, said, job.folder, draft, job.dtype, len(job.separator), tick))
    totals = {split: _total(merged["sources"], split) for split in SPLITS}
    if not totals["train"]["documents"]:
        raise UserError(
            f"{config.source[0].path}: no document left to train on; add text, or lower held_out or min_tokens"
        )
    save_tokenizer(job.tokenizer, draft / "tokenizer")
    frame = frame_of(job.tokenizer)
    manifest = {
        "format": FORMAT,
        "request": request,
        "tokenizer": {"path": config.tokenizer, "fingerprint": request["tokenizer"], "library": tokenizers_version},
        "vocabulary": vocabulary_size(job.tokenizer),
        "dtype": job.dtype.name,
        "frame": {"before": frame.before.tolist(), "after": frame.after.tolist()},
        **merged,
    }
    (draft / MANIFEST).write_text(_json(manifest), encoding="utf-8")
    commit(draft, out)
    shutil.rmtree(job.folder, ignore_errors=True)  # NFS keeps a folder until the lock in it is closed
    train, held_out = ("{documents:,} documents, {tokens:,} tokens".format(**totals[split]) for split in SPLITS)
    progress(f"{config.out}: {train} to train on; {held_out} held out; {_left_out(merged['sources'])}")


def _total(sources: Sequence[ChunkInfos], split: str) -> dict[str, int]:
    return {key: sum(source["splits"][split][key] for source in sources) for key in ("documents", "tokens")}


def _left_out(sources: Sequence[ChunkInfos]) -> str:
    counts = {reason: sum(source["dropped"][reason] for source in sources) for reason in ("duplicate", "short")}
    skipped = sum(source["skipped"] for source in sources)
    return f"{counts['duplicate']:,} duplicates and {counts['short']:,} short ones dropped, {skipped:,} damaged skipped"
