"""The way in to a running Ray cluster: its dashboard's address and the token that opens it.

Ray's own client reports a wrong address, a dead one and a wrong token in many ways, late or by
aborting; here each is checked first and becomes one sentence.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from analysis.errors import InputError

if TYPE_CHECKING:
    import requests
    from ray.job_submission import JobSubmissionClient

DASHBOARD_PORT = 8265
"""Where Ray's dashboard listens unless told otherwise."""
PATIENCE_SECONDS = 20.0
"""Within which an address answers, name resolution included."""
_NOT_DASHBOARDS = {6379: "the cluster's own protocol", 10001: "Ray Client"}
_CHATTER = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True, kw_only=True)
class Token:
    """What a cluster asks of whoever uses it."""

    value: str
    source: str
    """Where it was found, for messages."""


def find_token() -> Token:
    """The token that Ray itself would use, from where Ray itself looks, in its order.

    Raises
    ------
    InputError
        If there is none. (Ray's own loader ends the process where RAY_AUTH_TOKEN_PATH names a file
        that cannot be read.)
    """
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value=value, source="RAY_AUTH_TOKEN")
    path = token_file()
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        value = ""
    if value:
        return Token(value=value, source=str(path))
    raise InputError(
        f"there is no token in RAY_AUTH_TOKEN or {path}: put the cluster's there (on its head, "
        "`ray get-auth-token` prints it), or give --no-auth if the cluster asks for none"
    )


def token_file() -> Path:
    """Return the file in which Ray looks for the token, whether or not there is one."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def loose_token_file() -> str | None:
    """Return a warning if other users of this machine can read the file that the token is in.

    None where it is private, there is none, or the environment has the token. As ssh does with
    private keys (`sshkey_perm_ok` of OpenSSH), it minds only files of this user's own: those that a
    machine's administrator or Kubernetes puts there have their own rules.
    """
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return None
    path = token_file()
    try:
        found = path.stat()
    except OSError:
        return None
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.getuid() or not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return None
    return (
        f"other users of this machine may read the cluster's token in {path} (its mode is "
        f"{mode:04o}), and with it run programs on the cluster as you: chmod 600 {path}"
    )


def readable_on_the_way(address: str) -> str | None:
    """Return a warning if a token that is sent to a dashboard goes over a network in the clear.

    None for https and for this machine, to which a forwarded port belongs.

    Raises
    ------
    InputError
        As `dashboard_url`.
    """
    url = urlsplit(dashboard_url(address))
    host = url.hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which a resolver may take for anything but this one
        here = host == "localhost"
    if url.scheme == "https" or here:
        return None
    return (
        f"the cluster's token goes to {host} in clear text, and who reads it on the way can run "
        f"programs on the cluster: forward the port (ssh -N -L {DASHBOARD_PORT}:127.0.0.1:"
        f"{url.port or DASHBOARD_PORT} {host}) and use http://127.0.0.1:{DASHBOARD_PORT}, or https"
    )


def dashboard_url(address: str) -> str:
    """The dashboard's URL, from what a person wrote.

    Raises
    ------
    InputError
        If the address is that of another of Ray's services, or none at all.
    """
    scheme, _, rest = address.rpartition("://")
    host = urlsplit(f"//{rest}").hostname or "HEAD"
    meant = f"submission goes to the dashboard, such as http://{host}:{DASHBOARD_PORT}"
    if scheme == "ray":
        raise InputError(f"{address} is an address of Ray Client: {meant}")
    if scheme not in ("", "http", "https") or not rest or address == "auto":
        raise InputError(f"{address!r} is no address of a Ray dashboard: {meant}")
    try:
        port = urlsplit(f"//{rest}").port
    except ValueError as error:
        raise InputError(f"the port of {address} is no number up to 65535: {meant}") from error
    if port in _NOT_DASHBOARDS:
        raise InputError(f"port {port} of {address} is that of {_NOT_DASHBOARDS[port]}: {meant}")
    return f"{scheme or 'http'}://{rest.rstrip('/')}"


def connect(address: str, token: Token | None) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`, which has answered.

    Raises
    ------
    InputError
        If it does not answer within `PATIENCE_SECONDS`, is no Ray dashboard, or refuses the token.
    """
    url, headers = dashboard_url(address), _headers(token)
    status, ray_version = _knock(url, headers)
    if status == 401:
        raise InputError(f"{url} asks for a token: leave out --no-auth")
    if status == 403:
        whose = f"the token in {token.source}" if token else "a call without a token"
        raise InputError(
            f"{url} refuses {whose}: on the cluster's head, `ray get-auth-token` prints the right "
            "one; put it into RAY_AUTH_TOKEN"
        )
    if ray_version is None:
        raise InputError(
            f"{url} answers, but not as Ray's dashboard does (status {status}): its port is "
            f"{DASHBOARD_PORT} unless the cluster was started with another"
        )
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    with _unset(_OVERRIDES):  # else they would win over the address that a person gave
        return JobSubmissionClient(url, headers=headers)


def hosts(address: str, token: Token | None) -> list[str]:
    """Names of the machines of a cluster, now; none where its dashboard does not tell them."""
    import requests

    url, headers = dashboard_url(address), _headers(token)
    try:
        answer = requests.get(
            f"{url}/nodes?view=hostNameList", headers=headers, timeout=PATIENCE_SECONDS
        )
        return sorted(map(str, answer.json()["data"]["hostNameList"]))
    except (requests.exceptions.RequestException, KeyError, TypeError):  # nothing depends on it
        return []


def _headers(token: Token | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.value}"} if token else {}


def _knock(url: str, headers: dict[str, str]) -> tuple[int, str | None]:
    """HTTP status and Ray version of what answers at `url`."""
    import requests

    found: list[tuple[int, str | None]] = []
    failure = ["no answer"]

    def ask() -> None:
        try:
            answer = requests.get(f"{url}/api/version", headers=headers, timeout=PATIENCE_SECONDS)
            found.append((answer.status_code, _ray_version(answer)))
        except requests.exceptions.ConnectionError as error:
            failure[0] = _reason(error)
        except requests.exceptions.RequestException as error:
            failure[0] = type(error).__name__

    # In a thread, since no timeout of requests covers the resolution of names.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS - 2)
    if not found:
        raise InputError(
            f"nothing that speaks HTTP answers at {url} ({failure[0]}): is the cluster up, and is "
            f"its dashboard's port ({DASHBOARD_PORT} by default) reachable or forwarded?"
        )
    return found[0]


def _ray_version(answer: requests.Response) -> str | None:
    """The version in an answer of the dashboard; None where it is another server's."""
    try:
        version = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(version)


def _reason(error: Exception) -> str:
    """The few words at the end of a chain of exceptions that a person can use."""
    text = str(error)
    for sign in ("Connection refused", "Name or service not known", "No route to host"):
        if sign in text:
            return sign.lower()
    for sign in ("NameResolutionError", "Failed to resolve"):
        if sign in text:
            return "no such host"
    return "the connection was closed" if "RemoteDisconnected" in text else type(error).__name__


@contextmanager
def _unset(names: tuple[str, ...]) -> Iterator[None]:
    """Without these environment variables."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
