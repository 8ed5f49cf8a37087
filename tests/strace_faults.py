"""System calls of a process that fail, or kill it, on purpose: by strace.

changes(work, *args)             the calls by which work() changes files, in a process of its own
killed(work, *args, call)        the same, killed as it enters one of them
failing(pid, call, error, when)  around it, calls of a running process fail
"""

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chaos import PATIENCE, may_be_traced
from launching import FORKS

# All by which a file or a folder comes, changes, gets another name, or goes; kernels lack some.
CALLS = "open openat creat write pwrite64 writev fsync fdatasync sync_file_range ftruncate truncate rename renameat \
renameat2 link linkat symlink symlinkat mkdir mkdirat unlink unlinkat rmdir".split()


class Held:
    """A process that waits for a word before it does its work, under strace with more words."""

    def __init__(self, work: Callable[..., None], args: tuple[Any, ...], words: list[str]) -> None:
        here, far_end = FORKS.Pipe()
        self.process = FORKS.Process(target=_work_when_sent, args=(far_end, work, args))
        self.process.start()
        here.recv()  # it is ready
        self.strace = attach(self.process.pid or 0, words)
        here.send("go")

    def end(self) -> int:
        self.process.join(PATIENCE)
        self.strace.wait(PATIENCE)
        code = self.process.exitcode
        assert code is not None
        return code


def _work_when_sent(word: Connection, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch  # noqa: F401 (now, and not under the eyes of strace)

    may_be_traced()
    work_now = work(*args)
    word.send("ready")
    word.recv()
    work_now()


def attach(pid: int, words: list[str]) -> subprocess.Popen[bytes]:
    """strace, once it has taken hold of all threads of a process."""
    strace = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not _all_traced(pid):
        assert strace.poll() is None, "strace cannot trace processes here"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return strace


def _all_traced(pid: int) -> bool:
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return not any("TracerPid:\t0\n" in status for status in statuses)


Call = tuple[str, int]  # its name, and which of that name it is


def changes(work: Callable[..., Callable[[], None]], *args: Any) -> list[Call]:
    """work(*args) makes ready, out of sight, and returns what is to be done."""
    with tempfile.NamedTemporaryFile("r") as out:
        held = Held(work, args, ["-e", f"trace={','.join(f'?{call}' for call in CALLS)}", "-o", out.name])
        assert held.end() == 0
        counts, calls = Counter[str](), []
        for name, words in re.findall(r"^\d+\s+(\w+)\((.*)", out.read(), re.MULTILINE):
            counts[name] += 1
            if "O_RDONLY" not in words:
                calls.append((name, counts[name]))
        return calls


def killed(work: Callable[..., Callable[[], None]], *args: Any, call: Call) -> int:
    """The exit code: -9, or 0 where no such call is made."""
    name, nth = call
    words = ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={nth}", "-o", "/dev/null"]
    return Held(work, args, words).end()


@contextmanager
def failing(pid: int, call: str, error: str) -> Iterator[None]:
    """All such calls of a running process, of all its threads, end with the error."""
    strace = attach(pid, ["-e", f"trace={call}", "-e", f"inject={call}:error={error}", "-o", "/dev/null"])
    try:
        yield
    finally:
        strace.terminate()
        strace.wait(PATIENCE)
