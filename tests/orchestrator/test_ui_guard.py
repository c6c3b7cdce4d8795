"""Whose a connection is, by the kernel's tables, and what the guard makes of it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator.ui_guard import authorization, can_tell_users, guarded, user_of
from tests.strangers import STRANGER, needs_stranger, start

pytestmark = pytest.mark.skipif(not can_tell_users(), reason="the system has no /proc/net/tcp")

CONNECT = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _connection(family: socket.AddressFamily = socket.AF_INET) -> Iterator[tuple[Any, Any]]:
    """The client's end and the server's of a connection of this process with itself."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(family) as client:
        host = "127.0.0.1" if family == socket.AF_INET else "::ffff:127.0.0.1"
        client.connect((host, server.getsockname()[1]))
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_connection_of_ours_is_known_as_ours(family: socket.AddressFamily) -> None:
    try:
        socket.socket(family).close()
    except OSError:
        pytest.skip("the system has no IPv6")
    with _connection(family) as (_, accepted):
        assert user_of(accepted.getpeername(), accepted.getsockname()) == os.geteuid()


def test_a_closed_connection_is_nobodys() -> None:
    """Its sender may be anybody: the kernel shows root as the user of most closed ones."""
    with _connection() as (client, accepted):
        ends = accepted.getpeername(), accepted.getsockname()
        client.send(b"POST / HTTP/1.0\r\n\r\n")
        client.close()
        assert user_of(*ends) is None


@needs_stranger
def test_a_connection_of_another_user_is_known_as_theirs() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        start(CONNECT, server.getsockname()[1], stdin=subprocess.PIPE) as stranger,
    ):
        accepted, _ = server.accept()
        with accepted:
            assert user_of(accepted.getpeername(), accepted.getsockname()) == STRANGER
            assert _status(None, accepted) == "403 Forbidden"
            assert _status("secret", accepted) == "401 Unauthorized"
            assert _status("secret", accepted, authorization("secret")) == "200 OK"
        assert stranger.stdin is not None
        stranger.stdin.close()


@pytest.mark.parametrize(
    "header", ["", "Basic", "Basic aXNvZmxvcDpndWVzcw==", "Bearer secret", "Basic é"]
)
def test_a_wrong_password_is_refused_also_from_ourselves(header: str) -> None:
    with _connection() as (_, accepted):
        assert _status("secret", accepted, header) == "401 Unauthorized"
        assert _status(None, accepted, header) == "200 OK"


def _status(password: str | None, connection: socket.socket, header: str | None = None) -> str:
    """What the guard answers to a request on a connection."""
    statuses = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return []

    environ: dict[str, Any] = {"gunicorn.socket": connection}
    if header is not None:
        environ["HTTP_AUTHORIZATION"] = header
    guarded(application, password)(environ, lambda status, _: statuses.append(status))
    return str(statuses[0])
