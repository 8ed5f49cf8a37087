"""Ranks for a test of the watchdog: steps of 20 ms that end in a collective, until a fault happens on one of them."""

import ctypes
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import torch.distributed as dist
from launching import FORKS, free_port, rank_variables

from lad_dist.config.errors import UserError
from lad_dist.distributed import processes, ranks
from lad_dist.distributed import watchdog as watchdog_module
from lad_dist.distributed.connections import wrap
from lad_dist.distributed.watchdog import Watchdog

TIMEOUT = 2.0  # seconds without progress that are a hang
FAULTY_STEP = 4


def sleep_forever(watchdog: Watchdog) -> None:
    time.sleep(1000)


def wait_with_the_lock(watchdog: Watchdog) -> None:
    time.sleep(TIMEOUT / 2)  # the watchdog is well under way
    ctypes.PyDLL(None).sleep(1000)


def raise_error(watchdog: Watchdog) -> None:
    raise RuntimeError("a device fell off")


def raise_error_later(watchdog: Watchdog) -> None:
    time.sleep(1.5)  # within the grace
    raise RuntimeError("connection closed by peer")


def make_a_mistake(watchdog: Watchdog) -> None:
    raise UserError("data/train.csv: cannot be read")


def be_slow(watchdog: Watchdog) -> None:
    for micro_batch in range(4):
        watchdog.mark(FAULTY_STEP, "forward", micro_batch)
        time.sleep(TIMEOUT / 2)


def be_busy_with_something_else(watchdog: Watchdog) -> None:
    with watchdog.paused():
        time.sleep(2 * TIMEOUT)


def crash(watchdog: Watchdog) -> None:
    ctypes.string_at(0)


def nothing(watchdog: Watchdog) -> None: ...


Fault = Callable[[Watchdog], None]


@dataclass
class Rank:
    process: ForkServerProcess
    folder: Path  # of all ranks
    number: int

    @property
    def stderr(self) -> str:
        return (self.folder / f"stderr-{self.number}").read_text()

    @property
    def stacks(self) -> str:
        return (self.folder / "stacks" / f"rank-{self.number:05}.txt").read_text()

    def await_fault(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / f"faulty-{self.number}").exists():
            assert self.process.is_alive(), self.stderr
            assert time.monotonic() < deadline
            time.sleep(0.01)


def begin(folder: Path, faults: Mapping[int, Fault], world_size: int, timeout: float = TIMEOUT) -> list[Rank]:
    """Start ranks: each of `faults` happens on its rank in step FAULTY_STEP, after which all ends well, if reached."""
    port = free_port()
    ranks = []
    for rank in range(world_size):
        variables = rank_variables(rank, world_size, port)
        process = FORKS.Process(target=_run, args=(folder, variables, faults.get(rank, nothing), timeout))
        process.start()
        ranks.append(Rank(process, folder, rank))
    return ranks


def _run(folder: Path, environment: dict[str, str], fault: Fault, timeout: float) -> None:
    os.environ.update(environment)
    with (folder / f"stderr-{ranks.rank()}").open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    processes.start()
    watchdog_module.START_SECONDS = 0.0
    with Watchdog(folder / "stacks", timeout) as watchdog:
        for step in range(FAULTY_STEP + 1):
            watchdog.mark(step, "forward")
            if step == FAULTY_STEP:
                (folder / f"faulty-{ranks.rank()}").touch()
                fault(watchdog)
            time.sleep(0.02)
            watchdog.mark(step, "backward")
            if ranks.world_size() > 1:
                dist.all_reduce(torch.ones(1))


def miss_a_dead_host(folder: Path, sends: bool) -> str:
    """Return the seconds until the other end of a connection counts as gone, or why it cannot be tried."""
    out = folder / "out"
    process = FORKS.Process(target=_lose_the_network, args=(out, sends))
    process.start()
    process.join(30)
    process.kill()
    return out.read_text()


def _lose_the_network(out: Path, sends: bool) -> None:
    new_user, new_network = 0x10000000, 0x40000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_user | new_network):
        out.write_text(f"no network of its own: {os.strerror(ctypes.get_errno())}")
        return
    _set_loopback(up=True)
    server = socket.create_server(("127.0.0.1", 0))
    near = wrap(socket.create_connection(server.getsockname()))
    far = wrap(server.accept()[0])
    _set_loopback(up=False)
    begin = time.monotonic()
    while not (near.poll(0.1) or far.poll(0.1)) and time.monotonic() < begin + 20:
        if sends:
            with suppress(OSError):
                near.send("heartbeat")
    with suppress(OSError):
        near.recv()
        raise AssertionError("a message from a dead host")
    out.write_text(str(time.monotonic() - begin))


def _set_loopback(*, up: bool) -> None:
    set_flags = 0x8914
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", int(up)))
