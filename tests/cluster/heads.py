"""A real Ray head on loopback, with its dashboard and token authentication, for tests of jobs."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from cluster.dashboard import Token, connect
from cluster.submit import Job, submit
from orchestrator.proof import rooms
from tests.waiting import free_ports, wait

BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head of the tests' own."""

    url: str
    token: str

    def isoflop(self, *arguments: object, **changes: str) -> subprocess.Popen[str]:
        """The command line, in a process of its own that is where `PWD` says."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_TOKEN": self.token,
            **changes,
        }
        return subprocess.Popen(
            [BIN / "isoflop", "submit", *map(str, arguments), "--address", self.url],
            env=environment,
            cwd=changes.get("PWD"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **changes: str) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        process = self.isoflop(*arguments, **changes)
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err

    def submit(self, code: str, *arguments: str, directory: Path | None = None) -> str:
        """Send off a job that runs `code`; its id."""
        client = connect(self.url, Token(value=self.token, source="the tests"))
        command = ("python", "-c", code, *arguments)
        return submit(
            client, Job(name="test", command=command, packages=rooms(), directory=directory)
        )

    def status(self, job: str) -> str:
        client = connect(self.url, Token(value=self.token, source="the tests"))
        return client.get_job_info(job).status.name


@contextmanager
def running_head(directory: Path, **variables: str) -> Iterator[Head]:
    """A Ray whose files are below `directory`, a short path, started with these variables, too."""
    token = secrets.token_hex(16)
    port, dashboard, client, agent, metrics = free_ports(5)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Off, Ray takes 127.0.0.1 for the node's address, and nothing listens beyond it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **variables,
    }
    command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=80000000"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={directory}/ray"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--metrics-export-port={metrics}"]
    with open(f"{directory}/log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    made = Head(url=f"http://127.0.0.1:{dashboard}", token=token)
    try:
        wait(lambda: _answers(made), 180, f"for Ray, which says why not in {directory}/log")
        yield made
    finally:
        _stop(process)


def _answers(head: Head) -> bool:
    headers = {"Authorization": f"Bearer {head.token}"}
    try:
        return requests.get(f"{head.url}/api/version", headers=headers, timeout=5).ok
    except requests.ConnectionError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a Ray head and all that it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for one in alive:
        one.kill()
