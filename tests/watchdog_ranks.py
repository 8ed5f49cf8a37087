"""Ranks of a test of the watch: steps of 20 ms that end in a collective, until something goes wrong on one of them."""

import ctypes
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import torch.distributed as dist
from launching import FORKS, free_port

from lad_dist.config.errors import UserError
from lad_dist.distributed import processes
from lad_dist.distributed.connections import Connection
from lad_dist.distributed.watchdog import Watchdog

BOUND = 2.0  # seconds without progress that are a hang
FAULTY_STEP = 4


def sleep_forever(watch: Watchdog) -> None:
    time.sleep(1000)


def wait_with_the_lock(watch: Watchdog) -> None:
    time.sleep(BOUND / 2)  # the watch is well under way
    ctypes.PyDLL(None).sleep(1000)


def raise_error(watch: Watchdog) -> None:
    raise RuntimeError("a device fell off")


def make_a_mistake(watch: Watchdog) -> None:
    raise UserError("data/train.csv: cannot be read")


def be_slow(watch: Watchdog) -> None:
    for slot in range(4):
        watch.mark(FAULTY_STEP, "forward", slot)
        time.sleep(BOUND / 2)


def be_busy_with_something_else(watch: Watchdog) -> None:
    with watch.paused():
        time.sleep(2 * BOUND)


def crash(watch: Watchdog) -> None:
    ctypes.string_at(0)


def nothing(watch: Watchdog) -> None: ...


Fault = Callable[[Watchdog], None]


@dataclass
class Rank:
    process: ForkServerProcess
    folder: Path  # of all ranks
    number: int

    @property
    def said(self) -> str:
        """On stderr."""
        return (self.folder / f"stderr-{self.number}").read_text()

    @property
    def stacks(self) -> str:
        return (self.folder / "stacks" / f"rank-{self.number:05}.txt").read_text()

    def await_fault(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / f"faulty-{self.number}").exists():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < deadline
            time.sleep(0.01)


def begin(folder: Path, faults: Mapping[int, Fault], world: int, hang_seconds: float = BOUND) -> list[Rank]:
    """Ranks on their way to their faults: each of `faults` happens on its rank in step FAULTY_STEP. After that step
    all ends well, if it is reached."""
    port = str(free_port())
    ranks = []
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        words = {name: str(value) for name, value in environment.items()} | {"MASTER_PORT": port}
        process = FORKS.Process(target=_run, args=(folder, words, faults.get(rank, nothing), hang_seconds))
        process.start()
        ranks.append(Rank(process, folder, rank))
    return ranks


def _run(folder: Path, environment: dict[str, str], fault: Fault, hang_seconds: float) -> None:
    os.environ.update(environment)
    with (folder / f"stderr-{processes.rank()}").open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    processes.start()
    with Watchdog(folder / "stacks", hang_seconds, start_seconds=0.0) as watch:
        for step in range(FAULTY_STEP + 1):
            watch.mark(step, "forward")
            if step == FAULTY_STEP:
                (folder / f"faulty-{processes.rank()}").touch()
                fault(watch)
            time.sleep(0.02)
            watch.mark(step, "backward")
            if processes.world_size() > 1:
                dist.all_reduce(torch.ones(1))


def miss_a_dead_host(folder: Path, speaks: bool) -> str:
    """Seconds until the other end of a connection counts as gone, or why it cannot be tried here."""
    out = folder / "out"
    process = FORKS.Process(target=_lose_the_network, args=(out, speaks))
    process.start()
    process.join(30)
    process.kill()
    return out.read_text()


def _lose_the_network(out: Path, speaks: bool) -> None:
    new_user, new_network = 0x10000000, 0x40000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_user | new_network):
        out.write_text(f"no network of its own: {os.strerror(ctypes.get_errno())}")
        return
    _set_loopback(up=True)
    server = socket.create_server(("127.0.0.1", 0))
    here = Connection(socket.create_connection(server.getsockname()))
    there = Connection(server.accept()[0])
    _set_loopback(up=False)
    begin = time.monotonic()
    while here.receive()[1] and there.receive()[1] and time.monotonic() < begin + 20:
        if speaks:
            here.send(mark=1)
        time.sleep(0.1)
    out.write_text(str(time.monotonic() - begin))


def _set_loopback(*, up: bool) -> None:
    set_flags = 0x8914
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", int(up)))
