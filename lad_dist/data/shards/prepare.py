"""Text to token shards, once, before training: `prepare(config)`.

Processes tokenize the chunks into `.NAME.chunks` beside the folder `out`. They are merged, the manifest is written, and
a rename ends the work: `out` exists as a whole or not at all. Its content is a function of the text, the tokenizer and
the config. It depends neither on the processes nor on how often the work was stopped and resumed: a finished chunk is
never tokenized twice.
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
from lad_dist.data.requests import differing_keys, read_json_table, require_same_request, require_unused
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

    Progress is reported in chunks. A finished folder of the same request is left as it is. Return False when SIGINT,
    SIGTERM or SIGUSR1 ended it early: call it again to go on. Raise UserError when the folder is of another request, a
    source is missing, damaged or empty, or the tokenizer does not know the text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    settings = config.model_dump(exclude=RUNTIME_KEYS | {"tokenizer", "source"})
    sources = [source.settings() for source in config.source]
    request = settings | {"tokenizer": loading.fingerprint(tokenizer), "source": sources}
    out = Path(config.out)
    try:
        if (out / MANIFEST).exists():
            require_same_request(out, read_manifest(out).get("request", {}), request)
            logger.info("%s: already prepared with this tokenizer and these sources; nothing to do", out)
            shutil.rmtree(_chunk_folder(out), ignore_errors=True)  # of a run that was killed at its very end
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


def _chunk_folder(out: Path) -> Path:
    return out.absolute().with_name(f".{out.absolute().name}.chunks")


def _write_shards(config: PrepareConfig, request: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    out = Path(config.out)
    require_unused(out, "token shards")
    for source in config.source:
        corpus.check(source)
    work = _chunk_folder(out)
    with contextlib.ExitStack() as stack:
        try:  # alone, or beside others that tokenize other parts
            stack.enter_context(file_lock(work / "lock", alone=config.part is None))
        except BlockingIOError:
            raise UserError(f"{work}: another process is preparing this corpus; wait until it ends") from None
        flag = stack.enter_context(_stop_flag())
        try:
            _tokenize_and_merge(config, request, tokenizer, work, flag)
        finally:
            if config.part is None and not any(work.glob("[0-9]*.json")):
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
    identity = chunks.identity(config.source, planned, request["tokenizer"], tokenizers_version)
    identity_file = work / "identity"
    if not identity_file.exists():
        write_text(identity_file, json.dumps(identity))
    differing = differing_keys(read_json_table(identity_file, f"remove {work} and run again"), identity)
    if differing:
        raise UserError(
            f"{work}: holds chunks of another corpus, differing in {', '.join(differing)}; "
            "remove it, or give another folder for out"
        )
    frame = special_token_frame(tokenizer)
    if frame.size == 0:
        raise UserError(f"{config.tokenizer}: puts no special tokens around a text, so nothing would part documents")
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= UINT16_IDS else np.uint32)
    separator = np.concatenate([frame.after, frame.before])
    job = TokenizeJob(
        config.source, tokenizer, work, dtype, separator, config.on_error == "skip", lambda: bool(flag.value)
    )
    share = planned if config.part is None else planned[config.part :: config.parts]
    infos = _tokenize(config.out, job, share, config.num_workers or len(os.sched_getaffinity(0)), flag)
    if config.part is None:
        logger.info("%s: %d chunks are tokenized; merging them", config.out, len(planned))
        _merge(config, request, job, planned, infos)


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
    context = multiprocessing.get_context("fork")  # the tokenizer is loaded once, and handed over as it is
    size = max(1, min(num_workers, len(missing)))
    with ProcessPoolExecutor(size, context, initializer=_start_worker, initargs=(job,)) as pool:
        futures = [pool.submit(_write_in_worker, chunk) for chunk in missing]
        try:
            for chunk, future in zip(missing, futures, strict=True):
                info = infos[chunk.number] = future.result()
                ids, done = ids + info["ids"], done + 1
                progress.report(task, done, len(share), f"{plain_number(ids / 1e6)} million tokens")
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenized was ended from outside, as by the system when memory is short; finished "
                "chunks stay on disk: run again, with a lower num_workers"
            ) from None
        except BaseException:
            flag.value = 1
            pool.shutdown(cancel_futures=True)
            raise
    return [info for info in infos.values() if info is not None]


_job: TokenizeJob | None = None  # of a worker process


def _start_worker(job: TokenizeJob) -> None:
    global _job
    worker_process.die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism; threads do not survive a fork
    _job = job


def _write_in_worker(chunk: TextChunk) -> ChunkInfo:
    assert _job is not None
    return chunks.write_chunk(chunk, _job)


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
    if config.held_out and not _total(merged["sources"], "held_out")["documents"]:
        message = "%s: held_out = %s, but the corpus is one document, so a training on it evaluates nothing; %s"
        logger.warning(message, out, config.held_out, 'add text, or make several of it (document = "block")')
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
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    commit(draft, out)
    shutil.rmtree(job.folder, ignore_errors=True)  # NFS keeps a folder until the lock in it is closed
