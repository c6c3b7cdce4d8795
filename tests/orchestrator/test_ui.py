"""`isoflop ui` as a real process: it answers on loopback, says where, and ends on Ctrl-C."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import pytest

from orchestrator.project import Project
from orchestrator.sync import sync
from orchestrator.tracking import store_of, store_uri
from tests.waiting import free_ports

pytestmark = pytest.mark.slow


def test_the_ui_serves_the_projects_runs_and_ends_on_interrupt(
    simulated_project: Callable[..., Project],
) -> None:
    project = simulated_project(measured=3, at="shown")
    sync(project, store_of(project, store_uri(project)))
    port = free_ports(1)[0]
    code = "from orchestrator.cli import main; main()"
    command = [sys.executable, "-c", code, "ui", str(project.local), "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        runs = f"{address}/#/experiments/1/runs"
        assert line.strip() == f"MLflow for shown: {runs}  (Ctrl-C ends)"
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/runs/search",
            data=json.dumps({"experiment_ids": ["1"], "max_results": 10}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert len(json.load(answer)["runs"]) == 1 + 3
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert rest == ""
    with socket.socket() as probe:  # the server is gone, not orphaned
        assert probe.connect_ex(("127.0.0.1", port)) != 0
