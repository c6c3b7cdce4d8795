"""The MLflow UI on a project, bound to loopback, for one user; `ui_guard` says who is let in."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus
from http.client import HTTPResponse
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text

from analysis.errors import InputError
from orchestrator import ui_guard
from orchestrator.artifacts import DATABASE, artifacts_uri, can_write, copy_inside, keep_inside
from orchestrator.project import Project
from orchestrator.tracking import store_uri
from orchestrator.ui_guard import PASSWORD_VARIABLE, USER_NAME, authorization, can_tell_users

HOST = "127.0.0.1"
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its workers take a gigabyte
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "PYTHONSAFEPATH": "1",  # for the server's own child, which Python would let import from here
}
SERVER = ["--no-serve-artifacts", "--gunicorn-opts"]
"""MLflow's default server adds an Assistant, which runs programs for whoever connects from this
machine. Under Gunicorn there is none; `ui_guard` is the configuration that follows."""
GUNICORN = f"--log-level warning --config {shlex.quote(f'file:{ui_guard.__file__}')}"
PASSWORD_BYTES = 16


def serve(project: Project, port: int, console: Console, *, ask_password: bool = False) -> None:
    """Run the MLflow server until it is interrupted; print its address once it answers.

    Only processes of this user are answered or, with `ask_password` and where the system does not
    say whose a connection is, only requests with a new password, which is printed.

    Raises
    ------
    InputError
        If the project has no MLflow store yet, the port is in use, or the server ends by itself.
    """
    if project.local is None or not (project.local / DATABASE).exists():
        raise InputError(
            f"{project.uri} has no MLflow store of its own: run its sweep first, or look where its "
            "--tracking-uri says"
        )
    _require_free(port)
    for number in (signal.SIGINT, signal.SIGTERM):  # either way the server must not outlive us
        signal.signal(number, signal.default_int_handler)
    password = None
    if ask_password or not can_tell_users():
        password = secrets.token_urlsafe(PASSWORD_BYTES)
    # In a directory of its own: Gunicorn imports from, and reads settings in, where it is started,
    # which may be somebody else's project.
    with tempfile.TemporaryDirectory(prefix="isoflop-ui-") as directory:
        _serve(project, project.local, Path(directory), port, password, console)


def _store(project: Project, root: Path, directory: Path, console: Console) -> str:
    """Return the store to show: the project's own or, where that cannot be written, a copy."""
    if can_write(root):
        if moved := keep_inside(project):
            console.print(moved)
        return store_uri(project)
    copy_inside(root, directory / DATABASE)
    console.print(
        f"{root / DATABASE} cannot be written by this user: you see a copy, and changes that you "
        "make in it are lost when the UI ends"
    )
    return f"sqlite:///{directory / DATABASE}"


def _serve(
    project: Project,
    root: Path,
    directory: Path,
    port: int,
    password: str | None,
    console: Console,
) -> None:
    store = _store(project, root, directory, console)
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", store, "--workers", "1"]
    command += ["--default-artifact-root", artifacts_uri(root), *SERVER, GUNICORN]
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop(PASSWORD_VARIABLE, None)
    if password is not None:
        environment[PASSWORD_VARIABLE] = password
    log = directory / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        with console.status("starting MLflow"):
            _wait_until_healthy(process, port, password)
        if process.poll() is None:
            address = f"http://{HOST}:{port}/#/experiments"
            if experiment := _experiment(project, port, password):
                address += f"/{experiment}/runs"
            where = (f"MLflow for {project.name}: ", (address, "bold"), "  (Ctrl-C ends)")
            console.print(Text.assemble(*where))
            if password is not None:
                console.print(f"user {USER_NAME}, password {password}")
        code = process.wait()
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
    except KeyboardInterrupt:
        return
    finally:
        process.terminate()
        process.wait()
    raise InputError(f"the MLflow server ended with exit code {code}: {' '.join(last)}")


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, password: str | None) -> None:
    while process.poll() is None:
        try:
            with _get("health", port, password, seconds=2):
                return
        except urllib.error.HTTPError as error:
            raise InputError(
                f"what answers on port {port} refuses this user ({error}): choose another --port, "
                "or give --password"
            ) from error
        except OSError:
            time.sleep(0.2)


def _experiment(project: Project, port: int, password: str | None) -> str | None:
    """Return the ID of the project's experiment, so that the address leads to its runs.

    None in a copy under another name, whose database has the experiment of the original.
    """
    name = urllib.parse.quote(project.name)
    path = f"api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    try:
        with _get(path, port, password, seconds=20) as answer:
            return str(json.load(answer)["experiment"]["experiment_id"])
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND:
            return None
        raise


def _get(path: str, port: int, password: str | None, *, seconds: float) -> HTTPResponse:
    headers = {} if password is None else {"Authorization": authorization(password)}
    request = urllib.request.Request(f"http://{HOST}:{port}/{path}", headers=headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return cast(HTTPResponse, direct.open(request, timeout=seconds))


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} on {HOST} cannot be used ({error}): choose another with --port"
            ) from error
