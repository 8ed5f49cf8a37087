"""TCP connections between rank 0 and every other rank, a line of JSON per message."""

import contextlib
import json
import os
import secrets
import socket
import time
from typing import Any

from lad_dist.distributed import processes

CONNECT_SECONDS = 60.0  # at most, for all ranks to connect
INTRODUCTION_SECONDS = 2.0  # at most, for one rank to send the token and its rank
FLUSH_SECONDS = 1.0  # at most, for the others to read the last messages
UNACKNOWLEDGED_MS = 3000  # milliseconds


class Connection:
    """A connection that carries a line of JSON per message and never waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        enable_keepalive(connection)
        self.socket = connection
        self._in = self._out = b""

    def send(self, **message: Any) -> None:
        """Send a message, after those that the other end has not taken yet."""
        self._out += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # a broken connection shows when it is read
            while self._out:
                self._out = self._out[self.socket.send(self._out) :]

    @property
    def clogged(self) -> bool:
        """Whether the other end has not taken all messages yet."""
        return bool(self._out)

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the messages that arrived, and whether the connection stands."""
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
    """End the connection when the other host is gone for 4 seconds: a dead host sends no end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", 3), ("USER_TIMEOUT", UNACKNOWLEDGED_MS)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect_all(one_host: bool) -> dict[int, Connection]:
    """Connect rank 0 with each other rank, and return this rank's connections by the other end's rank.

    A rank alone has none. Rank 0 turns away whoever does not know the token that the ranks share.

    Raises:
        TimeoutError: A rank did not connect in CONNECT_SECONDS.
    """
    if processes.world_size() == 1:
        return {}
    server = _listen(one_host) if processes.is_main() else None
    address = (server.getsockname()[1], secrets.token_hex(16)) if server is not None else (0, "")
    port, token = processes.from_main(address)
    if server is not None:
        with server:
            return _accept(server, token)
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
    connection.sendall(f"{token} {processes.rank():08}".encode())
    return {0: Connection(connection)}


def _listen(one_host: bool) -> socket.socket:
    """Listen where the others reach rank 0: at MASTER_ADDR, which on one host may stand for a local address."""
    kind, _, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 0, type=socket.SOCK_STREAM)[0]
    if one_host:
        return socket.create_server((str(address[0]), 0), family=kind, backlog=processes.world_size())
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=processes.world_size(), dualstack_ipv6=dual_stack)


def _accept(server: socket.socket, token: str) -> dict[int, Connection]:
    connections: dict[int, Connection] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    while missing := set(range(1, processes.world_size())) - connections.keys():
        server.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            raise TimeoutError(
                f"ranks {sorted(missing)} did not connect to rank 0 in {CONNECT_SECONDS:.0f} s"
            ) from None
        rank = _authenticated_rank(connection, token)
        if rank in missing:
            connections[rank] = Connection(connection)
        else:
            connection.close()
    return connections


def _authenticated_rank(connection: socket.socket, token: str) -> int | None:
    """Return the rank that the other end sends, None where it does not know the token."""
    connection.settimeout(INTRODUCTION_SECONDS)
    text = b""
    size = len(token) + 9
    with contextlib.suppress(OSError):
        while len(text) < size and (data := connection.recv(size - len(text))):
            text += data
    received, _, rank = text.partition(b" ")
    return int(rank) if secrets.compare_digest(received, token.encode()) and rank.isdigit() else None
