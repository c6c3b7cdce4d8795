"""The way in to a cluster: addresses that are none, servers that are none, and tokens."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import cluster.dashboard
from analysis.errors import InputError
from cluster.dashboard import (
    connect,
    dashboard_url,
    find_token,
    loose_token_file,
    readable_on_the_way,
)

RAY = Path(sys.executable).with_name("ray")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "ray://head:10001",
            "Ray Client: submission goes to the dashboard, such as http://head:8265",
        ),
        ("http://head:10001", "Ray Client"),
        ("head:6379", "the cluster's own protocol"),
        ("auto", "no address of a Ray dashboard"),
        ("s3://bucket", "no address of a Ray dashboard"),
        ("http://head:99999", "no number up to 65535"),
        ("http://", "no address of a Ray dashboard"),
    ],
)
def test_an_address_of_something_else_is_named(address: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        dashboard_url(address)
    assert words in str(refused.value)
    assert ":8265" in str(refused.value)


def test_an_address_needs_no_scheme_and_no_slash() -> None:
    assert dashboard_url("head:8265") == "http://head:8265"
    assert dashboard_url("https://head/") == "https://head"


@contextmanager
def _server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats every connection as told; its URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    behave(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_an_address_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.dashboard.PATIENCE_SECONDS <= 20
    monkeypatch.setattr(cluster.dashboard, "PATIENCE_SECONDS", 3.0)
    ended = threading.Event()
    since = time.monotonic()
    with _server(lambda connection: ended.wait(30) and None) as url:
        with pytest.raises(InputError, match="no answer"):
            connect(url, None)
        ended.set()
    assert time.monotonic() - since < 5


def test_a_port_where_nobody_or_somebody_else_listens_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as bound:
        port = bound.getsockname()[1]
    with pytest.raises(InputError, match="connection refused"):
        connect(f"http://127.0.0.1:{port}", None)
    with (
        _server(lambda connection: connection.sendall(b"\x00\x00\x04\x08\x00")) as url,
        pytest.raises(InputError, match="nothing that speaks HTTP"),
    ):
        connect(url, None)


def test_a_web_server_that_is_no_dashboard_is_named() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match="not as Ray's dashboard does"):
            connect(f"http://127.0.0.1:{server.server_port}", None)
    finally:
        server.shutdown()
        server.server_close()


def _token_settings(directory: Path) -> list[dict[str, str]]:
    """Ways to give a token, each with a lesser one present that must not win."""
    (directory / ".ray").mkdir()
    (directory / ".ray/auth_token").write_text("default\n")
    (directory / "named").write_text(" named\n")
    home, named = {"HOME": str(directory)}, {"RAY_AUTH_TOKEN_PATH": str(directory / "named")}
    return [home, home | named, home | named | {"RAY_AUTH_TOKEN": "given "}]


@pytest.mark.slow
def test_the_token_is_the_one_that_ray_itself_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = []
    for settings in _token_settings(tmp_path):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        rays = subprocess.run([RAY, "get-auth-token"], capture_output=True, text=True, check=True)
        found.append((find_token().value, rays.stdout.strip()))
    assert found == [("default", "default"), ("named", "named"), ("given", "given")]


def test_no_token_is_said_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"none: put the cluster's there"):
        find_token()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265", "https://head:8265"],
)
def test_a_token_may_go_to_this_machine_and_by_https(address: str) -> None:
    assert readable_on_the_way(address) is None


@pytest.mark.parametrize(
    "address", ["head:8265", "http://10.0.0.1:8265", "http://localhost.example:8265"]
)
def test_a_token_in_clear_text_gets_a_warning_before_it_is_sent(address: str) -> None:
    warning = readable_on_the_way(address)
    assert warning is not None
    assert "in clear text" in warning
    assert "ssh -N -L 8265:127.0.0.1:8265 " in warning


def test_a_token_file_of_another_user_is_that_users_affair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ssh has it: a machine's administrator, or Kubernetes, has reasons of its own."""
    path = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert loose_token_file() is None
    path.write_text("0" * 64)
    path.chmod(0o644)
    assert f"chmod 600 {path}" in str(loose_token_file())
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    assert loose_token_file() is None
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    if os.geteuid() == 0:
        os.chown(path, 65_534, 65_534)
        assert loose_token_file() is None
