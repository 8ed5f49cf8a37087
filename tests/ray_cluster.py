"""A Ray cluster of several nodes on this host, for searches that lose some of it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launching import BIN, environment, free_port, wait_until

START_SECONDS = 120  # a node takes eight seconds on an idle machine


class RayCluster:
    """A head and further nodes, without tokens.

    Attributes:
        address: of the head.
    """

    def __init__(self, cpus: int = 2) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._cpus = cpus
        self._variables = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        self._variables |= {"RAY_worker_register_timeout_seconds": "300", "MARK": self._folder.name}
        self.address = f"127.0.0.1:{free_port()}"
        options = [f"--port={self.address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1"]
        options += [f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        self._nodes = [self._start("--head", *options, f"--temp-dir={self._folder}")]
        wait_until((self._folder / "ray_current_cluster").exists, START_SECONDS)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        options = ["--block", f"--num-cpus={self._cpus}"]
        command, quiet = [str(BIN / "ray"), "start", *options, *words], subprocess.DEVNULL
        return subprocess.Popen(command, env=self._variables, stdout=quiet, stderr=quiet, start_new_session=True)

    def add_node(self) -> None:
        """Start a further node."""
        self._nodes.append(self._start(f"--address={self.address}", "--node-ip-address=127.0.0.1"))

    def lose_node(self) -> None:
        """Kill the last node with all that runs on it."""
        os.killpg(self._nodes.pop().pid, signal.SIGKILL)

    @property
    def workers(self) -> list[int]:
        """The processes of trials."""
        result = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_trial = (process / "cmdline").read_bytes().startswith((b"ray::ImplicitFunc", b"ray::_Worker"))
                if is_trial and f"MARK={self._folder.name}".encode() in (process / "environ").read_bytes():
                    result.append(int(process.name))
        return sorted(result)

    def close(self) -> None:
        """End all nodes."""
        while self._nodes:
            self.lose_node()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(count: int, cpus: int = 2) -> Iterator[RayCluster]:
    """Run a cluster of so many nodes."""
    cluster = RayCluster(cpus)
    try:
        for _ in range(count - 1):
            cluster.add_node()
        yield cluster
    finally:
        cluster.close()
