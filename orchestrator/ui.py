"""The MLflow UI on a project, bound to loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.text import Text

from analysis.errors import InputError
from orchestrator.artifacts import artifacts_uri, keep_inside
from orchestrator.project import Project
from orchestrator.tracking import store_uri

HOST = "127.0.0.1"
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its workers take a gigabyte
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}


def serve(project: Project, port: int, console: Console) -> None:
    """Run the MLflow server until it is interrupted; print its address once it answers.

    Raises
    ------
    InputError
        If the project has no MLflow store yet, the port is in use, or the server ends by itself.
    """
    if project.local is None or not (project.local / "mlflow.db").exists():
        raise InputError(
            f"{project.uri} has no MLflow store of its own: run its sweep first, or look where its "
            "--tracking-uri says"
        )
    if moved := keep_inside(project):
        console.print(moved)
    _require_free(port)
    for number in (signal.SIGINT, signal.SIGTERM):  # either way the server must not outlive us
        signal.signal(number, signal.default_int_handler)
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", store_uri(project), "--workers", "1"]
    command += ["--default-artifact-root", artifacts_uri(project.local)]
    with tempfile.NamedTemporaryFile(prefix="isoflop-ui-", suffix=".log") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            with console.status("starting MLflow"):
                _wait_until_healthy(process, port)
            if process.poll() is None:
                address = f"http://{HOST}:{port}/#/experiments/{_experiment(project, port)}/runs"
                where = (f"MLflow for {project.name}: ", (address, "bold"), "  (Ctrl-C ends)")
                console.print(Text.assemble(*where))
            code = process.wait()
            last = Path(log.name).read_text(errors="replace").strip().splitlines()[-1:]
        except KeyboardInterrupt:
            return
        finally:
            process.terminate()
            process.wait()
        raise InputError(f"the MLflow server ended with exit code {code}: {' '.join(last)}")


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)


def _experiment(project: Project, port: int) -> str:
    """Id of the project's experiment, so that the address leads to its runs."""
    name = urllib.parse.quote(project.name)
    path = f"api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    with urllib.request.urlopen(f"http://{HOST}:{port}/{path}", timeout=20) as answer:
        return str(json.load(answer)["experiment"]["experiment_id"])


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} on {HOST} cannot be used ({error}): choose another with --port"
            ) from error
