"""Wait until the nodes of a Ray cluster have joined, for a script that starts one on many machines.

    RAY_ADDRESS=HOST:PORT python -m lad_dist.cluster.wait_for_nodes --seconds 300 --processes 4711,4712 NAME …

NAME is what `ray start --node-name=NAME` was given. Ends with 0 when all have joined. Ends with 75, after a line that
says which have not, when the seconds are over, or before that when one of the local processes that start Ray has ended.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc
from ray.core.generated import gcs_pb2, gcs_service_pb2

from lad_dist.cluster.authentication import call, check_cluster, read_token
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN, UserError

GET_NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
LOOK_EVERY = 0.5  # seconds


def alive_nodes(address: str) -> set[str]:
    """Return the names of the nodes; raise UserError where no cluster answers, or not to this account's token."""
    mode = check_cluster(address)
    code, answer = call(address, GET_NODES, token=read_token()[0] if mode == "token" else "")
    if code is not grpc.StatusCode.OK:
        raise UserError(f"RAY_ADDRESS = {address}: the head does not list the nodes ({code.name.lower()})")
    reply: Any = gcs_service_pb2.GetAllNodeInfoReply.FromString(answer)  # type: ignore[attr-defined]
    alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
    return {node.node_name for node in reply.node_info_list if node.state == alive}


def wait_for_nodes(address: str, names: Sequence[str], seconds: float, processes: Sequence[int]) -> str:
    """Return what is missing when the seconds are over, or a process has ended; nothing when all nodes are there."""
    end = time.monotonic() + seconds
    while True:
        over, ended = time.monotonic() > end, [process for process in processes if not _runs(process)]
        try:
            missing = [name for name in names if name not in alive_nodes(address)]
            reason = ""
        except UserError as error:
            missing, reason = list(names), f": {error}"
        if not missing:
            return ""
        if over or ended:
            how = "the start failed" if ended else f"{seconds:g} s"
            return f"Ray did not come up on {', '.join(missing)} ({how}){reason}"
        time.sleep(LOOK_EVERY)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="wait_for_nodes")
    parser.add_argument("names", metavar="NAME", nargs="+")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--processes", default="")
    options = parser.parse_args()
    processes = [int(process) for process in options.processes.split(",") if process]
    problem = wait_for_nodes(os.environ["RAY_ADDRESS"], options.names, options.seconds, processes)
    if problem:
        print(problem, file=sys.stderr)
    return EXIT_RUN_AGAIN if problem else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
