"""TCP connections between rank 0 and every other rank, a line of JSON per message."""

import contextlib
import json
import os
import secrets
import socket
import time
from typing import Any

from lad_dist.distributed import processes

CONNECT_SECONDS, INTRODUCTION_SECONDS, FLUSH_SECONDS = (
    60.0,
    2.0,
    1.0,
)  # seconds at most for all to connect, for one, for last words
UNACKNOWLEDGED_MS = 3000  # milliseconds


class Connection:
    """A connection that carries a line of JSON per message and never waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        enable_keepalive(connection)
        self.socket = connection
        self._in = self._out = b""

    def send(self, **message: Any) -> None:
        self._out += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # what is wrong shows when it is read
            while self._out:
                self._out = self._out[self.socket.send(self._out) :]

    @property
    def clogged(self) -> bool:
        return bool(self._out)

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that came, and whether the connection stands."""
        stands = False
        try:
            while data := self.socket.recv(1 << 16):
                self._in += data
        except BlockingIOError:
            stands = True
        except OSError:
            pass
        *lines, self._in = self._in.split(b"\n")
        return [json.loads(line) for line in lines], stands


def enable_keepalive(connection: socket.socket) -> None:
    """Ends the connection when the other host is gone for 4 seconds: a dead one sends no end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", 3), ("USER_TIMEOUT", UNACKNOWLEDGED_MS)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect_all(one_host: bool) -> dict[int, Connection]:
    """Connections of rank 0 to each other rank, of these to rank 0; none of a rank alone. Whoever does not know the
    word that the ranks share is turned away. Raises TimeoutError."""
    if processes.world_size() == 1:
        return {}
    server = _listen(one_host) if processes.is_main() else None
    call = (server.getsockname()[1], secrets.token_hex(16)) if server is not None else (0, "")
    port, word = processes.from_main(call)
    if server is not None:
        with server:
            return _accept(server, word)
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
    connection.sendall(f"{word} {processes.rank():08}".encode())
    return {0: Connection(connection)}


def _listen(one_host: bool) -> socket.socket:
    """Where the others reach rank 0: by the name that they met it at, which at home may stand for a local address."""
    kind, _, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 0, type=socket.SOCK_STREAM)[0]
    if one_host:
        return socket.create_server((str(address[0]), 0), family=kind, backlog=processes.world_size())
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=processes.world_size(), dualstack_ipv6=both)


def _accept(server: socket.socket, word: str) -> dict[int, Connection]:
    links: dict[int, Connection] = {}
    end = time.monotonic() + CONNECT_SECONDS
    while missing := set(range(1, processes.world_size())) - links.keys():
        server.settimeout(max(0.001, end - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            raise TimeoutError(
                f"ranks {sorted(missing)} did not connect to rank 0 in {CONNECT_SECONDS:.0f} s"
            ) from None
        rank = _authenticated_rank(connection, word)
        if rank in missing:
            links[rank] = Connection(connection)
        else:
            connection.close()
    return links


def _authenticated_rank(connection: socket.socket, word: str) -> int | None:
    """The rank that the other end says it is, if it knows the word."""
    connection.settimeout(INTRODUCTION_SECONDS)
    text = b""
    with contextlib.suppress(OSError):
        while len(text) < len(word) + 9 and (data := connection.recv(len(word) + 9 - len(text))):
            text += data
    known, _, rank = text.partition(b" ")
    return int(rank) if secrets.compare_digest(known, word.encode()) and rank.isdigit() else None
