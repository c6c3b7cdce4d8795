"""What a sweep writes to goes away and comes back: the MLflow server, the disk of the project."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.conftest import MakeSweep, Record
from tests.faults.processes import MARKER, Cluster
from tests.faults.sweeps import Sweep
from tests.waiting import free_ports, wait

pytestmark = pytest.mark.slow

DISK = "16m"


@contextmanager
def _server(sweep: Sweep, database: Path, port: int) -> Iterator[subprocess.Popen]:
    """A real MLflow server, in a process group of its own; it takes its time to start."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.parent / "served")]
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(
        command,
        env={**os.environ, **off, MARKER: f"server of {sweep.marker}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
        return True
    return False


def test_an_mlflow_server_that_is_killed_holds_nothing_up_and_is_caught_up_with(
    cluster: Cluster,
    make_sweep: MakeSweep,
    record: Record,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = make_sweep(cluster, database=False, seconds=2)
    database = sweep.directory / "mlflow.db"
    database.write_bytes(empty_store.read_bytes())
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    with _server(sweep, database, port) as server:
        wait(lambda: _answers(port), 120, "for MLflow")
        driver = sweep.start("--tracking-uri", uri, as_json=False)
        sweep.wait_for_rows(4, driver)
        os.killpg(server.pid, signal.SIGKILL)
        killed = time.time()
    sweep.wait_for_rows(10, driver)
    assert not _answers(port)
    seconds = sweep.recovered(killed)
    with _server(sweep, database, port):
        assert driver.end(180) == 0
        wait(lambda: _answers(port), 120, "for MLflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        if "isoflop sync" in " ".join(driver.output.read_text().split()):
            sweep.sync()  # the server came too late
        sweep.check()
    record(sweep, "MLflow server killed", seconds=seconds)


@contextmanager
def _small_disk(directory: Path) -> Iterator[int]:
    """A file system of a few MB at `directory`, for those who join the process that it yields."""
    script = f'mount -t tmpfs -o size={DISK} none "$0" && echo mounted && exec cat'
    command = ["unshare", "-Urm", "sh", "-c", script, str(directory)]
    try:
        holder = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare to mount a small disk with")
    with holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != "mounted\n":
            assert holder.stderr is not None
            pytest.skip(f"no small disk can be mounted here: {holder.stderr.read().strip()}")
        try:
            yield holder.pid
        finally:
            holder.kill()


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_stops_nothing_that_is_measured_from_being_written_later(
    make_sweep: MakeSweep, record: Record
) -> None:
    sweep = make_sweep(None, seconds=0.7, database=False)
    place = sweep.directory / "project"
    place.mkdir()
    with _small_disk(place) as holder:
        sweep.seen_at = Path(f"/proc/{holder}/root{place}")
        sweep.inside = ("nsenter", "-t", str(holder), "-U", "-m", "--preserve-credentials")
        driver = sweep.start()
        sweep.wait_for_rows(4, driver)
        _fill(sweep.seen_at / "filler")
        wait(lambda: "No space left" in driver.said, what="for the driver to tell")
        time.sleep(3)
        stuck = len(sweep.rows())
        (sweep.seen_at / "filler").unlink()
        freed = time.time()
        sweep.wait_for_rows(stuck + 1, driver)
        seconds = time.time() - freed
        found = driver.result()
        assert (found["complete"], found["trained"]) == (30, 30)
        assert sweep.project.attempts.all() == []
        sweep.check()
        assert sweep.repeated() == 0
        record(sweep, "disk full", seconds=seconds)
