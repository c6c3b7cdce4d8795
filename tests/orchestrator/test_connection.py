"""The Ray that a sweep runs on: addresses, environment, and nodes that see another project."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from analysis.errors import InputError
from orchestrator import connection
from orchestrator.connection import answer, check, fingerprint, token_name, witness
from orchestrator.storage import Storage

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


def test_addresses_that_answer_as_ray_does_are_not_refused() -> None:
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


def test_a_witness_sees_the_drivers_token_or_says_so(storage: Storage) -> None:
    with pytest.raises(InputError, match=f"{socket.gethostname()} does not see the same"):
        witness(storage, "ours", 3)
    storage.replace(token_name(3), b"theirs")
    with pytest.raises(InputError, match="an s3:// or gs:// URI"):
        witness(storage, "ours", 3)
    storage.replace(token_name(3), b"ours")
    witness(storage, "ours", 3)
    with pytest.raises(InputError):
        witness(storage, "ours", 4)  # of another driver


def test_a_node_answers_beside_the_token(storage: Storage) -> None:
    storage.replace(token_name(3), b"ours")
    assert answer(storage.uri, "ours", 3, "node-7") == fingerprint()
    assert storage.read("leases/3.node-7.token") == b"ours"


def _copy_sources(to: Path) -> None:
    root = Path(connection.__file__).parents[1]
    for room in connection.ROOMS:
        shutil.copytree(root / room, to / room)


def test_the_fingerprint_is_of_the_sources(tmp_path: Path) -> None:
    """A copy has the same, whatever else lies beside it; one more comment makes another."""
    code = "from orchestrator.connection import fingerprint; print(fingerprint())"

    def found(where: Path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(where)}
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return done.stdout.strip()

    one, other = tmp_path / "one", tmp_path / "other"
    _copy_sources(one)
    shutil.copytree(one, other)
    (other / "cluster" / "notes.txt").write_text("not of it")
    assert found(one) == found(other)
    with (other / "trainers" / "flops.py").open("a") as file:
        file.write("# another\n")
    assert found(one) != found(other)


RAY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, connection.LOOPBACK_ONLY: "0"}
RAYLETS = Path(__file__).parents[1] / "faults" / "raylets.py"


def _environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | RAY | more


@contextmanager
def _cluster(*around: str, **more: str) -> Iterator[str]:
    """Address of a cluster of one node beside the driver's, started `around` by something."""
    # Below /tmp itself: a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        environment = _environment(RAY_TMPDIR=directory, **more)
        command = [*around, sys.executable, "-P", str(RAYLETS)]
        with (
            (Path(directory) / "log").open("w") as log,
            subprocess.Popen(
                command, env=environment, stdin=-1, stdout=-1, stderr=log, text=True
            ) as process,
        ):
            try:
                address = json.loads(process.stdout.readline())["address"]
                print(1, file=process.stdin, flush=True)
                assert json.loads(process.stdout.readline())["node"]
                yield address
            finally:
                family = psutil.Process(process.pid).children(recursive=True)
                process.stdin.close()
                psutil.wait_procs(family, 15)
                for one in [psutil.Process(process.pid), *family]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()


def _run(sweep: Path, project: Path, head: str, **more: str) -> tuple[int, str]:
    """Exit code and errors of `isoflop run` on the cluster."""
    command = [sys.executable, "-P", "-m", "orchestrator", "run", str(sweep)]
    command += ["--project", str(project), "--address", head]
    done = subprocess.run(
        command, env=_environment(**more), capture_output=True, text=True, timeout=120, check=False
    )
    assert list(project.glob("ledger/*")) == []
    assert list(project.glob("leases/*.token")) == []
    return done.returncode, done.stderr


def _may_mount() -> bool:
    command = ["unshare", "--mount", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="mount namespaces are not permitted here")
def test_a_node_that_sees_another_directory_is_named(
    tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    """Where the driver sees the project, the node sees an empty disk."""
    project = tmp_path / "shared" / "project"
    project.parent.mkdir()
    hide = f'mount -t tmpfs none "{project.parent}" && exec "$@"'
    with _cluster("unshare", "--mount", "sh", "-c", hide, "sh") as address:
        code, said = _run(sweep_file(), project, address)
    assert code == 2
    assert said.splitlines()[-1].startswith("isoflop: node 127.0.0.1 ")
    assert f"does not see the same {project} as the driver: put the project on storage" in said


@pytest.mark.slow
def test_a_node_with_another_isoflop_is_named_and_tokens_are_compared(
    tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    _copy_sources(tmp_path)
    with (tmp_path / "trainers" / "flops.py").open("a") as file:
        file.write("# another\n")
    project = tmp_path / "project"
    with _cluster(PYTHONPATH=str(tmp_path)) as address:
        code, said = _run(sweep_file(), project, address)
        assert code == 2
        assert "isoflop: node 127.0.0.1 has another isoflop than this machine: install" in said
        code, said = _run(sweep_file(), project, address, RAY_AUTH_TOKEN="1" * 64)
        assert code == 2
        assert f"isoflop: the Ray cluster at {address} refuses the token: set RAY" in said
        nothing = {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
        code, said = _run(sweep_file(), project, address, **nothing)
        assert code == 2
        assert f"isoflop: the Ray cluster at {address} is to be shown a token" in said
