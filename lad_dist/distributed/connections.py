"""TCP connections between rank 0 and every other rank; they end when the other process or its host is gone."""

import contextlib
import os
import secrets
import socket
from multiprocessing.connection import Connection

from lad_dist.distributed import processes, ranks

CONNECT_SECONDS = 60.0  # at most, until the next rank connects
INTRODUCTION_SECONDS = 2.0  # at most, until it sends the token and its rank
TOKEN_BYTES, RANK_BYTES = 16, 4


def connect_all() -> dict[int, Connection]:
    """Connect rank 0 with each other rank, and return this rank's connections by the other end's rank.

    Raises:
        TimeoutError: A rank did not connect in CONNECT_SECONDS.
    """
    if ranks.world_size() == 1:
        return {}
    if ranks.is_main():
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        backlog = ranks.world_size()
        with socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=dual) as server:
            token = secrets.token_bytes(TOKEN_BYTES)
            processes.from_main((server.getsockname()[1], token))
            return accept_all(server, token)
    port, token = processes.from_main((0, b""))
    end = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
    end.sendall(token + ranks.rank().to_bytes(RANK_BYTES, "big"))
    return {0: wrap(end)}


def accept_all(server: socket.socket, token: bytes) -> dict[int, Connection]:
    """Return a connection with every other rank; turn away whoever does not know the token."""
    connections: dict[int, Connection] = {}
    server.settimeout(CONNECT_SECONDS)
    while missing := set(range(1, ranks.world_size())) - connections.keys():
        try:
            end, _ = server.accept()
        except TimeoutError:
            raise TimeoutError(f"ranks {sorted(missing)} did not connect in {CONNECT_SECONDS:g} seconds") from None
        end.settimeout(INTRODUCTION_SECONDS)
        with contextlib.suppress(OSError):
            text = b""
            while piece := end.recv(TOKEN_BYTES + RANK_BYTES - len(text)):
                text += piece
            rank = int.from_bytes(text[TOKEN_BYTES:], "big")
            if secrets.compare_digest(text[:TOKEN_BYTES], token) and rank in missing:
                connections[rank] = wrap(end)
        end.close()
    return connections


def wrap(end: socket.socket) -> Connection:
    """Return a connection of messages, which ends when its host is gone for 4 seconds: a dead host sends no end."""
    end.setblocking(True)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", 3), ("USER_TIMEOUT", 3000)):  # s, s, -, ms
        end.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    return Connection(end.detach())
