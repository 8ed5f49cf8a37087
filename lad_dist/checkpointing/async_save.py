"""Checkpoints that are written while training continues.

A save holds training up for a copy of the state in host memory. A thread on each process writes its files. At the end
of a step the processes learn together that all files have been written; then the main process commits them.
A save that fails is dropped: the previous checkpoint stays, training continues, and a later save tries anew.
"""

import hashlib
import os
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
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from lad_dist.checkpointing import reshard
from lad_dist.checkpointing.store import CheckpointStore
from lad_dist.config.errors import EXIT_RUN_AGAIN, Fault
from lad_dist.distributed import processes, ranks
from lad_dist.distributed.logs import get_logger
from lad_dist.utils.atomic_io import Digest, fsync
from lad_dist.utils.text import first_line

MAX_FAILURES = 3  # in a row, after which the run stops
POLL_SECONDS = 0.02  # while training waits for the files
Files = list[tuple[Path, Any]]  # path and content

logger = get_logger(__name__)


class SaveFailed(Fault):
    """No checkpoint can be saved: on another machine, or later, it may be possible."""

    code = EXIT_RUN_AGAIN


class HostSnapshotEngine(CheckpointEngine):
    """Replaces DeepSpeed's checkpoint engine: copies what a save would write to host memory, and writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._files: Files = []

    def pop_files(self) -> Files:
        """Return the files of the latest save with their content, and forget them."""
        files, self._files = self._files, []
        return files

    def save(self, state_dict: Any, path: str) -> None:
        self._files.append((Path(path), to_host(state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        return reshard.read(Path(path))

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def commit(self, info: Any) -> bool:
        return True


def to_host(state: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples whose tensors lie in host memory of their own.

    A tensor under two names stays one tensor.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if identity not in copies or not value.numel():  # empty tensors share an address
                copies[identity] = value.detach().to("cpu", copy=True)
            return copies[identity]
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, copy(item)) for key, item in value.items())
        if isinstance(value, list):
            return [copy(item) for item in value]
        if type(value) is tuple:
            return tuple(copy(item) for item in value)
        return deepcopy(value)

    return copy(state)


class _DigestingFile:
    """A file whose digest is computed while it is written."""

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
    """Write each content with torch.save; return the digests by the path relative to `root`. Raise OSError."""
    digests = {}
    for path, content in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            digesting = _DigestingFile(file)
            try:
                torch.save(content, digesting)  # type: ignore[arg-type]
            except RuntimeError as error:  # torch turns a failed write into one
                raise OSError(first_line(error)) from error
            file.flush()
            os.fsync(file.fileno())
        digests[str(path.relative_to(root))] = digesting.digest
    for folder in {path.parent for path, _ in files}:
        fsync(folder)
    return digests


@dataclass
class PendingSave:
    """A save whose files a thread is writing."""

    step: int
    metadata: Mapping[str, Any]
    draft: Path
    thread: threading.Thread
    digests: dict[str, Digest] = field(default_factory=dict)
    error: str = ""


@dataclass
class AsyncCheckpointer:
    """Saves checkpoints in the background. All processes call the methods together.

    At most `every` steps are ever lost; 0 saves on request alone. A save begins early enough to be committed by the
    time that `every` steps have been made since the previous one. Where the disk is slower than the last time, training
    waits for it.
    """

    checkpoints: CheckpointStore
    every: int
    snapshot: Callable[[int, Path], Files]  # of the state after a step, to be written into the folder
    metadata: Callable[[int], Mapping[str, Any]]
    keep_alive: Callable[[int], None]  # called with the step now and then while training waits for the disk
    last_started: int = 0  # step of the last save
    last_committed: int = 0  # step of the last save that is committed
    lag: int = 1  # steps that training made while the last save was written
    failures: int = 0  # in a row
    reason: str = ""  # of the last failure
    pending: PendingSave | None = None

    @property
    def busy(self) -> bool:
        """Whether this process is still writing files."""
        return self.pending is not None and self.pending.thread.is_alive()

    @property
    def gave_up(self) -> bool:
        return self.failures >= MAX_FAILURES

    def on_step_end(self, step: int, busy: bool) -> None:
        """Commit a finished save and begin one that is due. `busy`: whether any process is still writing."""
        if self.pending is not None and not busy:
            self._finish_save(step)
        if not self.every:
            return
        is_saved = step == self.last_committed
        if self.pending is None and not is_saved and step - self.last_started >= self.every - self.lag:
            self._begin(step)
        if step - self.last_committed >= self.every and not self.gave_up:
            self.wait(step)

    def save_and_wait(self, step: int) -> None:
        """Save and wait for the commit; try again until `gave_up`."""
        self.wait(step)
        while self.last_committed < step and not self.gave_up:
            self._begin(step)
            self.wait(step)

    def wait(self, step: int) -> None:
        """Wait until no save is being written any more."""
        if self.pending is not None:
            self._await_files(step)
            self._finish_save(step)

    def go_back(self, step: int, to: int) -> None:
        """Finish the pending save before the run goes back `to` a step; drop it where it is later than that."""
        if self.pending is None or self.pending.step <= to:
            self.wait(step)
            return
        self._await_files(step)
        if ranks.is_main():
            self.checkpoints.abort(self.pending.draft)
        self.pending = None

    def start_at(self, step: int) -> None:
        """Set the step of the checkpoint that the run resumed from."""
        self.last_started = self.last_committed = step

    def _await_files(self, step: int) -> None:
        while processes.any_of(self.busy):
            self.keep_alive(step)
            time.sleep(POLL_SECONDS)

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
        pending = self.pending
        assert pending is not None
        try:
            pending.digests = write(files, pending.draft)
        except Exception as error:
            pending.error = f"{type(error).__name__}: {error}"

    def _finish_save(self, step: int) -> None:
        """Commit what all processes have written, or drop it where one of them failed."""
        assert self.pending is not None
        save, self.pending = self.pending, None
        results = processes.all_gather((save.digests, save.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
        if not errors:
            digests = {name: digest for digests, _ in results for name, digest in digests.items()}
            try:
                processes.on_main(partial(self.checkpoints.commit, save.draft, save.metadata, digests))
            except OSError as error:
                errors = [f"rank 0: {type(error).__name__}: {error}"]
        if errors:
            self._fail(errors)
            if ranks.is_main():
                self.checkpoints.abort(save.draft)
            return
        self.failures = 0
        self.last_committed, self.lag = save.step, max(1, step - save.step)

    def _fail(self, errors: list[str]) -> None:
        self.failures += 1
        self.reason = errors[0]
        logger.warning(
            "%s: the checkpoint of step %d could not be saved (%s); %s",
            self.checkpoints.folder,
            self.last_started,
            errors[0],
            f"the one of step {self.last_committed} remains" if self.last_committed else "no earlier one exists",
        )
