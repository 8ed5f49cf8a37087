"""Loader processes: batches in order, one-line mistakes, no state, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lad_dist.config.errors import UserError
from lad_dist.core.batch import Batch
from lad_dist.core.collate import pack
from lad_dist.data.loader import load_batches


class Numbers:
    """A batch that shows its step and number."""

    def batch(self, step: int, micro_batch: int) -> Batch:
        if step == 7:
            raise UserError("shards: gone")
        ids = np.array([[step, micro_batch, os.getpid()]])
        return pack(ids, np.array([0]), np.array([3]), ids == micro_batch, ids)


def read(steps: range, micro_batches: range, num_workers: int) -> list[list[list[int]]]:
    loaded = load_batches(Numbers(), steps, micro_batches, num_workers)
    return [[b.input_ids.tolist()[:2] for b in batches] for batches in loaded]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_whatever_the_number_of_workers(num_workers: int) -> None:
    expected = [[[step, micro_batch] for micro_batch in (1, 3)] for step in range(2, 7)]
    assert read(range(2, 7), range(1, 5, 2), num_workers) == expected


def test_batches_arrive_whole_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    (batches,) = load_batches(Numbers(), range(1), range(1), 1)
    (local,) = load_batches(Numbers(), range(1), range(1), 0)
    assert torch.get_rng_state().equal(before)
    for name, value in batches[0]._asdict().items():
        expected = getattr(local[0], name)
        assert type(value) is type(expected)
        if isinstance(value, torch.Tensor) and name not in ("input_ids", "labels"):  # these tell the process
            assert value.equal(expected)
            assert value.dtype == expected.dtype
    assert batches[0].input_ids[2] != os.getpid() == local[0].input_ids[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_users_mistake_stays_one_line(num_workers: int) -> None:
    with pytest.raises(UserError) as caught:
        read(range(5, 9), range(1), num_workers)
    assert str(caught.value) == "shards: gone"


def test_many_batches_open_no_files() -> None:
    before = len(os.listdir("/proc/self/fd"))
    loaded = []
    for batches in load_batches(Numbers(), range(8, 12), range(200), 2):
        loaded.append(batches)
        assert len(os.listdir("/proc/self/fd")) < before + 40
    assert len(loaded) == 4


TRAINER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_loader import Numbers
from lad_dist.data.loader import load_batches
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: None)
batches = load_batches(Numbers(), range(10, 10**6), range(1), 2)
loaders = {int(next(batches)[0].input_ids[2]) for _ in range(8)}
print(*loaders, flush=True)
sys.stdin.readline()
for _ in range(20):
    next(batches)
print("went on", flush=True)
time.sleep(60)
"""


def test_loaders_ignore_the_trainers_signals_and_die_with_it() -> None:
    from launching import alive, wait_until  # the trainer imports this file, and nothing beside it

    command = [sys.executable, "-c", TRAINER, str(Path(__file__).parent)]
    pipe = subprocess.PIPE
    trainer = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    loaders = [int(word) for word in trainer.stdout.readline().split()]
    assert len(loaders) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(trainer.pid, number)  # to all of them, as launchers and SLURM do
    time.sleep(0.5)
    assert all(map(alive, loaders))
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "went on\n"
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(alive, loaders)), 5)
