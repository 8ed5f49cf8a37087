"""Files that are there whole or not at all, whenever the machine stops.

write_text(path, text)   a small file, in place of an older one
append_text(path, text)  at its end, whole or not at all where there is no room
draft_of(path)           a name for it until it is whole
commit(draft, final)     a folder, by its new name
sha256(path)             of a file of any size
digest(path)             that and its size
locked(file)             kept to this process while it lives
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict


class Digest(TypedDict):
    """Of a file's content."""

    bytes: int
    sha256: str


def write_text(path: Path, text: str) -> None:
    """Makes the folders above it. Two processes that write the same file do not meet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_path(path)
    try:
        draft.write_text(text, encoding="utf-8")
        fsync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    fsync(path.parent)


def append_text(path: Path, text: str) -> None:
    """For one process at a time."""
    left = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def temporary_path(path: Path) -> Path:
    """Where this process writes what is to be `path`: no other one does, on whatever machine."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.draft")


def commit(draft: Path, final: Path) -> None:
    """Renames a folder after all that is in it has reached the disk. `final` must not exist, or be empty."""
    for path in [*list_files(draft), *(path for path in [draft, *draft.rglob("*")] if path.is_dir())]:
        fsync(path)
    os.rename(draft, final)
    fsync(final.parent)


def list_files(folder: Path) -> Iterator[Path]:
    """Those of all folders in it, sorted."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> Digest:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextlib.contextmanager
def file_lock(file: Path, *, alone: bool = True) -> Iterator[None]:
    """Holds a lock on the file, alone or beside others that do not want it alone. It ends with the process, however
    that ends. Raises BlockingIOError while another process holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as opened:
        try:
            fcntl.lockf(opened, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, "held by another process", str(file)) from None
            # A file system without locks: then nobody is kept out.
        yield
