"""Saving while training goes on.

    Saver     when a save is due, and the steps of one: copy, write behind, commit, or count a failure
    Copies    what an engine would write to files, copied to host memory instead
    write     these copies to files, durable, with their digests

A save holds training up for a copy of the state in host memory. A thread on each process writes its files; when all
have been written, which the processes find out together at the end of a step, the main process commits them.
A save that fails is dropped: the checkpoint before it stays, training goes on, and a later save tries anew.
"""

import hashlib
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lad_dist.checkpointing.store import CheckpointStore
from lad_dist.config.errors import EXIT_RUN_AGAIN, Fault
from lad_dist.distributed import processes
from lad_dist.utils.atomic_io import Digest, fsync

MAX_FAILURES = 3  # in a row, after which the run stops
LOOK_EVERY = 0.02  # seconds, while nothing is left to do but to wait for the files
Files = list[tuple[Path, Any]]


class SaveFailed(Fault):
    """Nothing can be saved: elsewhere, or later, it may be possible."""

    code = EXIT_RUN_AGAIN


class HostSnapshotEngine:
    """Takes the place of DeepSpeed's checkpoint engine: nothing is written until `taken` is."""

    name = "copies"

    def __init__(self, load: Callable[[Path], Any]) -> None:
        self.load_file = load
        self._files: Files = []

    def taken(self) -> Files:
        """The files of the save that has just been asked for, with their content."""
        files, self._files = self._files, []
        return files

    def save(self, state_dict: Any, path: str) -> None:
        self._files.append((Path(path), to_host(state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        return self.load_file(Path(path))

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True

    def cleanup(self) -> None: ...


def to_host(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors lie in host memory of their own; what was one tensor
    under two names stays one."""
    seen: dict[tuple[Any, ...], Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if place not in seen or not value.numel():
                seen[place] = value.detach().to("cpu", copy=True)
            return seen[place]
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, copy(each)) for key, each in value.items())
        if isinstance(value, list):
            return [copy(each) for each in value]
        if type(value) is tuple:
            return tuple(copy(each) for each in value)
        return deepcopy(value)

    return copy(state)


class _Digesting:
    """A file that is digested while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> Digest:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}


def write(files: Files, root: Path) -> dict[str, Digest]:
    """Writes each content with torch.save; the digests by the path in `root`. Raises OSError."""
    digests = {}
    for path, content in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            digesting = _Digesting(file)
            _save(content, digesting)
            file.flush()
            os.fsync(file.fileno())
        digests[str(path.relative_to(root))] = digesting.digest
    for folder in {path.parent for path, _ in files}:
        fsync(folder)
    return digests


def _save(content: Any, file: _Digesting) -> None:
    try:
        torch.save(content, file)  # type: ignore[arg-type]
    except RuntimeError as error:  # what torch makes of a write that failed
        raise OSError(str(error).strip().splitlines()[0]) from error


@dataclass
class PendingSave:
    """A save that is being written behind the training."""

    step: int
    facts: Mapping[str, Any]
    draft: Path
    thread: threading.Thread
    digests: dict[str, Digest] = field(default_factory=dict)
    error: str = ""


@dataclass
class AsyncCheckpointer:
    """every: no more than so many steps are ever lost, 0 for no saves of its own accord. All processes call its methods
    together.

    A save begins early enough to be committed by the time that `every` steps have been made since the one before;
    where the disk is slower than it was the last time, training waits for it."""

    checkpoints: CheckpointStore
    every: int
    snapshot: Callable[[int, Path], Files]  # of the state after a step, to be written into the folder
    metadata: Callable[[int], Mapping[str, Any]]
    keep_alive: Callable[[int], None]  # told of the step now and then while training waits for the disk
    last_started: int = 0  # the step of the last save
    last_committed: int = 0  # of the last one that is safe
    lag: int = 1  # steps that training went on for while the last one was written
    failures: int = 0
    reason: str = ""  # the last one failed
    pending: PendingSave | None = None

    @property
    def busy(self) -> bool:
        """Whether this process is still writing."""
        return self.pending is not None and self.pending.thread.is_alive()

    @property
    def gave_up(self) -> bool:
        return self.failures >= MAX_FAILURES

    def is_due(self, step: int) -> bool:
        """Whether a save may begin after this step."""
        return self.every > 0 and step - self.last_started >= self.every - self.lag

    def on_step_end(self, step: int, busy: bool) -> None:
        """What is to be done after a step. busy: whether any process is still writing."""
        if self.pending is not None and not busy:
            self._settle(step)
        if not self.every:
            return
        if self.pending is None and self.is_due(step):
            self._begin(step)
        if step - self.last_committed >= self.every and not self.gave_up:
            self.wait(step)

    def save_and_wait(self, step: int) -> None:
        """Saves and waits for it, trying again until it gives up."""
        self.wait(step)
        while self.last_committed < step and not self.gave_up:
            self._begin(step)
            self.wait(step)

    def wait(self, step: int) -> None:
        """Until no save is being written any more."""
        if self.pending is not None:
            self._await_files(step)
            self._settle(step)

    def go_back(self, step: int, to: int) -> None:
        """Ends what is being written before the run goes back `to` a step; what is later is dropped."""
        if self.pending is None or self.pending.step <= to:
            self.wait(step)
            return
        self._await_files(step)
        if processes.is_main():
            self.checkpoints.abort(self.pending.draft)
        self.pending = None

    def start_at(self, step: int) -> None:
        self.last_started = self.last_committed = step

    def _await_files(self, step: int) -> None:
        while processes.any_of(self.busy):
            self.keep_alive(step)
            time.sleep(LOOK_EVERY)

    def _begin(self, step: int) -> None:
        self.last_started = step
        try:
            draft = processes.on_main(partial(self.checkpoints.begin, step))
        except OSError as error:
            self._fail([str(error)])
            return
        thread = threading.Thread(target=self._write, args=[self.snapshot(step, draft)], daemon=True)
        self.pending = PendingSave(step, self.metadata(step), draft, thread)
        self.pending.thread.start()

    def _write(self, files: Files) -> None:
        writing = self.pending
        assert writing is not None
        try:
            writing.digests = write(files, writing.draft)
        except Exception as error:
            writing.error = f"{type(error).__name__}: {error}"

    def _settle(self, step: int) -> None:
        """Commits what all have written, or drops it when one could not."""
        assert self.pending is not None
        writing, self.pending = self.pending, None
        found = processes.all_gather((writing.digests, writing.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        if not errors:
            errors = self._commit(writing, {name: digest for digests, _ in found for name, digest in digests.items()})
        if errors:
            self._fail(errors)
            if processes.is_main():
                self.checkpoints.abort(writing.draft)
            return
        self.failures = 0
        self.last_committed, self.lag = writing.step, max(1, step - writing.step)

    def _commit(self, writing: PendingSave, digests: Mapping[str, Digest]) -> list[str]:
        try:
            processes.on_main(partial(self.checkpoints.commit, writing.draft, writing.facts, digests))
        except OSError as error:
            return [f"rank 0: {type(error).__name__}: {error}"]
        return []

    def _fail(self, errors: list[str]) -> None:
        self.failures += 1
        self.reason = errors[0]
        if processes.is_main():
            stands = (
                f"the one of step {self.last_committed} stands" if self.last_committed else "there is none before it"
            )
            print(
                f"{self.checkpoints.folder}: the checkpoint of step {self.last_started} could not be saved ({errors[0]}); "
                f"{stands}",
                file=sys.stderr,
            )
