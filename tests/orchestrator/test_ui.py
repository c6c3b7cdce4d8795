"""`isoflop ui` as a real process: whom it answers on loopback, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from orchestrator.project import Project
from orchestrator.sync import sync
from orchestrator.tracking import store_of, store_uri
from orchestrator.ui_guard import USER_NAME, authorization
from tests.strangers import give, needs_stranger, run
from tests.waiting import free_ports, wait

pytestmark = pytest.mark.slow

PLANTED = "open({!r}, 'w').write('ran')\n"

ATTACK = """
import json, os, sys, urllib.error, urllib.request
address, own, victim = sys.argv[1:]

def ask(path, data=None, kind="application/json"):
    data = json.dumps(data).encode() if isinstance(data, dict) else data
    headers = {"Content-Type": kind}
    request = urllib.request.Request(f"{address}/{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""

codes = {}
codes["assistant"], _ = ask("ajax-api/3.0/mlflow/assistant/config")
codes["runs"], _ = ask("api/2.0/mlflow/runs/search", {"experiment_ids": ["1"], "max_results": 10})
codes["create"], made = ask(
    "api/2.0/mlflow/experiments/create", {"name": "theirs", "artifact_location": f"file://{own}"}
)
stolen = run = ""
if codes["create"] == 200:
    experiment = json.loads(made)["experiment_id"]
    _, made = ask("api/2.0/mlflow/runs/create", {"experiment_id": experiment})
    run = json.loads(made)["run"]["info"]["run_id"]
    os.mkdir(f"{own}/{run}")
    os.symlink(victim, f"{own}/{run}/artifacts")
codes["read"], stolen = ask(f"get-artifact?run_uuid={run}&path=key")
codes["write"], _ = ask(
    f"ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=planted", b"x", "application/x"
)
print(json.dumps({"codes": codes, "stolen": stolen}))
"""
"""Lets the server read and write another user's files, by artifacts that lie where a link leads."""


@contextmanager
def _shown(project: Project, directory: Path, *options: str) -> Iterator[tuple[str, list[str]]]:
    """The UI's address and what it printed; started in a directory where somebody planted code."""
    directory.mkdir()
    code = PLANTED.format(str(directory / "ran"))
    for name in ("gunicorn.conf.py", "gunicorn.py", "mlflow.py", "flask.py", "sitecustomize.py"):
        (directory / name).write_text(code)
    port = free_ports(1)[0]
    source = f"import sys; sys.path[:0] = {sys.path!r}; from orchestrator.cli import main; main()"
    command = [sys.executable, "-P", "-c", source, "ui", str(project.local), "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, env=environment, cwd=directory, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip()]
        if options:
            lines.append(process.stdout.readline().strip())
        try:
            yield f"http://127.0.0.1:{port}", lines
        finally:
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest == ""
    with socket.socket() as probe:  # the server is gone, not orphaned
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert not (directory / "ran").exists()


@pytest.fixture
def project(simulated_project: Callable[..., Project]) -> Project:
    project = simulated_project(measured=3, at="shown")
    sync(project, store_of(project, store_uri(project)))
    return project


def _code(address: str, path: str, data: bytes | None = None, **options: Any) -> int:
    request = urllib.request.Request(f"{address}/{path}", data=data, **options)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_ui_serves_the_projects_runs_and_ends_on_interrupt(
    project: Project, tmp_path: Path
) -> None:
    with _shown(project, tmp_path / "here") as (address, lines), ExitStack() as idle:
        for _ in range(20):
            idle.enter_context(socket.create_connection(("127.0.0.1", urlsplit(address).port)))
        runs = f"{address}/#/experiments/1/runs"
        assert lines == [f"MLflow for shown: {runs}  (Ctrl-C ends)"]
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/runs/search",
            data=json.dumps({"experiment_ids": ["1"], "max_results": 10}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["runs"]) == 1 + 3
        assert _code(address, "") == 200
        # What runs programs and stores files for others is not there for ourselves either, since
        # a page in a browser may ask in our name.
        for path in ("config", "sessions", "message", "providers", "status"):
            assert _code(address, f"ajax-api/3.0/mlflow/assistant/{path}") == 404
            assert _code(address, f"ajax-api/3.0/mlflow/assistant/{path}", b"{}") in (404, 405)
        upload = "api/2.0/mlflow-artifacts/artifacts/x"
        assert _code(address, upload, b"x", method="PUT") == 503


def _attack(address: str) -> tuple[dict[str, int], str, bool]:
    """Statuses of a stranger's requests, what they read, and whether they wrote."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        victim = Path(directory, "private")
        victim.mkdir(mode=0o700)
        (victim / "key").write_text("secret")
        outcome = run(ATTACK, address, give(Path(directory, "theirs")), victim)
        return outcome["codes"], outcome["stolen"], (victim / "planted").exists()


@needs_stranger
def test_another_user_of_the_machine_is_refused(project: Project, tmp_path: Path) -> None:
    with _shown(project, tmp_path / "here") as (address, _):
        codes, stolen, planted = _attack(address)
    assert set(codes.values()) == {403}
    assert (stolen, planted) == ("", False)


@needs_stranger
def test_a_password_refuses_others_and_is_in_no_list_of_processes(
    project: Project, tmp_path: Path
) -> None:
    with _shown(project, tmp_path / "here", "--password") as (address, lines):
        name, password = lines[1].removeprefix("user ").split(", password ")
        assert (name, len(password)) == (USER_NAME, 22)
        codes, stolen, planted = _attack(address)
        assert set(codes.values()) == {401}
        assert (stolen, planted) == ("", False)
        assert _code(address, "") == 401  # from ourselves, too
        headers = {"Authorization": authorization(password)}
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        commands = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        assert any(address.rpartition(":")[2] in command for command in commands)
        assert not [command for command in commands if password in command]


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None,
    reason="needs setpriv, since root may write everywhere",
)
def test_a_project_that_cannot_be_written_is_shown_from_a_copy(
    project: Project, tmp_path: Path
) -> None:
    """Its database has the places of the project that it was copied from."""
    copy, port = tmp_path / "copies/shown", free_ports(1)[0]
    shutil.copytree(project.local, copy)
    before = (copy / "mlflow.db").read_bytes()
    (copy / "mlflow.db").chmod(0o444)
    copy.chmod(0o555)
    powerless = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"]
    command = [*(powerless if os.geteuid() == 0 else []), sys.executable, "-m", "orchestrator"]
    with subprocess.Popen(
        [*command, "ui", str(copy), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "500"},
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            first, second = process.stdout.readline(), process.stdout.readline()
            assert f"{copy}/mlflow.db cannot be written by this user: you see a copy" in first
            assert "Ctrl-C" in second
            identity = second.partition("experiments/")[2].partition("/")[0]
            address = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id="
            with urllib.request.urlopen(f"{address}{identity}", timeout=60) as answer:
                experiment = json.load(answer)["experiment"]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            copy.chmod(0o755)
    assert experiment["artifact_location"].startswith(f"{copy.as_uri()}/mlartifacts")
    assert (copy / "mlflow.db").read_bytes() == before


def test_the_server_that_the_documents_tell_to_run_has_no_assistant(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    lines = (Path(__file__).parents[2] / "docs/cluster.md").read_text().splitlines()
    words = shlex.split(next(line for line in lines if line.strip().startswith("mlflow server")))
    port = free_ports(1)[0]
    artifacts = tmp_path / "artifacts"
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--backend-store-uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "--default-artifact-root": artifacts.as_uri(),
    }
    for option, value in here.items():
        words[words.index(option) + 1] = value
    setting = next(line for line in lines if line.strip().startswith("export MLFLOW_SERVER_ENABLE"))
    name, _, value = setting.split()[1].partition("=")
    environment = {**os.environ, name: value, "MLFLOW_SERVER_ALLOWED_HOSTS": f"tracking:{port}"}
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-P", "-m", *words],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait(lambda: process.poll() is not None or _is_healthy(address), 300)
            assert process.poll() is None
            host = {"Host": f"tracking:{port}"}
            path = "ajax-api/3.0/mlflow/assistant/config"
            assert _code(address, path, headers=host) == 404
            assert _code(address, "", headers={"Host": f"elsewhere:{port}"}) == 403
            assert _code(address, "", headers=host) == 200
        finally:
            process.terminate()
            process.wait()
    assert MlflowClient(here["--backend-store-uri"]).get_experiment("0").artifact_location == (
        f"{artifacts.as_uri()}/0"
    )


def _is_healthy(address: str) -> bool:
    try:
        return _code(address, "health") == 200
    except urllib.error.URLError:
        return False
