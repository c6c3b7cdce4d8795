"""The configuration of the web server behind `isoflop ui`: who is let in to MLflow.

MLflow's API lets its callers choose where artifacts lie, and so read and write any file that the
server's user can. On a machine that people share, loopback is no boundary between them. Therefore
a request is answered only if it comes from a process of the user who started the server, which
the kernel knows of each connection, or, where a password is set, if it brings that.

Gunicorn executes this file by its path, so it imports nothing of isoflop's.
"""

from __future__ import annotations

import base64
import hmac
import os
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PASSWORD_VARIABLE = "ISOFLOP_UI_PASSWORD"
"""Environment variable with the password; not an option, which other users could see."""
USER_NAME = "isoflop"
CONNECTIONS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""The kernel's tables of connections, with the user at this machine's end of each."""
ESTABLISHED = "01"
"""State of an open connection in these tables; the user of a closed one is shown as root."""
LOOKUPS = 3
"""Readings of a table that changes meanwhile, in which a line may be missed."""

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]

# Settings that Gunicorn reads by these names. With threads a connection that sends nothing, as
# browsers open in advance and others might to annoy, keeps nobody waiting.
threads = 8
control_socket_disable = True  # nobody needs to manage the server


def post_worker_init(worker: object) -> None:
    """Put the guard before all of MLflow's routes; called by Gunicorn in each worker."""
    from mlflow.server import app

    inner: Application = app.wsgi_app
    password = os.environ.get(PASSWORD_VARIABLE)
    app.wsgi_app = guarded(inner, password)  # type: ignore[method-assign, assignment] # Flask's way


def guarded(application: Application, password: str | None) -> Application:
    """Return an application that answers only those who are let in."""

    def answer(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if password is None:
            if _is_own(environ["gunicorn.socket"]):
                return application(environ, start_response)
            status, headers = "403 Forbidden", []
            body = (
                "This MLflow UI answers only the user who started it. If that is you, and you are "
                "connected through another user's process, start it with `isoflop ui --password`.\n"
            )
        else:
            if is_right(environ.get("HTTP_AUTHORIZATION", ""), password):
                return application(environ, start_response)
            status, headers = "401 Unauthorized", [("WWW-Authenticate", 'Basic realm="isoflop ui"')]
            body = "`isoflop ui` printed the user name and the password when it started.\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
        return [body.encode()]

    return answer


def authorization(password: str) -> str:
    """Return the value of the header `Authorization` that lets a request in."""
    return "Basic " + base64.b64encode(f"{USER_NAME}:{password}".encode()).decode()


def is_right(header: str, password: str) -> bool:
    """Return whether a request with this `Authorization` knows the password.

    Examples
    --------
    >>> is_right(authorization("abc"), "abc"), is_right(authorization("abd"), "abc")
    (True, False)
    """
    return hmac.compare_digest(header.encode(), authorization(password).encode())


def can_tell_users() -> bool:
    """Return whether this machine says whose a connection is: Linux does."""
    return CONNECTIONS[0].exists()


def _is_own(connection: socket.socket) -> bool:
    return user_of(connection.getpeername(), connection.getsockname()) == os.geteuid()


def user_of(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """Return the user ID of the process at the client's end of an IPv4 connection on loopback.

    None if there is no such open connection. The client's socket may be one of IPv6 that speaks
    IPv4, whose address ends with that of IPv4.
    """
    ends = _hexadecimal(*client), _hexadecimal(*server)
    for table in CONNECTIONS * LOOKUPS:
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            _, local, remote, state, _, _, _, user, *_ = line.split()
            if state == ESTABLISHED and local.endswith(ends[0]) and remote.endswith(ends[1]):
                return int(user)
    return None


def _hexadecimal(host: str, port: int) -> str:
    """Return an address as these tables write it: four bytes in the machine's order."""
    (number,) = struct.unpack("=I", socket.inet_aton(host))
    return f"{number:08X}:{port:04X}"
