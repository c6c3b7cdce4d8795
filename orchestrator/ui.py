"""The MLflow UI on a project, bound to loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from rich.console import Console

from analysis.errors import InputError
from orchestrator.project import Project
from orchestrator.tracking import artifacts_uri, store_uri

HOST = "127.0.0.1"


def serve(project: Project, port: int, console: Console) -> None:
    """Run the MLflow server until it is interrupted.

    Raises
    ------
    InputError
        If the project has no MLflow store yet or the port is in use.
    """
    if not (project.path / "mlflow.db").exists():
        raise InputError(f"{project.path} has no MLflow store yet: run its sweep first")
    _require_free(port)
    console.print(f"MLflow for {project.path.name}: [bold]http://{HOST}:{port}[/]  (Ctrl-C ends)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", store_uri(project), "--workers", "1"]
    command += ["--default-artifact-root", artifacts_uri(project)]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its workers take a gigabyte
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return
    if code:
        raise InputError(f"the MLflow server ended with exit code {code}")


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} on {HOST} cannot be used ({error}): choose another with --port"
            ) from error
