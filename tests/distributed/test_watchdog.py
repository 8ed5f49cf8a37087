"""A rank that dies or hangs is diagnosed and named, and nobody waits for it."""

import os
import secrets
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import watchdog_ranks
from hypothesis import given
from hypothesis import strategies as st
from watchdog_ranks import TIMEOUT, Rank

from lad_dist.config.errors import EXIT_FAULT, EXIT_RUN_AGAIN, UserError
from lad_dist.distributed import watchdog
from lad_dist.distributed.cluster_state import MAX_NAMED, ClusterState, Heartbeat
from lad_dist.distributed.connections import RANK_BYTES, TOKEN_BYTES, accept_all
from lad_dist.distributed.ranks import world_size
from lad_dist.distributed.watchdog import Watchdog

HOST = socket.gethostname()


def await_end(ranks: list[Rank], seconds: float) -> list[int | None]:
    """Return the exit codes: negative after a signal, None of ranks that still live."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.process.exitcode for rank in ranks]
    for rank in ranks:
        rank.process.kill()
    return codes


def full_name(rank: Rank) -> str:
    return f"rank {rank.number} on {HOST} (pid {rank.process.pid})"


def lines(ranks: list[Rank]) -> list[str]:
    return [line for rank in ranks for line in rank.stderr.splitlines()]


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize(
    "others", [watchdog_ranks.nothing, watchdog_ranks.sleep_forever], ids=["in a collective", "computing"]
)
def test_a_rank_that_is_killed_takes_the_others_along(
    victim: int, others: watchdog_ranks.Fault, tmp_path: Path
) -> None:
    faults = dict.fromkeys(range(3), others) | {victim: watchdog_ranks.sleep_forever}
    ranks = watchdog_ranks.begin(tmp_path, faults, 3, timeout=60.0)
    for rank in ranks:
        rank.await_fault()
    time.sleep(0.2)
    ranks[victim].process.kill()
    codes = await_end(ranks, seconds=5.0)
    assert codes == [-signal.SIGKILL if rank == victim else EXIT_FAULT for rank in range(3)]
    (line,) = lines(ranks)
    assert line.startswith(f"{full_name(ranks[victim])} died")


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_killed(victim: int, tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, dict.fromkeys(range(3), watchdog_ranks.sleep_forever), 3)
    for rank in ranks:
        rank.await_fault()
    os.kill(ranks[victim].process.pid or 0, signal.SIGSTOP)
    codes = await_end(ranks, seconds=2 * TIMEOUT + 4)
    assert codes == [-signal.SIGKILL if rank == victim else EXIT_RUN_AGAIN for rank in range(3)]
    (line,) = lines(ranks)
    assert full_name(ranks[victim]) in line
    assert all("sleep_forever" in rank.stacks for rank in ranks if rank.number != victim)


@pytest.mark.processes
def test_a_rank_that_the_others_wait_for_is_named(tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, {1: watchdog_ranks.sleep_forever}, 3)
    assert await_end(ranks, seconds=60) == [EXIT_RUN_AGAIN] * 3
    (line,) = lines(ranks)
    assert f"{full_name(ranks[1])} in step {watchdog_ranks.FAULTY_STEP}, forward, micro-batch 0" in line
    assert not any(full_name(rank) in line for rank in (ranks[0], ranks[2]))
    assert "sleep_forever" in ranks[1].stacks
    assert all("all_reduce" in ranks[rank].stacks for rank in (0, 2))


@pytest.mark.processes
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_holds_pythons_lock_is_named_and_leaves_a_stack(culprit: int, tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, {culprit: watchdog_ranks.wait_with_the_lock}, 2)
    codes = await_end(ranks, seconds=60)
    assert codes == [-signal.SIGKILL if rank == culprit else EXIT_RUN_AGAIN for rank in range(2)]
    (line,) = lines(ranks)
    assert full_name(ranks[culprit]) in line
    assert "wait_with_the_lock" in ranks[culprit].stacks


@pytest.mark.processes
def test_a_single_process_reports_that_it_hangs(tmp_path: Path) -> None:
    (rank,) = watchdog_ranks.begin(tmp_path, {0: watchdog_ranks.sleep_forever}, 1)
    assert await_end([rank], seconds=60) == [EXIT_RUN_AGAIN]
    assert full_name(rank) in rank.stderr
    assert "sleep_forever" in rank.stacks


@pytest.mark.processes
def test_a_disk_that_takes_no_stacks_hinders_nobody_from_ending(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("in the way")
    (rank,) = watchdog_ranks.begin(tmp_path, {0: watchdog_ranks.sleep_forever}, 1)
    assert await_end([rank], seconds=60) == [EXIT_RUN_AGAIN]
    assert f"no progress for {watchdog_ranks.TIMEOUT:.0f} s" in rank.stderr
    assert "sleep_forever" in rank.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    "fault", [watchdog_ranks.nothing, watchdog_ranks.be_slow, watchdog_ranks.be_busy_with_something_else]
)
def test_a_slow_finished_or_paused_rank_is_not_reported(fault: watchdog_ranks.Fault, tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, {1: fault}, 3)
    assert await_end(ranks, seconds=60) == [0, 0, 0]
    assert lines(ranks) == []
    assert not (tmp_path / "stacks").exists()


@pytest.mark.processes
@pytest.mark.parametrize("culprit", [0, 1])
def test_the_others_report_an_error_on_one_rank(culprit: int, tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, {culprit: watchdog_ranks.raise_error}, 2, timeout=60.0)
    ranks[culprit].await_fault()
    assert await_end(ranks, seconds=5 + 1) == [EXIT_FAULT, EXIT_FAULT]
    assert f"{full_name(ranks[culprit])} failed: RuntimeError: a device fell off" in ranks[1 - culprit].stderr
    assert "raise_error" in ranks[culprit].stderr  # its traceback


@pytest.mark.processes
def test_a_mistake_that_one_rank_alone_meets_ends_the_others_as_it_does(tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, {1: watchdog_ranks.make_a_mistake}, 2, timeout=60.0)
    assert await_end(ranks, seconds=60)[0] == UserError.code
    assert "data/train.csv: cannot be read" in ranks[0].stderr


@pytest.mark.processes
def test_a_mistake_of_all_ranks_is_reported_by_each(tmp_path: Path) -> None:
    ranks = watchdog_ranks.begin(tmp_path, dict.fromkeys(range(3), watchdog_ranks.make_a_mistake), 3, timeout=60.0)
    assert await_end(ranks, seconds=60) == [1, 1, 1]  # an exception that nobody caught: not by os._exit
    assert not any("failed:" in line for line in lines(ranks))


@pytest.mark.processes
def test_a_segmentation_fault_leaves_a_stack(tmp_path: Path) -> None:
    (rank,) = watchdog_ranks.begin(tmp_path, {0: watchdog_ranks.crash}, 1)
    assert await_end([rank], seconds=60) == [-signal.SIGSEGV]
    assert "in crash" in rank.stderr


@pytest.mark.processes
@pytest.mark.parametrize("sends", [True, False])
def test_a_host_that_is_gone_without_a_word_is_missed(sends: bool, tmp_path: Path) -> None:
    """In a network of its own, which is then taken down: nothing arrives any more, no end of a connection either."""
    outcome = watchdog_ranks.miss_a_dead_host(tmp_path, sends)
    if outcome.startswith("no network"):
        pytest.skip(outcome)
    assert float(outcome) < 5


def test_a_stranger_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    token, (rank, unknown_rank) = secrets.token_bytes(TOKEN_BYTES), (n.to_bytes(RANK_BYTES, "big") for n in (1, 7))
    server = socket.create_server(("127.0.0.1", 0))
    strangers = [socket.create_connection(server.getsockname()) for _ in range(4)]
    for stranger, text in zip(strangers, (bytes(TOKEN_BYTES) + rank, token + unknown_rank, b"GET /", b""), strict=True):
        stranger.sendall(text)
    friend = socket.create_connection(server.getsockname())
    friend.sendall(token + rank)
    with server:
        connections = accept_all(server, token)
    Connection(friend.detach()).send(Heartbeat())
    assert connections.keys() == {1}
    assert connections[1].poll(5)
    assert connections[1].recv() == Heartbeat()
    assert all(stranger.recv(1) == b"" for stranger in strangers)


def test_a_trial_of_a_search_is_not_watched(tmp_path: Path) -> None:
    """The trial runs in a thread, and must not end the process."""

    def trial() -> None:
        with Watchdog(tmp_path / "stacks", timeout=0.1):
            time.sleep(0.5)

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    assert not (tmp_path / "stacks").exists()


def cluster(world_size: int) -> ClusterState:
    return ClusterState([f"node{rank}" for rank in range(world_size)], range(world_size), now=0.0)


MARKS = st.lists(st.integers(0, 5), min_size=2, max_size=5)


@given(MARKS, st.data())
def test_silent_ranks_are_blamed_else_those_with_least_progress(marks: list[int], data: st.DataObject) -> None:
    world_size = len(marks)
    silent = data.draw(st.sets(st.integers(0, world_size - 1), max_size=world_size - 1))
    state = cluster(world_size)
    for rank, number in enumerate(marks):
        state.on_heartbeat(rank, Heartbeat(number), now=1.0)
    for rank in set(range(world_size)) - silent:
        state.on_heartbeat(rank, Heartbeat(marks[rank]), now=11.0)
    assert state.diagnose_hang(state.last_progress + 9.9, timeout=10.0, silence=5.0) is None
    diagnosis = state.diagnose_hang(11.1, timeout=10.0, silence=5.0)
    assert diagnosis is not None
    assert diagnosis.lost == sorted(silent)
    blamed = sorted(silent) or [rank for rank in range(world_size) if marks[rank] == min(marks)]
    assert [rank for rank in range(world_size) if f"node{rank} " in diagnosis.line] == blamed[:MAX_NAMED]
    assert ("and 1 more" in diagnosis.line) == (len(blamed) == MAX_NAMED + 1)


def test_any_progress_or_pause_puts_it_off() -> None:
    state = cluster(3)
    for second in range(40):
        state.on_heartbeat(0, Heartbeat(0), now=second)
        state.on_heartbeat(1, Heartbeat(min(second, 20)), now=second)
        state.on_heartbeat(2, Heartbeat(0, paused=second > 20), now=second)
        assert state.diagnose_hang(second + 0.5, timeout=1.0, silence=5.0) is None


def test_a_process_that_was_itself_stopped_blames_nobody() -> None:
    state = cluster(2)
    state.reset_timers(100.0)
    assert state.diagnose_hang(104.0, timeout=5.0, silence=1.0) is None


@pytest.mark.processes
def test_the_first_that_failed_is_named_after_the_grace(tmp_path: Path) -> None:
    """Rank 1 fails by its neighbor's failure; rank 0, which does not wait for them, hears of both."""
    faults = {0: watchdog_ranks.sleep_forever, 1: watchdog_ranks.raise_error_later, 2: watchdog_ranks.raise_error}
    ranks = watchdog_ranks.begin(tmp_path, faults, 3, timeout=60.0)
    ranks[2].await_fault()
    assert await_end(ranks, seconds=60) == [EXIT_FAULT] * 3
    assert f"{full_name(ranks[2])} failed: RuntimeError: a device fell off: all processes end" in ranks[0].stderr


@pytest.mark.parametrize(
    ("steps", "timeout"),
    [([], 600.0), ([1.0, 1.0], 600.0), ([1.0, 1.0, 1.0], 60.0), ([7.0, 7.0, 500.0], 70.0), ([7.0] * 100, 70.0)],
)
def test_a_hang_is_ten_median_steps(steps: list[float], timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    hangs = Watchdog(Path("stacks"), timeout=60.0)
    for step, seconds in enumerate([*steps, 0.0]):
        for micro_batch in range(3):
            hangs.mark(step, "forward", micro_batch)
        now[0] += seconds
    assert hangs._current_timeout() == timeout


def test_deaths_are_seen_where_hangs_are_not_looked_for() -> None:
    assert Watchdog(Path("stacks"), timeout=0.0)._current_timeout() == float("inf")
    assert world_size() == 1
