"""Connecting to Ray: real heads with and without tokens, what answers no driver, and clusters for one search."""

import contextlib
import http.server
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest
import ray
from launching import ROOT, alive, environment, free_port, wait_until
from ray_cluster import START_SECONDS, RayCluster, ray_nodes

from lad_dist.cluster import connect
from lad_dist.cluster.connect import check_folder, check_storage, check_trial_fits, ray_cluster
from lad_dist.cluster.wait_for_nodes import wait_for_nodes
from lad_dist.config.errors import Fault, UserError

Heads = tuple[RayCluster, RayCluster]
SECRET = "hf_" + secrets.token_hex(8)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heads]:
    """One that asks for a token, and one that does not, of a user whose variables are not the driver's."""
    users = {"HOME": str(tmp_path_factory.mktemp("home")), "HF_HOME": "/of/the/head", "FOO": "head"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with (
        ray_nodes(variables=users | token) as guarded,
        ray_nodes(variables=users | {"RAY_AUTH_MODE": "disabled"}) as unguarded,
    ):
        yield guarded, unguarded


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of an account that has not used Ray."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def use_token(account: Path, monkeypatch: pytest.MonkeyPatch, place: str, token: str) -> None:
    file = account / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    if place == "~/.ray/auth_token":
        file.write_text(token + "\n")
    elif place == "RAY_AUTH_TOKEN_PATH":
        (account / "token").write_text(token)
        monkeypatch.setenv(place, str(account / "token"))
    else:
        monkeypatch.setenv(place, token)


@pytest.mark.ray
@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"])
def test_a_cluster_with_a_token_is_joined(
    heads: Heads,
    account: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: str,
) -> None:
    use_token(account, monkeypatch, place, heads[0].variables["RAY_AUTH_TOKEN"])
    monkeypatch.setenv("RAY_ADDRESS", heads[0].address)
    with ray_cluster():
        assert [node["NodeName"] for node in ray.nodes()] == ["first"]
    assert capfd.readouterr() == ("", "")
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.ray
@pytest.mark.parametrize(
    ("place", "token", "message"),
    [
        ("RAY_AUTH_TOKEN", "", "the cluster asks for a token; set RAY_AUTH_TOKEN to what"),
        ("RAY_AUTH_TOKEN", "another", "the cluster refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to"),
        ("~/.ray/auth_token", "another", r"refuses the token of \S+/\.ray/auth_token; set"),
        ("RAY_AUTH_TOKEN_PATH", "", "the cluster asks for a token"),
    ],
)
def test_a_cluster_that_refuses_the_token_says_so_in_one_line(
    heads: Heads,
    account: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    token: str,
    message: str,
) -> None:
    use_token(account, monkeypatch, place, token)
    monkeypatch.setenv("RAY_ADDRESS", heads[0].address)
    refused(message)
    if place == "RAY_AUTH_TOKEN_PATH":
        (account / "token").unlink()
        refused("RAY_AUTH_TOKEN_PATH = .*/token: cannot be read")


def refused(message: str) -> None:
    """The connection is refused with a line that has the message, and within ten seconds."""
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
        with pytest.raises(UserError, match=message) as caught:
            ray_cluster().__enter__()
    assert time.monotonic() - begin < 11
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 280


@pytest.mark.ray
def test_a_cluster_without_tokens_is_joined_by_an_account_that_has_one(
    heads: Heads,
    account: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And the driver's variables reach tasks, but no log."""
    use_token(account, monkeypatch, "~/.ray/auth_token", "of another cluster")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", heads[1].address.replace(heads[1].address.split(":")[0], "localhost"))
    ours = {
        "HF_TOKEN": SECRET, "HF_HOME": "/of/the/driver", "HUGGINGFACE_X": "${HOME}", "TRANSFORMERS_X": "1",
        "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "lo", "LAD_DIST_X": "a b", "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    for name, value in {**ours, "FOO": "driver"}.items():
        monkeypatch.setenv(name, value)

    def seen() -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in [*ours, "FOO"]}

    def asked_to_end(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, asked_to_end)
    try:
        with ray_cluster():
            assert signal.getsignal(signal.SIGTERM) is asked_to_end
            assert ray.get(ray.remote(seen).remote()) == {**ours, "FOO": "head"}
        assert signal.getsignal(signal.SIGTERM) is asked_to_end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr() == ("", "")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    logs = [file for file in heads[1].folder.rglob("*") if file.is_file()]
    assert len(logs) > 10
    assert [file for file in logs if SECRET.encode() in file.read_bytes()] == []


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{closed}", r"nothing answers \(connection refused\); start the cluster, or unset RAY_ADDRESS"),
        ("nowhere.invalid:6379", r"RAY_ADDRESS = nowhere.invalid:6379: nothing answers \("),
        ("localhost:{web}", "what answers is no head of a Ray cluster; give"),
        ("127.0.0.1:{silent}", "what answers is no head of a Ray cluster; give"),
        ("ray://127.0.0.1:10001", "a search is no Ray Client; give HOST:PORT, without ray://"),
        ("127.0.0.1", 'give HOST:PORT, as "ray start --head" prints it'),
        ("127.0.0.1:99999", "give HOST:PORT"),
        ("::1:6379", "give HOST:PORT"),
        ("[::1]:{closed}", r"nothing answers \("),
    ],
)
def test_what_is_no_head_is_refused_in_one_line(
    account: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as web, socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        ports = {"closed": free_port(), "web": web.server_port, "silent": silent.getsockname()[1]}
        monkeypatch.setenv("RAY_ADDRESS", address.format(**ports))
        refused(message)
        web.shutdown()


# A search on this machine alone: its trial runs until somebody says that it may end.
LOCAL = """
import os, sys, time, ray
from lad_dist.cluster.connect import check_storage, ray_cluster

with ray_cluster():
    @ray.remote
    class Trial:
        def start(self):
            return os.getpid()
        def run(self):
            time.sleep(1000)

    trial = Trial.remote()
    process = ray.get(trial.start.remote())
    trial.run.remote()
    print(os.environ["RAY_AUTH_TOKEN_PATH"], process, flush=True)
    sys.stdin.readline()
"""


def descendants(process: int) -> set[int]:
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    below, last = {process}, set[int]()
    while below != last:
        last, below = below, below | {child for child, parent in parents.items() if parent in below}
    return below


def listening(processes: set[int]) -> set[str]:
    """The addresses at which the processes listen, as the kernel writes them."""
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.ray
def test_clusters_for_one_search_run_side_by_side_and_leave_nothing(account: Path) -> None:
    pipe = subprocess.PIPE
    searches = [
        subprocess.Popen([sys.executable, "-c", LOCAL], cwd=ROOT, env=environment(), text=True, **streams)
        for streams in [{"stdin": pipe, "stdout": pipe, "stderr": pipe}] * 2
    ]
    lines = [cast(IO[str], search.stdout).readline().split() for search in searches]
    assert [len(line) for line in lines] == [2, 2], [search.communicate() for search in searches]
    processes = [descendants(search.pid) for search in searches]
    for (token, trial), family in zip(lines, processes, strict=True):
        assert Path(token).stat().st_mode & 0o777 == 0o600
        assert int(trial) in family
        assert len(family) >= 6
        assert listening(family)
        assert listening(family) <= LOOPBACK
    tokens = [Path(token) for token, _ in lines]
    assert tokens[0].read_text() != tokens[1].read_text()

    searches[0].kill()
    begin = time.monotonic()
    wait_until(lambda: not any(map(alive, processes[0] - {searches[0].pid})), 15)
    print(f"gone after {time.monotonic() - begin:.1f} s")
    searches[0].communicate()
    wait_until(lambda: not tokens[0].parent.exists(), 10)
    assert searches[1].communicate("\n", timeout=60) == ("", "")
    assert searches[1].returncode == 0
    wait_until(lambda: not any(map(alive, processes[1])), 20)
    assert not tokens[1].parent.exists()
    assert not (account / ".ray").exists()


@pytest.mark.parametrize(
    ("failures", "attempts"), [(["The node timed out."], 2), (["The node timed out."] * 3, 3), (["No disk."], 1)]
)
def test_a_start_that_takes_long_is_tried_again(
    failures: list[str], attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, calls = iter(failures), []

    def init(**_: object) -> None:
        calls.append(1)
        if (failure := next(left, None)) is not None:
            raise Exception(failure)

    monkeypatch.setattr(ray, "init", init)
    if len(failures) >= attempts:
        with pytest.raises(Fault, match=r"Ray does not start on this machine: .*; try again"):
            connect._start(tmp_path)
    else:
        connect._start(tmp_path)
    assert len(calls) == attempts


@pytest.fixture(scope="module")
def elsewhere(heads: Heads, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a second node of the cluster with a token has another disk."""
    folder = tmp_path_factory.mktemp("elsewhere")
    mounted = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{folder}" && exec "$@"', "sh"]
    node = heads[0].add_node("--node-name=second", before=mounted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", heads[0].variables["RAY_AUTH_TOKEN"])
        assert wait_for_nodes(heads[0].address, ["first", "second"], START_SECONDS, [node]) == ""
    return folder


@pytest.mark.ray
@pytest.mark.root
def test_a_node_that_does_not_see_the_folder_is_named(
    heads: Heads, elsewhere: Path, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", heads[0].variables["RAY_AUTH_TOKEN"])
    monkeypatch.setenv("RAY_ADDRESS", heads[0].address)
    with ray_cluster():
        check_storage(account / "seen")
        monkeypatch.setattr(connect, "STORAGE_SECONDS", 0.5)
        host = re.escape(heads[0].address.split(":")[0])
        with pytest.raises(UserError, match=rf"not the same folder on second \({host}\); a search needs one that all"):
            check_storage(elsewhere)
    assert list((account / "seen").iterdir()) == list(elsewhere.iterdir()) == []


@pytest.mark.ray
@pytest.mark.root
def test_a_node_that_does_not_join_is_named(
    heads: Heads, elsewhere: Path, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", heads[0].variables["RAY_AUTH_TOKEN"])
    address, names = heads[0].address, ["first", "second", "third"]
    assert wait_for_nodes(address, names, 0.1, []) == "Ray did not come up on third (0.1 s)"
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert wait_for_nodes(address, names, 60, [os.getpid(), ended.pid]).startswith(
        "Ray did not come up on third (the start failed)"
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert "the cluster refuses the token" in wait_for_nodes(address, ["first"], 0.1, [])


@pytest.mark.ray
def test_a_cluster_of_this_machine_alone_is_not_asked_for_the_folder(
    heads: Heads, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", heads[1].address)
    with ray_cluster():
        monkeypatch.setattr(ray, "remote", lambda **_: pytest.fail("a task was started"))
        check_storage(account / "new")


@pytest.mark.parametrize("text", ["s3://bucket/x", "gs://bucket", "hdfs+x://a/b", "file:///runs"])
def test_an_object_store_is_no_folder(text: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(text)}: a search needs a folder that all nodes see; give a path"):
        check_folder(text)


@pytest.mark.parametrize("text", ["runs", "/a/b", "../x", "a:b", "s3:/x", "~/runs"])
def test_a_path_is_a_folder(text: str) -> None:
    check_folder(text)


NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0}},
    {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
    {"Alive": True, "Resources": {"CPU": 4.3, "GPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ((1, 8, 0), ""),
        ((1, 4, 4), ""),
        ((5, 1, 1), ""),
        ((10, 0.1, 0.5, "SPREAD"), ""),
        ((43, 0.1, 0.05, "STRICT_PACK"), ""),
        ((80, 0.1, 0, "STRICT_PACK"), ""),
        ((4, 1, 1, "STRICT_PACK"), ""),
        ((2, 2, 1, "STRICT_SPREAD"), ""),
        ((3, 2, 0, "STRICT_SPREAD"), ""),
        ((1, 0, 0, "STRICT_PACK"), ""),
        (
            (1, 9, 0),
            "search.cpus = 9, search.gpus = 0: no node can hold such a trial, the largest has 8 CPUs and 4 GPUs",
        ),
        ((1, 8, 1, "STRICT_SPREAD"), "no node can hold such a trial"),
        ((6, 1, 1), "all 3 have 14.3 CPUs and 5 GPUs; lower what a trial gets"),
        ((44, 0.1, 0.05, "STRICT_PACK"), "the largest node has 8 CPUs and 4 GPUs, all 3 have"),
        (
            (5, 1, 1, "STRICT_PACK"),
            r"search.gpus = 1, for each of 5 processes \(STRICT_PACK\): the cluster cannot hold",
        ),
        ((3, 1, 1, "STRICT_SPREAD"), r"for each of 3 processes \(STRICT_SPREAD\)"),
        ((4, 2, 1), r"for each of 4 processes \(PACK\)"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, trial: tuple[int, float, float], message: str
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    if not message:
        check_trial_fits(*trial)
        return
    with pytest.raises(UserError, match=message) as caught:
        check_trial_fits(*trial)
    assert "\n" not in str(caught.value)


def test_a_cluster_without_nodes_holds_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", list)
    with pytest.raises(UserError, match="no node can hold such a trial, the largest has 0 CPUs"):
        check_trial_fits(1, 1, 0)
