"""What doctor asks of a machine, with each thing that can be wrong made wrong."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import checks
from orchestrator.checks import Check
from orchestrator.doctor import clock_of
from orchestrator.storage import LocalStorage, Storage
from orchestrator.tracking import Store
from tests.strangers import STRANGER, needs_stranger
from tests.waiting import free_ports, wait


def test_a_compiler_is_missed_where_there_are_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    check = checks.compiler(needed=True)
    assert check.status == "warning"
    assert "no C compiler (gcc or clang) on PATH" in check.value
    assert "apt install gcc python3-dev" in check.remedy
    assert checks.compiler(needed=False).status == "ok"
    monkeypatch.setenv("CC", "icx")
    assert "no C compiler (CC=icx)" in checks.compiler(needed=True).value
    (tmp_path / "icx").write_text("#!/bin/sh\n")
    (tmp_path / "icx").chmod(0o755)
    assert "no C compiler" not in checks.compiler(needed=True).value


def test_headers_of_python_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a distribution's Python is installed without its -dev package."""
    monkeypatch.setattr(checks.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    check = checks.compiler(needed=True)
    assert check.status == "warning"
    assert f"no {tmp_path}/Python.h" in check.value


@pytest.mark.parametrize(("free", "status"), [(5e8, "failure"), (5e9, "warning"), (5e10, "ok")])
def test_a_full_disk(free: int, status: str) -> None:
    check = checks.disk(lambda path: int(free))
    assert check.status == status
    assert f"{free / 1e9:.1f} GB free" in check.value


@pytest.mark.parametrize(
    ("mode", "status"), [(0o600, "ok"), (0o644, "warning"), (0o640, "warning")]
)
def test_a_token_that_others_can_read(
    tmp_path: Path, mode: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text("0" * 64)
    path.chmod(mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    check = checks.token()
    assert check.status == status
    assert str(path) in check.value
    assert (f"chmod 600 {path}" in check.remedy) == (status != "ok")
    assert "0" * 64 not in str(check)


def test_a_token_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    check = checks.token()
    assert check.status == "failure"
    assert "RAY_AUTH_TOKEN_PATH" in check.remedy
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert checks.token() == Check.ok("token", "in RAY_AUTH_TOKEN")


def test_a_directory_that_is_too_long_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("job-" + "9" * 90)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    check = checks.sockets()
    assert check.status == "failure"
    assert str(long) in check.value
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(long))
    assert checks.sockets().status == "ok"  # a shorter one is used


def test_a_storage_is_proved_and_left_as_it_was(storage: Storage) -> None:
    proved, clock = checks.storage_checks(storage)
    assert (proved.status, clock.status) == ("ok", "ok")
    assert storage.names("") == []
    if storage.local is not None:
        assert list(storage.local.iterdir()) == []


def test_a_directory_that_was_not_there_is_not_there_afterwards(tmp_path: Path) -> None:
    proved, _ = checks.storage_checks(LocalStorage(tmp_path / "a" / "b"))
    assert proved.status == "ok"
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
import os, sys
from pathlib import Path
from orchestrator.checks import storage_checks
from orchestrator.storage import LocalStorage
directory, stranger = Path(sys.argv[1]), int(sys.argv[2])
os.setgroups([])
os.setgid(stranger)
os.setuid(stranger)
(check,) = storage_checks(LocalStorage(directory))
print(check.status, check.value, check.remedy, sep="|")
"""
"""Imports first: a stranger may not read where the modules lie."""


@needs_stranger
def test_a_project_that_belongs_to_somebody_else() -> None:
    """Its directory may be read by everybody and written by its owner alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as project:
        Path(project).chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, project, str(STRANGER)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert os.listdir(project) == []
    status, value, remedy = done.stdout.strip().split("|")
    assert status == "failure"
    assert "no permission" in value
    assert "may write to" in remedy


@pytest.mark.parametrize(
    ("skew", "on_a_disk", "on_s3"),
    [(0.0, "ok", "ok"), (60.0, "warning", "warning"), (-3600.0, "warning", "failure")],
)
def test_a_clock_that_differs_from_the_storages(
    storage: Storage, skew: float, on_a_disk: str, on_s3: str
) -> None:
    """This machine's clock is wrong by `skew`; S3 itself refuses to answer one that is far off."""
    _, clock = checks.storage_checks(storage, lambda: time.time() - skew)
    assert clock.name == "clock of the storage"
    assert clock.status == (on_s3 if storage.local is None else on_a_disk)
    assert ("chrony" in clock.remedy) == (clock.status != "ok")


def test_what_an_answer_takes_is_no_difference_of_clocks() -> None:
    times = iter([100.0, 160.0])  # a minute passes while the node starts a process
    slow = clock_of(lambda: 130.0, lambda: next(times))
    assert slow == Check.ok("clock", "within 10 s of this machine's")
    times = iter([100.0, 101.0])
    wrong = clock_of(lambda: 130.0, lambda: next(times))
    assert wrong is not None
    assert (wrong.status, wrong.value[:22]) == ("warning", "29 s ahead of this mac")
    assert clock_of(lambda: None) is None


def _store(uri: str) -> Store:
    return Store(uri=uri, artifacts=None, own=False)


def test_an_mlflow_that_is_down_or_is_something_else(s3: str) -> None:
    (port,) = free_ports(1)
    check = checks.mlflow(_store(f"http://me:secret@127.0.0.1:{port}"))
    assert check.status == "warning"
    assert "does not answer" in check.value
    assert "secret" not in str(check)
    assert checks.mlflow(_store(s3)).status == "warning"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    with subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


@pytest.mark.slow
def test_an_mlflow_server_that_answers_is_named_with_its_version(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(lambda: checks.mlflow(_store(server)).status == "ok", 300)
    ours = checks.version("mlflow")
    assert checks.mlflow(_store(server)).value == f"{server}, MLflow {ours}"
    monkeypatch.setattr(checks, "version", lambda name: "2.22.0")
    older = checks.mlflow(_store(server))
    assert older.status == "warning"
    assert f"MLflow {ours}, this is 2.22.0" in older.value
