"""The Ray that a sweep runs on: its address and its environment."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from analysis.errors import InputError
from orchestrator import connection
from orchestrator.connection import check

DEAD = "127.0.0.1:9"
"""Discard: nobody listens."""


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "is a Ray client's"),
        ("http://head:8265", "http://HEAD:8265 is for `isoflop submit`"),
        ("https://head:8265", "is neither `auto` nor HOST:PORT"),
        ("head", "is neither `auto` nor HOST:PORT"),
        ("head:ray", "is neither `auto` nor HOST:PORT"),
        (":6379", "is neither `auto` nor HOST:PORT"),
        ("local", "is neither `auto` nor HOST:PORT"),
        (DEAD, f"no Ray cluster answers at {DEAD}"),
        ("127.0.0.1:123456", "no Ray cluster answers at 127.0.0.1:123456"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at no-such-host.invalid:6379"),
    ],
)
def test_an_address_that_cannot_be_is_refused_by_name(address: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        check(address)
    assert said in str(refused.value)
    assert address in str(refused.value)


@contextmanager
def _listening(answer: bytes) -> Iterator[str]:
    """Address of what says this to who connects, once."""

    def serve() -> None:
        found, _ = server.accept()
        with found:
            found.sendall(answer)
            found.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_a_jobs_cluster_is_the_one_that_ray_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not answer, where several Rays are on one machine: Ray would try for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", DEAD)
    with pytest.raises(InputError, match=f"no Ray cluster answers at {DEAD}"):
        check("auto")


def test_addresses_that_answer_as_ray_does_are_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check("auto")  # Ray itself finds it
    settings = bytes.fromhex("000006 04 00 00000000 0004 00ffffff")  # RFC 9113, section 6.5
    with _listening(settings) as address:
        check(address)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b""])
def test_what_listens_and_is_no_ray_is_refused_soon(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.3)  # for who says nothing
    with _listening(answer) as address, pytest.raises(InputError) as refused:
        check(address)
    assert f"no Ray cluster answers at {address}" in str(refused.value)


def test_ray_clients_are_told_what_to_do_instead() -> None:
    with pytest.raises(InputError, match=r"isoflop submit SWEEP.toml --address http://HEAD:8265"):
        check("ray://head:10001")


PREPARE = """
import json, os, sys
from orchestrator.connection import prepare
before = dict(os.environ)
prepare(json.loads(sys.argv[1]))
print(json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}))
assert "ray" not in sys.modules
"""


def _prepared(address: str | None, **given: str) -> dict[str, str]:
    """What `prepare` sets in the environment of a new process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(address)],
        env={**inherited, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def test_a_ray_of_our_own_asks_for_a_new_token_and_listens_on_loopback_alone() -> None:
    one, other = _prepared(None), _prepared(None)
    assert one["RAY_AUTH_MODE"] == "token"
    assert len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != other["RAY_AUTH_TOKEN"]
    assert one[connection.LOOPBACK_ONLY] == "0"
    assert one["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("address", [None, "auto"])
@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_there_is_used(address: str | None, name: str) -> None:
    found = _prepared(address, **{name: "theirs"})
    assert found["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in found


def test_a_cluster_without_a_token_is_spoken_to_without_one() -> None:
    """A mode of ours that is not the cluster's would be refused."""
    found = _prepared("auto")
    assert not {name for name in found if name.startswith("RAY_AUTH")}
    assert connection.LOOPBACK_ONLY not in found  # on which its nodes would not be seen


@pytest.mark.parametrize("address", [None, "auto"])
def test_what_a_person_has_set_stays(address: str | None) -> None:
    theirs = {"RAY_AUTH_MODE": "disabled", "TUNE_MAX_PENDING_TRIALS_PG": "7"}
    found = _prepared(address, **theirs)
    assert not set(theirs) & set(found)
    assert "RAY_AUTH_TOKEN" not in found


CONNECT = """
import os
from orchestrator.connection import connected
with connected():
    import ray
    assert ray.get(ray.remote(lambda: os.getpid()).remote()) != os.getpid()
    print(ray._private.worker._global_node.get_session_dir_path())
"""


def _long(tmp_path: Path) -> Path:
    """A directory of a path as batch systems give it, too long for a socket below it."""
    directory = tmp_path / "scheduler-of-batch-jobs" / ("job-" + "9" * 40)
    directory.mkdir(parents=True)
    return directory


def _connect(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TMPDIR", "RAY_TMPDIR")}
    return subprocess.run(
        [sys.executable, "-c", CONNECT],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_ray_starts_in_a_short_directory_where_the_usual_one_is_too_long(tmp_path: Path) -> None:
    process = _connect(TMPDIR=str(_long(tmp_path)))
    assert process.returncode == 0, process.stderr
    session = Path(process.stdout.strip())
    assert len(str(session / "sockets/plasma_store")) <= 107
    assert not session.parent.exists()  # gone with its Ray


@pytest.mark.slow
def test_ray_starts_where_a_person_asks_for(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        process = _connect(TMPDIR=str(_long(tmp_path)), RAY_TMPDIR=short)
        assert process.returncode == 0, process.stderr
        assert process.stdout.startswith(short)


def test_a_directory_that_is_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = str(_long(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(InputError, match=f"RAY_TMPDIR is {long}.*set RAY_TMPDIR to a short path"):
        connection.short_directory().__enter__()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", long)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=f"TMPDIR is {long}.*set RAY_TMPDIR to a short path"):
        connection.short_directory().__enter__()
    monkeypatch.undo()


@pytest.mark.parametrize(("value", "short"), [("/tmp", False), ("", True), ("relative", True)])
def test_only_what_ray_cannot_use_is_replaced(
    value: str, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", value)
    with connection.short_directory() as directory:
        assert (directory is not None) == short
        assert directory is None or directory.stat().st_mode & 0o777 == 0o700
    assert directory is None or not directory.exists()
