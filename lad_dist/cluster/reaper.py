"""A process that ends what is left of a cluster on this machine once the process that started it has died.

Linux ends Ray's processes with the one that started them, but not those that they have started in turn: a node's agents
try for a minute to report that the node has died. Standard input is a pipe from the process to wait for, and ends
however that one ends; where something is read before, Ray was shut down, and the folder alone is left. What has a file
open in the cluster's folder is of the cluster.

Run as a script, with the folder as the argument: it imports nothing that takes time.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

PATIENCE = 10  # seconds: what is still alive then cannot be killed


def users(folder: str) -> list[int]:
    """Return the processes that have a file open in the folder."""
    processes = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError):  # it has ended, or is another account's
            if name.isdigit() and any(
                os.readlink(f"/proc/{name}/fd/{file}").startswith(f"{folder}/")
                for file in os.listdir(f"/proc/{name}/fd")
            ):
                processes.append(int(name))
    return processes


def main(folder: str) -> None:
    was_shut_down = bool(sys.stdin.buffer.read())
    end = time.monotonic() + PATIENCE
    while not was_shut_down and (processes := users(folder)) and time.monotonic() < end:
        for process in processes:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
