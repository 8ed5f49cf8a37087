"""Connection to Ray: to the cluster at RAY_ADDRESS, or to one started on this machine for as long as it is needed."""

import contextlib
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lad_dist.cluster import reaper as cluster_reaper
from lad_dist.cluster.authentication import authentication, check_cluster
from lad_dist.config.errors import Fault, UserError

OBJECT_STORE_BYTES = 100_000_000  # trials exchange nothing but numbers
# Variables of the driver that its trials need too, wherever they run.
TRIAL_VARIABLES = ("TOKENIZERS_PARALLELISM", "DS_ACCELERATOR")
TRIAL_VARIABLE_PREFIXES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "NCCL_", "GLOO_", "LAD_DIST_")
STORAGE_SECONDS = 5  # seconds for a file to appear on the other nodes
START_ATTEMPTS = 3  # of Ray on this machine
TASK_SECONDS = 60  # seconds for a node to start a process, and to look

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # by default all else on the machine comes before a trial
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")  # a busy machine takes long to start a process


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to Ray, and disconnect in the end; a cluster that was started here is shut down and removed.

    Raises:
        UserError: RAY_ADDRESS does not lead to a Ray cluster that this process may and can join.
        Fault: Ray does not start on this machine.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    with _local_cluster() if address == "local" else _joined_cluster(address):
        yield


@contextlib.contextmanager
def _local_cluster() -> Iterator[None]:
    """Start Ray on this machine. Nobody else can reach it: it listens on loopback, and asks for a token of its own.

    It ends with this process, however this one ends, and the folder goes with it.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets in it have 107 characters at most
    quiet = subprocess.DEVNULL
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", cluster_reaper.__file__, str(folder)],
        stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True,
    )  # fmt: skip
    try:
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(token)}
        with authentication(tokens), _loopback_only(), _own_process_groups(), _connection(_start, folder):
            yield
    finally:
        reaper.communicate(b"shut down")


def _start(folder: Path) -> None:
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=str(folder),
            )
            return
        except Exception as error:  # Ray has no class of its own for it
            # On a busy machine its processes may take longer than Ray waits for, which is half a minute.
            if attempt == START_ATTEMPTS or "timed out" not in str(error):
                raise Fault(f"Ray does not start on this machine: {_first_line(error)}; try again") from error
            ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Have a node that Ray starts listen on loopback.

    So it does where it has no clusters, on macOS and Windows, unless this variable says otherwise. It is read at
    `import ray`, here and in the node's processes.
    """
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    with authentication({variable: "0"}):
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_process_groups() -> Iterator[None]:
    """Have Ray's processes pass by the signals to the process group of this one, as `timeout` and terminals send them.

    They would end before the search does, which then could not stop in order.
    """
    module: Any = services
    popen = module.ConsolePopen
    module.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        module.ConsolePopen = popen


@contextlib.contextmanager
def _joined_cluster(address: str) -> Iterator[None]:
    if address == "auto":
        try:
            address = services.canonicalize_bootstrap_address(address) or address
        except ConnectionError:
            raise UserError("RAY_ADDRESS = auto: no cluster runs on this machine; give HOST:PORT of a head") from None
    with authentication({"RAY_AUTH_MODE": check_cluster(address)}), _connection(_join, address):
        yield


def _join(address: str) -> None:
    hint = f'search on a node of the cluster, which "ray start --address={address}" makes of a machine'
    if not services.find_node_ids():  # Ray would wait for one for a minute
        raise UserError(f"RAY_ADDRESS = {address}: no node of a Ray cluster runs on this machine; {hint}")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            # Not env_vars: Ray writes those into a log that everybody on the node may read, and HF_TOKEN is one.
            runtime_env={"worker_process_setup_hook": _variable_setter(trial_variables())},
        )
    except Exception as error:  # RuntimeError, ConnectionError, ValueError: whatever does not fit
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"RAY_ADDRESS = {address}: cannot join the cluster: {reason}; {hint}") from error


@contextlib.contextmanager
def _connection(connect: Callable[[Any], None], argument: Any) -> Iterator[None]:
    """Connect, and disconnect in the end. Ray's handler of SIGTERM stays only where the caller has none.

    Either is set anew once Ray is connected, as Ray's libraries put one before it that prints a dump of the stack.
    """
    before = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other may set one
    try:
        connect(argument)
        if in_main_thread:
            signal.signal(signal.SIGTERM, before if callable(before) else signal.getsignal(signal.SIGTERM))
        yield
    finally:
        ray.shutdown()
        if in_main_thread and before is not None:
            signal.signal(signal.SIGTERM, before)


def trial_variables() -> dict[str, str]:
    """Return the variables of this process that trials need on whatever machine."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in TRIAL_VARIABLES or name.startswith(TRIAL_VARIABLE_PREFIXES)
    }


def _variable_setter(variables: dict[str, str]) -> Callable[[], None]:
    """Return what a worker process does before anything else. It is sent as it is: a node may lack lad_dist."""

    def set_variables() -> None:
        os.environ.update(variables)

    return set_variables


def _first_line(error: BaseException) -> str:
    """Return what an error of Ray's says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def check_trial_fits(processes: int, cpus: float, gpus: float, placement_strategy: str = "PACK") -> None:
    """Raise UserError where the nodes of now cannot hold a trial: Tune would wait for one without end.

    Args:
        processes: How many processes a trial has.
        cpus: CPUs of each process.
        gpus: GPUs of each process.
        placement_strategy: Where they may be, in Ray's words: PACK, SPREAD, STRICT_PACK (on one node) or STRICT_SPREAD
            (on a node each).
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [_room(node, {"CPU": cpus, "GPU": gpus}, processes) for node in nodes]
    room = {"STRICT_PACK": max(rooms, default=0), "STRICT_SPREAD": sum(map(bool, rooms))}
    if processes <= room.get(placement_strategy, sum(rooms)):
        return
    most, total = (
        " and ".join(f"{choose(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
        for choose in (lambda counts: max(counts, default=0), sum)
    )
    asked = f"search.cpus = {cpus:g}, search.gpus = {gpus:g}"
    if processes == 1:
        raise UserError(f"{asked}: no node can hold such a trial, the largest has {most}; lower what a trial gets")
    raise UserError(
        f"{asked}, for each of {processes} processes ({placement_strategy}): the cluster cannot hold such a trial; "
        f"the largest node has {most}, all {len(nodes)} have {total}; lower what a trial gets"
    )


def _room(node: dict[str, float], asked: dict[str, float], enough: int) -> int:
    """Return how many processes that ask for so much a node holds. Ray counts in ten-thousandths."""
    units = {kind: (round(1e4 * node.get(kind, 0)), round(1e4 * amount)) for kind, amount in asked.items()}
    return min((present // each for present, each in units.values() if each), default=enough)


def check_folder(text: str) -> None:
    """Raise UserError where the text is the address of an object store, not the path of a folder."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(
            f"{text}: a search needs a folder that all nodes see; give a path on a file system that they share"
        )


def check_storage(folder: Path) -> None:
    """Raise UserError where a node of the cluster does not see the folder: what a trial writes there would be lost.

    Every other node looks for a file that this process writes. Makes the folder where it is not there yet.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if [node["NodeID"] for node in nodes] == [here]:
        return
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / f".storage-check-{secrets.token_hex(8)}", secrets.token_hex(32)
    try:
        with file.open("w") as draft:
            draft.write(text)
            draft.flush()
            os.fsync(draft.fileno())
        reader = ray.remote(num_cpus=0, max_retries=0)(_file_reader(str(file), STORAGE_SECONDS))
        answers = {
            node["NodeID"]: reader.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in nodes
        }
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=TASK_SECONDS)
        # A node without an answer may be lost, which Ray notices late: trials go elsewhere then.
        blind = [_node_name(node) for node in nodes if _result(answers[node["NodeID"]]) not in (text, None)]
    finally:
        file.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{folder}: not the same folder on {', '.join(sorted(blind))}; a search needs one that all nodes see, "
            "on a file system that they share"
        )


def _file_reader(file: str, patience: float) -> Callable[[], str]:
    """Return what a node does to read a file, which may take a moment to appear there."""

    def read_file() -> str:
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError), open(file) as lines:
                return lines.read()
            if time.monotonic() > end:
                return ""
            time.sleep(0.2)

    return read_file


def _result(answer: Any) -> str | None:
    """Return what a task returned; None where it failed, or has not ended."""
    try:
        text: str = ray.get(answer, timeout=0)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return text


def _node_name(node: dict[str, Any]) -> str:
    """Return the name that a node was started with, else its host's, and its address."""
    address = node["NodeManagerAddress"]
    name = node["NodeManagerHostname"] if node["NodeName"] == address else node["NodeName"]
    return f"{name} ({address})"
