"""The Ray that a sweep runs on: its address and its environment."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from analysis.errors import InputError
from orchestrator import checks, connection
from orchestrator.connection import check
from tests.strangers import STRANGER, needs_stranger, run

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


def test_addresses_that_answer_as_ray_does_are_not_refused() -> None:
    settings = bytes.fromhex("000006 04 00 00000000 0004 00ffffff")  # RFC 9113, section 6.5
    with _listening(settings) as address:
        assert check(address) == address


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


@contextmanager
def _raylet(
    address: str, *options: str, user: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a raylet of a cluster whose head is at an address."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        program = shutil.copy("/bin/sh", Path(directory, "raylet"))
        words = [program, "-c", "sleep 600; exit", f"--gcs-address={address}", *options]
        with subprocess.Popen(words, user=user, start_new_session=True) as process:
            try:
                yield process
            finally:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process IDs that `auto` sees: others of this machine's may be of real clusters."""
    pids: list[int] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(psutil, "process_iter", lambda: map(psutil.Process, pids))
    return pids


@needs_stranger
def test_another_users_process_that_looks_like_a_raylet_is_not_spoken_to(seen: list[int]) -> None:
    """It would be sent the token of the cluster that is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with _raylet(address, user=STRANGER) as process:
            seen.append(process.pid)
            with pytest.raises(InputError, match="you run no node of a Ray cluster"):
                check("auto")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_auto_is_the_cluster_of_our_own_raylet(seen: list[int]) -> None:
    settings = bytes.fromhex("000006 04 00 00000000 0004 00ffffff")
    with _listening(settings) as address, _raylet(address) as one, _raylet(address) as other:
        seen += [os.getpid(), one.pid, other.pid]
        assert check("auto") == address


def test_of_several_clusters_of_ours_one_must_be_named(seen: list[int]) -> None:
    with _raylet("127.0.0.1:1") as one, _raylet("127.0.0.1:2") as other:
        seen += [one.pid, other.pid]
        with pytest.raises(InputError, match=r"127.0.0.1:1 and 127.0.0.1:2.*--address HOST:PORT"):
            check("auto")


@pytest.mark.slow
def test_the_ray_of_another_sweep_on_this_machine_is_no_cluster_to_join(
    ray_session: None, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its raylet is a real one, which `auto` would find if it were called otherwise."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    for process in psutil.Process().children(recursive=True):  # of other tests' clusters, too
        if any(session in word for word in process.cmdline()):
            seen.append(process.pid)
    with pytest.raises(InputError, match="you run no node of a Ray cluster"):
        check("auto")
    monkeypatch.setattr(connection, "PREFIX", "another-")
    assert check("auto") == ray.get_runtime_context().gcs_address


CONNECT = """
import os, sys
from orchestrator.connection import connected
with connected():
    import ray
    worker = ray.remote(lambda: (os.getpid(), os.environ.get("HF_TOKEN")))
    process, token = ray.get(worker.remote())
    assert process != os.getpid()
    assert token == os.environ.get("HF_TOKEN")  # which trials need
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.read()
"""


def _long(tmp_path: Path) -> Path:
    """A directory of a path as batch systems give it, too long for a socket below it."""
    directory = tmp_path / "scheduler-of-batch-jobs" / ("job-" + "9" * 40)
    directory.mkdir(parents=True)
    return directory


def _connect(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CONNECT],
        env=_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _environment(**more: str) -> dict[str, str]:
    names = ("TMPDIR", "RAY_TMPDIR")
    return {**{name: value for name, value in os.environ.items() if name not in names}, **more}


@pytest.mark.slow
def test_ray_starts_in_a_short_directory_where_the_usual_one_is_too_long(tmp_path: Path) -> None:
    process = _connect(TMPDIR=str(_long(tmp_path)))
    assert process.returncode == 0, process.stderr
    session = Path(process.stdout.strip())
    assert len(str(session / "sockets/plasma_store")) <= 107
    assert not session.parents[1].exists()  # gone with its Ray


@pytest.mark.slow
def test_ray_starts_where_a_person_asks_for(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        process = _connect(TMPDIR=str(_long(tmp_path)), RAY_TMPDIR=short)
        assert process.returncode == 0, process.stderr
        assert process.stdout.startswith(short)


MEDDLE = """
session = sys.argv[1]
inside = [session, *(f"{session}/{name}" for name in ("logs", "runtime_resources", "sockets"))]
done = []

def attempt(name, act):
    try:
        act()
    except (PermissionError, FileNotFoundError):  # not found: after it was swapped
        return
    done.append(name)

for directory in inside:
    attempt(f"list {directory}", lambda: os.listdir(directory))
    attempt(f"write {directory}", lambda: open(f"{directory}/planted", "w"))
    attempt(f"link {directory}", lambda: os.symlink("/etc/passwd", f"{directory}/worker-1.out"))
    attempt(f"swap {directory}", lambda: os.rename(directory, f"{directory}.theirs"))
private = os.path.dirname(os.path.dirname(session))
attempt("swap all", lambda: os.rename(private, f"{private}.theirs"))
attempt("remove all", lambda: os.rmdir(private))
attempt("speak", lambda: socket.socket(socket.AF_UNIX).connect(f"{session}/sockets/raylet"))
print(json.dumps(done))
"""


@pytest.mark.slow
@needs_stranger
def test_another_user_can_neither_read_nor_change_the_session_of_our_ray() -> None:
    """They could swap the code of what runs, or have Ray append to files of its user's."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as shared:
        Path(shared).chmod(0o1777)
        with subprocess.Popen(
            [sys.executable, "-c", CONNECT],
            env=_environment(TMPDIR=shared, HF_TOKEN="hf-secret"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            session = process.stdout.readline().strip()
            assert session.startswith(shared)
            assert {"logs", "sockets"} <= set(os.listdir(session))
            outcome = run(MEDDLE, session)
            process.communicate(timeout=300)  # its input ends, and so does it
        assert process.returncode == 0
        assert outcome == []
        assert os.listdir(shared) == []


def test_a_directory_that_is_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = str(_long(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(
        InputError, match=f"RAY_TMPDIR does.*{long} is too long.*set RAY_TMPDIR to a short path"
    ):
        connection.private_directory().__enter__()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", long)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=f"{long} is too long.*; /tmp is not there, or"):
        connection.private_directory().__enter__()
    monkeypatch.undo()


def test_a_directory_where_others_can_rename_what_is_ours_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as loose:
        Path(loose).chmod(0o777)
        within = Path(loose, "d")
        within.mkdir(mode=0o700)
        for place in (loose, str(within)):
            monkeypatch.setenv("TMPDIR", place)
            monkeypatch.delenv("RAY_TMPDIR", raising=False)
            with connection.private_directory() as directory:
                assert not directory.is_relative_to(loose)
            monkeypatch.setenv("RAY_TMPDIR", place)
            with pytest.raises(InputError, match=rf": {loose} is writable by others and has no st"):
                connection.private_directory().__enter__()
            check = checks.sockets()
            assert f"(chmod +t {loose})" in check.value
            assert "RAY_TMPDIR to" in check.remedy
            assert check.remedy not in check.value
            Path(loose).chmod(0o1777)  # what the message says helps
            assert checks.sockets().status == "ok"
            Path(loose).chmod(0o777)


@pytest.mark.parametrize("value", ["/tmp", "", "relative"])
def test_the_directory_for_ray_is_within_a_private_one(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", value)
    with connection.private_directory() as directory:
        assert directory.is_relative_to("/tmp")
        assert directory.parent.stat().st_mode & 0o777 == 0o700
        assert not directory.exists()  # Ray makes it, and lets everybody write into it
    assert not directory.parent.exists()
