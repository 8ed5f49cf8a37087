"""What a Ray cluster asks of those who join it, and the authentication mode of this process.

Ray itself finds out about a wrong address or token by trying for a minute, and says so in its own log lines. One call
to the head answers at once: it needs no Ray in this process, and whichever mode Ray was used in before.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
from ray import _raylet

from lad_dist.config.errors import UserError

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
CONNECT_SECONDS = 5
ANSWER_SECONDS = 5

HOST_AND_PORT = re.compile(r"(\[[^][\s]+\]|[^][:/\s]+):(\d{1,5})")
SET_TOKEN = 'set RAY_AUTH_TOKEN to what "ray get-auth-token" prints for the account that started the cluster'


def check_cluster(address: str) -> str:
    """Return the authentication mode, `token` or `disabled`, of the Ray cluster at HOST:PORT.

    Raises:
        UserError: No head of a Ray cluster answers there, or it refuses this account's token.
    """
    _check_listening(address)
    code = call(address, CHECK_ALIVE)[0]
    if code is grpc.StatusCode.OK:
        return "disabled"
    if code is not grpc.StatusCode.UNAUTHENTICATED:
        raise UserError(
            f"RAY_ADDRESS = {address}: what answers is no head of a Ray cluster; "
            'give the HOST:PORT that "ray start --head" prints'
        )
    if os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "0").lower() in ("1", "true"):  # Ray itself knows where it is
        return "token"
    token, origin = read_token()
    if not token:
        raise UserError(f"RAY_ADDRESS = {address}: the cluster asks for a token; {SET_TOKEN}")
    if call(address, CHECK_ALIVE, token=token)[0] is not grpc.StatusCode.OK:
        raise UserError(f"RAY_ADDRESS = {address}: the cluster refuses the token of {origin}; {SET_TOKEN}")
    return "token"


def _check_listening(address: str) -> None:
    parsed = HOST_AND_PORT.fullmatch(address)
    if "://" in address:
        raise UserError(f"RAY_ADDRESS = {address}: a search is no Ray Client; give HOST:PORT, without ray://")
    if parsed is None or not 0 < int(parsed[2]) < 65536:
        raise UserError(f'RAY_ADDRESS = {address}: give HOST:PORT, as "ray start --head" prints it')
    try:
        socket.create_connection((parsed[1].strip("[]"), int(parsed[2])), CONNECT_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()  # that of a timeout has no strerror
        raise UserError(
            f"RAY_ADDRESS = {address}: nothing answers ({reason}); start the cluster, "
            "or unset RAY_ADDRESS to search on this machine alone"
        ) from None


def call(
    address: str, method: str, request: bytes = b"", token: str = "", seconds: float = ANSWER_SECONDS
) -> tuple[grpc.StatusCode, bytes]:
    """Return the status and the answer of a gRPC method of the head."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return grpc.StatusCode.OK, channel.unary_unary(method)(request, timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), b""


def read_token() -> tuple[str, str]:
    """Return the token that Ray would use in token mode, and where it stands; both are empty where there is none.

    Raises:
        UserError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(path).read_text(encoding="utf-8").strip(), path
        except (OSError, UnicodeDecodeError):
            raise UserError(f"RAY_AUTH_TOKEN_PATH = {path}: cannot be read; {SET_TOKEN}") from None
    default = Path.home() / ".ray" / "auth_token"
    try:
        return default.read_text(encoding="utf-8").strip(), str(default)
    except (OSError, UnicodeDecodeError):
        return "", ""


@contextlib.contextmanager
def authentication(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set Ray's variables (None: unset) for this process and those it starts, and put them back in the end.

    Ray reads RAY_AUTH_MODE when it first needs it, and a token likewise; it has to be asked to read them again.
    """
    before = {name: os.environ.get(name) for name in variables}
    _set_variables(variables)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # The mode first: a thread of Ray's that is still ending has to find a token as long as the mode asks for one.
    _raylet.Config.initialize("")  # type: ignore[attr-defined]
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)  # Ray before 2.52 has no tokens
    if loader is not None:
        loader.instance().reset_cache()
