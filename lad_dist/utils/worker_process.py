"""Worker processes: they ignore the signals of their parent, and die with it."""

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ignore the signals that are meant for the parent, and die when it ends, however it ends.

    A child process calls this first. Linux counts the thread that started the child as the parent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # the parent died before prctl
        os._exit(1)
