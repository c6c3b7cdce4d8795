"""The processes of a fault test: a Ray cluster of several raylets, drivers, and what is left."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
MARKER = "ISOFLOP_FAULTS"
"""In the environment of whatever a test starts, and of whatever that starts."""


def environment(steps: Path, **more: str) -> dict[str, str]:
    """Of a process whose trainers' steps are counted below `steps`; none of this test run's Ray."""
    foreign = ("RAY_", "TUNE_", "MLFLOW_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    paths = [str(HERE / "counting"), *filter(None, [os.environ.get("PYTHONPATH")])]
    counted = {"PYTHONPATH": os.pathsep.join(paths), "FAULTS_STEPS": str(steps)}
    return {**inherited, **counted, "OMP_NUM_THREADS": "1", **more}


def marked(marker: str) -> list[psutil.Process]:
    """The processes that live with this marker in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if f"{MARKER}={marker}".encode() in environ:
                    found.append(process)
    return found


def name_of(process: psutil.Process) -> str:
    """What a process is, for people; it may have ended since."""
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline()).strip()[-200:]}"
    except psutil.Error:
        return str(process.pid)


def kill_marked(marker: str) -> None:
    """End whatever a test that failed has left."""
    for process in marked(marker):
        with suppress(psutil.Error):
            process.kill()


class Cluster:
    """Several raylets on loopback: a head where the driver is, and nodes where trials run."""

    def __init__(self, steps: Path) -> None:
        self.marker = uuid.uuid4().hex
        # Sockets' paths are short: not below pytest's own directory.
        self._directory = tempfile.mkdtemp(prefix="ray")
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Off, Ray takes 127.0.0.1 for every node's address, and nothing listens beyond it.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with open(f"{self._directory}/log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", HERE / "raylets.py"],
                env=environment(steps, **self.environment, **{MARKER: self.marker})
                | {"RAY_TMPDIR": self._directory},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.address: str = self._said()["address"]
        self.nodes: list[psutil.Process] = []
        """The raylets where trials run."""

    def add(self, cpus: int = 2, gpus: int = 0) -> psutil.Process:
        """One more node, which claims to have so many GPUs."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{cpus} {gpus}\n")
        self._process.stdin.flush()
        self.nodes.append(psutil.Process(self._said()["pid"]))
        return self.nodes[-1]

    def kill(self, raylet: psutil.Process) -> None:
        """End a node as a lost machine ends: the raylet and all its workers."""
        self.nodes.remove(raylet)
        family = [raylet, *raylet.children(recursive=True)]
        for process in family:
            with suppress(psutil.Error):
                process.kill()

    def workers(self) -> list[psutil.Process]:
        """The processes that train, or may."""
        return [p for p in marked(self.marker) if "ImplicitFunc" in "".join(p.cmdline()[:1])]

    def end(self) -> None:
        """Nothing of it is left afterwards."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        kill_marked(self.marker)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _said(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, Path(f"{self._directory}/log").read_text()[-2000:]
        return dict(json.loads(line))


@dataclass
class Driver:
    """`isoflop run` in a process group of its own, as a terminal starts it."""

    process: subprocess.Popen[bytes]
    output: Path
    errors: Path
    since: float = field(default_factory=time.time)

    @staticmethod
    def start(directory: Path, command: list[str], environ: dict[str, str]) -> Driver:
        name = uuid.uuid4().hex[:8]
        output, errors = directory / f"{name}.out", directory / f"{name}.err"
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                command, env=environ, cwd=directory, stdout=out, stderr=err, start_new_session=True
            )
        return Driver(process, output, errors)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        """What it told people."""
        return self.errors.read_text()

    def interrupt(self) -> None:
        """Ctrl-C, which is for the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """SIGTERM to the driver alone, as from a container's or a job's end."""
        self.process.terminate()

    def kill(self) -> None:
        """The driver alone, as the kernel does when memory is short."""
        self.process.kill()
        self.process.wait()

    def end(self, seconds: float = 240) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said}") from None

    def result(self, seconds: float = 240) -> dict[str, Any]:
        """What it found, once it has ended well."""
        assert self.end(seconds) == 0, self.said
        return dict(json.loads(self.output.read_text()))


@dataclass
class Steps:
    """What all processes counted below a directory; read as it grows."""

    directory: Path
    _read: dict[Path, int] = field(default_factory=dict)
    _found: list[tuple[int, float, str, int]] = field(default_factory=list)

    def all(self) -> list[tuple[int, float, str, int]]:
        """Pid, time in s, key and step of each, in order of time; step 0 starts an attempt."""
        for path in self.directory.glob("*.steps"):
            begun = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(begun)
                # A line across two pages may be there in part while it is being written.
                whole = file.read().rpartition(b"\n")[0]
            for line in whole.decode().splitlines():
                at, key, step = line.split()
                self._found.append((int(path.stem), float(at) / 1e9, key, int(step)))
            self._read[path] = begun + len(whole) + bool(whole)
        self._found.sort(key=lambda event: event[1])
        return self._found
