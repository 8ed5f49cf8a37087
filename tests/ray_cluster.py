"""A Ray cluster of several nodes on this host, for searches that lose some of it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launching import BIN, environment, free_port, wait_until

START_SECONDS = 120  # a node takes eight seconds on an idle machine


class RayCluster:
    """A head and further nodes.

    Attributes:
        folder: of the head, where Ray keeps its logs.
        variables: in which its nodes differ from this process.
    """

    def __init__(self, cpus: int = 2, variables: Mapping[str, str] | None = None) -> None:
        """Start a head, which takes a while: reading `address` waits for it.

        Args:
            cpus: of each node.
            variables: In which its nodes differ from this process; by default they ask for no token.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.variables = variables or {"RAY_AUTH_MODE": "disabled"}
        self._cpus = cpus
        options = ["--port=0", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        self._nodes = [self._start("--head", *options, "--node-name=first", f"--temp-dir={self.folder}")]

    @property
    def address(self) -> str:
        """The address of the head."""
        file = self.folder / "ray_current_cluster"
        wait_until(file.exists, START_SECONDS)
        return file.read_text().strip()

    def _start(self, *words: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        options = [f"--num-cpus={self._cpus}", "--object-store-memory=100000000"]
        variables = {"RAY_worker_niceness": "0", "RAY_worker_register_timeout_seconds": "300"}
        return subprocess.Popen(
            [*before, str(BIN / "ray"), "start", "--block", *options, *words],
            env=environment() | variables | {"MARK": self.folder.name} | self.variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def add_node(self, *options: str, before: Sequence[str] = ()) -> int:
        """Start a further node, by a command before that of Ray; return its process."""
        self._nodes.append(self._start(f"--address={self.address}", *options, before=before))
        return self._nodes[-1].pid

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
                if is_trial and f"MARK={self.folder.name}".encode() in (process / "environ").read_bytes():
                    result.append(int(process.name))
        return sorted(result)

    def close(self) -> None:
        """End all nodes."""
        while self._nodes:
            self.lose_node()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(count: int = 1, cpus: int = 2, variables: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """Run a cluster of so many nodes, whose head is started first."""
    cluster = RayCluster(cpus, variables)
    try:
        for _ in range(count - 1):
            cluster.add_node()
        yield cluster
    finally:
        cluster.close()
