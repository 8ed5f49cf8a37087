"""Files that are whole or absent, whenever the machine stops."""

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
    """Size and hash of a file."""

    bytes: int
    sha256: str


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, and make the folders above it.

    Two processes may write the same file: each has a temporary file of its own.
    """
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
    """Append to a file, all of the text or nothing. Only one process at a time may append."""
    rest = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def temporary_path(path: Path) -> Path:
    """Return a path beside `path` that no other process writes to, on whatever machine."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.draft")


def commit(draft: Path, final: Path) -> None:
    """Rename a folder after all of its files have reached the disk. `final` must not exist, or be empty."""
    for path in [*list_files(draft), *(path for path in [draft, *draft.rglob("*")] if path.is_dir())]:
        fsync(path)
    os.rename(draft, final)
    fsync(final.parent)


def list_files(folder: Path) -> Iterator[Path]:
    """Return all files below a folder, sorted."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def fsync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> Digest:
    """Return size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextlib.contextmanager
def file_lock(file: Path, *, alone: bool = True) -> Iterator[None]:
    """Hold a lock on a file, alone or shared with others that do not want it alone.

    The lock ends with the process, however that ends. Raises BlockingIOError while another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as opened:
        try:
            fcntl.lockf(opened, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, "held by another process", str(file)) from None
            # The file system has no locks: then nobody is locked out.
        yield
