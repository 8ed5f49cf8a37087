"""Text to token shards, once, before training: `prepare(config)`.

Processes tokenize the chunks into `.NAME.chunks` beside the folder `out`. They are merged, the manifest is written, and
a rename ends the work: `out` exists as a whole or not at all. Its content is a function of the text, the tokenizer and
the config. It depends neither on the processes nor on how often the work was stopped and resumed: a finished chunk is
never tokenized twice.

    prepare(config)          writes the shards, or a share of the chunks
    corpus_summary(folder)   documents and tokens of finished shards, in one line
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import __version__ as tokenizers_version

from lad_dist.config.corpus_schema import PrepareConfig
from lad_dist.config.errors import UserError
from lad_dist.data.requests import differing_keys, read_json_table, require_same_request
from lad_dist.data.shards import chunks
from lad_dist.data.shards.chunks import Stopped, TextChunk, TokenizeJob
from lad_dist.data.shards.merge import MergeJob, merge_chunks
from lad_dist.data.shards.reader import FORMAT, MANIFEST, SPLITS, read_manifest
from lad_dist.data.sources import corpus
from lad_dist.data.tokenization import loading
from lad_dist.data.tokenization.loading import PreTrainedTokenizerFast, load_tokenizer, save_tokenizer
from lad_dist.data.tokenization.special_tokens import special_token_frame, vocabulary_size
from lad_dist.distributed.logs import get_logger
from lad_dist.utils import progress, worker_process
from lad_dist.utils.atomic_io import commit, file_lock, write_text
from lad_dist.utils.text import plain_number

UINT16_IDS = 65536
RUNTIME_KEYS = {"out", "num_workers", "part", "parts"}  # of the config: the content of the shards depends on none

ChunkInfo = dict[str, Any]
logger = get_logger(__name__)


def prepare(config: PrepareConfig) -> bool:
    """Write the shards into config.out, or with config.part a share of the chunks that a later run merges.

    Progress is reported in chunks. A finished folder of the same request is left as it is, but for the weights of the
    sources.

    Returns:
        False when SIGINT, SIGTERM or SIGUSR1 ended it early: call it again to go on.

    Raises:
        UserError: The folder is of another request, a source is missing, damaged or empty, or the tokenizer does not
            know the text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    request = _request(config, loading.fingerprint(tokenizer))
    try:
        if (Path(config.out) / MANIFEST).exists():
            _update_finished(config, request)
        else:
            _write_shards(config, request, tokenizer)
    except Stopped:
        return False
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or config.out}: {reason}; finished chunks stay on disk, run again") from None
    return True


def corpus_summary(folder: str | Path) -> str:
    """Return in one line how many documents and tokens finished shards hold, and how many documents were left out."""
    sources = read_manifest(Path(folder))["sources"]
    train, held_out = ("{documents:,} documents, {tokens:,} tokens".format(**_total(sources, s)) for s in SPLITS)
    dropped = {reason: sum(source["dropped"][reason] for source in sources) for reason in ("duplicate", "short")}
    skipped = sum(source["skipped"] for source in sources)
    return (
        f"{folder}: {train} to train on; {held_out} held out; {dropped['duplicate']:,} duplicates and "
        f"{dropped['short']:,} short ones dropped, {skipped:,} damaged skipped"
    )


def _total(sources: Sequence[Mapping[str, Any]], split: str) -> dict[str, int]:
    return {key: sum(source["splits"][split][key] for source in sources) for key in ("documents", "tokens")}


def _chunk_folder(config: PrepareConfig) -> Path:
    out = Path(config.out).absolute()
    return out.with_name(f".{out.name}.chunks")


def _write_shards(config: PrepareConfig, request: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{config.out}: exists and holds no token shards; give another folder for out")
    for source in config.source:
        corpus.check(source)
    work = _chunk_folder(config)
    with _locked(work, alone=config.part is None), _stop_flag() as flag:
        _tokenize_and_merge(config, request, tokenizer, work, flag)


def _request(config: PrepareConfig, fingerprint: str) -> dict[str, Any]:
    """Return what the shards are a function of."""
    settings = config.model_dump(exclude=RUNTIME_KEYS | {"tokenizer", "source"})
    return settings | {"tokenizer": fingerprint, "source": [source.settings() for source in config.source]}


def _update_finished(config: PrepareConfig, request: dict[str, Any]) -> None:
    """Refuse another request for finished shards, and take over other weights of the sources."""
    out = Path(config.out)
    manifest = read_manifest(out)
    stored = manifest.get("request")
    if not isinstance(stored, dict) or not isinstance(stored.get("source"), list):
        raise UserError(f"{out / MANIFEST}: damaged (no request in it); remove {out} and prepare the corpus again")
    require_same_request(out, _unweighted(stored), _unweighted(request))
    if stored == request:
        logger.info("%s: already prepared with this tokenizer and these sources; nothing to do", out)
    else:
        for source, settings in zip(manifest["sources"], request["source"], strict=True):
            source["weight"] = settings["weight"]
        write_text(out / MANIFEST, _json(manifest | {"request": request}))
        logger.info("%s: already prepared; the sources now have the weights of the config", out)
    # A run that was killed between its last two lines has left it.
    shutil.rmtree(_chunk_folder(config), ignore_errors=True)


def _unweighted(request: Mapping[str, Any]) -> dict[str, Any]:
    sources = [{**source, "weight": None} for source in request["source"]]
    return {**request, "source": sources}


def _json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


@contextlib.contextmanager
def _locked(work: Path, alone: bool) -> Iterator[None]:
    """Lock the folder of the chunks: for this process alone, or beside others that tokenize other parts."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(work / "lock", alone=alone))
        except BlockingIOError:
            raise UserError(f"{work}: another process is preparing this corpus; wait until it ends") from None
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
    """Yield a flag that is set when this process is asked to stop; processes forked inside the block share it."""
    flag = RawValue("b", 0)

    def set_flag(*_: Any) -> None:
        flag.value = 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, set_flag) for number in numbers} if in_main else {}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tokenize_and_merge(
    config: PrepareConfig, request: dict[str, Any], tokenizer: PreTrainedTokenizerFast, work: Path, flag: Any
) -> None:
    planned = chunks.plan_chunks(config.source)
    _claim(work, chunks.identity(config.source, planned, request["tokenizer"], tokenizers_version))
    frame = special_token_frame(tokenizer)
    if frame.size == 0:
        raise UserError(f"{config.tokenizer}: puts no special tokens around a text, so nothing would part documents")
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= UINT16_IDS else np.uint32)
    separator = np.concatenate([frame.after, frame.before])
    job = TokenizeJob(
        config.source, tokenizer, work, dtype, separator, config.on_error == "skip", lambda: bool(flag.value)
    )
    share = [chunk for chunk in planned if config.part is None or chunk.number % (config.parts or 1) == config.part]
    infos = _tokenize(config.out, job, share, config.num_workers or len(os.sched_getaffinity(0)), flag)
    if config.part is None:
        logger.info("%s: %d chunks are tokenized; merging them", config.out, len(planned))
        _merge(config, request, job, planned, infos)


def _claim(work: Path, identity: dict[str, str]) -> None:
    """Raise UserError when the folder holds chunks of another identity."""
    file = work / "identity"
    if not file.exists():
        write_text(file, json.dumps(identity))
    differing = differing_keys(read_json_table(file, f"remove {work} and run again"), identity)
    if differing:
        raise UserError(
            f"{work}: holds chunks of another corpus, differing in {', '.join(differing)}; "
            "remove it, or give another folder for out"
        )


def _tokenize(task: str, job: TokenizeJob, share: Sequence[TextChunk], num_workers: int, flag: Any) -> list[ChunkInfo]:
    """Tokenize the chunks that are not finished, and return the infos of all, in order.

    Raise the UserError of the first chunk that has one. Progress is reported under the name `task`.
    """
    infos = {chunk.number: chunks.read_chunk_info(job.folder, chunk, job.dtype) for chunk in share}
    for info in infos.values():
        if info is not None and info["skipped"] and not job.skip_errors:  # an earlier run skipped what this may not
            raise chunks.unreadable_document_error(info["errors"][0])
    missing = [chunk for chunk in share if infos[chunk.number] is None]
    ids, done = sum(info["ids"] for info in infos.values() if info), len(share) - len(missing)
    progress.report(task, done, len(share), f"{plain_number(ids / 1e6)} million tokens")
    with _one_thread_each(), _written(job, missing, min(num_workers, len(missing)), flag) as finished:
        for chunk in finished:
            info = infos[chunk.number] = chunks.read_chunk_info(job.folder, chunk, job.dtype)
            assert info is not None
            ids, done = ids + info["ids"], done + 1
            progress.report(task, done, len(share), f"{plain_number(ids / 1e6)} million tokens")
    return [info for info in infos.values() if info is not None]


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Forbid the tokenizer threads: the processes are the parallelism, and threads do not survive a fork."""
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
def _written(
    job: TokenizeJob, missing: Sequence[TextChunk], num_workers: int, flag: Any
) -> Iterator[Iterator[TextChunk]]:
    """Yield the chunks in order, each when it is written."""
    if num_workers <= 1:
        yield (_write(job, chunk) for chunk in missing)
        return
    context = multiprocessing.get_context("fork")  # the tokenizer is loaded once, and handed over as it is
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        futures = [pool.submit(_write_in_worker, chunk) for chunk in missing]
        try:
            yield (future.result() for future in futures)
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenized was ended from outside, as by the system when memory is short; finished "
                "chunks stay on disk: run again, with a lower num_workers"
            ) from None
        except BaseException:
            flag.value = 1
            pool.shutdown(cancel_futures=True)
            raise


def _write(job: TokenizeJob, chunk: TextChunk) -> TextChunk:
    chunks.write_chunk(chunk, job)
    return chunk


_job: TokenizeJob | None = None  # of a worker process


def _start_worker(job: TokenizeJob) -> None:
    global _job
    worker_process.die_with_parent()
    _job = job


def _write_in_worker(chunk: TextChunk) -> TextChunk:
    assert _job is not None
    return _write(_job, chunk)


def _merge(
    config: PrepareConfig,
    request: dict[str, Any],
    job: TokenizeJob,
    planned: Sequence[TextChunk],
    infos: Sequence[ChunkInfo],
) -> None:
    """Merge the chunks into the folder `out`."""

    def check_stop() -> None:
        if job.should_stop():
            raise Stopped

    out = Path(config.out)
    draft = job.folder / "merged"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    merged = merge_chunks(
        MergeJob(config, planned, infos, job.folder, draft, job.dtype, len(job.separator), check_stop)
    )
    if not _total(merged["sources"], "train")["documents"]:
        raise UserError(
            f"{config.source[0].path}: no document left to train on; add text, or lower held_out or min_tokens"
        )
    save_tokenizer(job.tokenizer, draft / "tokenizer")
    frame = special_token_frame(job.tokenizer)
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
