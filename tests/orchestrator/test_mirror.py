"""The process that writes MLflow beside the training: real processes, servers and SIGKILL."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from orchestrator.mirror import Mirror
from orchestrator.project import Project
from orchestrator.runs import SWEEP_TAG, TRIAL_TAG
from orchestrator.storage import open_storage
from orchestrator.sync import sync
from orchestrator.tracking import Tracker, store_of
from tests.waiting import wait
from trainers.registry import trainer
from trainers.workspace import Scratch

pytestmark = pytest.mark.slow

MakeProject = Callable[..., Project]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@contextmanager
def _mirror(project: Project, uri: str | None = None) -> Iterator[Mirror]:
    with Mirror(project, project.plans()[0].name, tracking_uri=uri) as made:
        made.start()
        yield made


def _measure(project: Project, count: int) -> list:
    """Measure so many more trials; their names."""
    known = project.ledger.ids()
    fresh = [p for p in project.plans()[0].planned if p.id not in known][:count]
    for planned in fresh:
        *_, measurement = trainer("simulated").train(planned.trial, Scratch(Path("nowhere")))
        project.ledger.write(planned.trial, measurement)
    return [planned.id for planned in fresh]


def _equal(project: Project, uri: str | None = None) -> bool:
    """Whether MLflow holds the ledger, each run once, and no half of one."""
    done = sync(project, store_of(project, uri))
    assert (done.written, done.half_written, done.duplicates) == (0, 0, 0)
    return done.differences == [] and done.unknown == []


def _writer(mirror: Mirror) -> psutil.Process:
    wait(lambda: "process" in mirror._said)
    return psutil.Process(mirror._said["process"])


def test_what_was_measured_before_and_during_a_sweep_is_written(
    simulated_project: MakeProject, tmp_path: Path
) -> None:
    project = simulated_project(measured=2)
    page = tmp_path / "report.html"
    page.write_text("found")
    with _mirror(project) as mirror:
        for name in _measure(project, 2):
            mirror.finished(name)
        assert mirror.catch_up(60)
        assert (mirror.behind, mirror.error, mirror.shortfall) == (0, None, None)
        assert mirror.conclude({"exponent": 0.5}, [page], ended=True)
        writer = _writer(mirror)
        assert writer.nice() > psutil.Process().nice()
    assert not writer.is_running()
    assert _equal(project)
    (parent,) = Tracker(project, store_of(project)).search(SWEEP_TAG)
    assert parent.data.metrics == {"exponent": 0.5}
    assert parent.info.status == "FINISHED"
    assert (project.local / "mlartifacts" / parent.info.run_id / "artifacts/report.html").exists()


def test_files_that_cannot_be_attached_are_told_and_hold_nobody_up(
    simulated_project: MakeProject, tmp_path: Path
) -> None:
    project = simulated_project(measured=1)
    with _mirror(project) as mirror:
        assert mirror.conclude({}, [tmp_path / "missing.html"], ended=True)
        assert "run it again" in str(mirror.shortfall)
    assert _equal(project)


def test_a_project_without_a_store_is_left_alone() -> None:
    project = Project(open_storage("s3://bucket/project"))
    plan = type("Plan", (), {"name": "s"})()
    with Mirror(project, plan.name) as mirror:
        mirror.finished(("abc", 1))
        assert mirror.catch_up(1)
        assert mirror.conclude({}, [], ended=True)
    assert mirror.store is None
    assert (mirror.behind, mirror.error, mirror.shortfall) == (0, None, None)


def test_a_store_that_is_no_database_is_told_and_does_not_stop_anything(
    simulated_project: MakeProject,
) -> None:
    project = simulated_project(measured=2)
    (project.local / "mlflow.db").write_text("no database")
    with _mirror(project) as mirror:
        wait(lambda: mirror.error is not None)
        assert not mirror.catch_up(0.5)
        assert "is no SQLite database" in str(mirror.error)
        assert f"isoflop sync {project.uri}" in str(mirror.shortfall)


def test_a_writer_killed_in_the_middle_is_replaced(simulated_project: MakeProject) -> None:
    project = simulated_project(measured=60, sizes=7, seeds=list(range(12)))
    with _mirror(project) as mirror:
        killed = []
        for wanted in (5, 15):
            wait(lambda n=wanted: mirror._said.get("written", 0) >= n)
            writer = _writer(mirror)
            writer.kill()
            killed.append(writer.pid)
            wait(lambda: mirror._said.get("process") not in killed)
        for name in _measure(project, 10):
            mirror.finished(name)
        assert mirror.catch_up(60)
        assert (mirror.behind, mirror.shortfall) == (0, None)
    assert _equal(project)
    assert len(Tracker(project, store_of(project)).search(TRIAL_TAG)) == 70


def test_a_writer_that_always_dies_is_given_up(
    simulated_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = simulated_project(measured=1)
    monkeypatch.setattr("orchestrator.mirror.BOOT", "raise ImportError('spoilt')")
    monkeypatch.setattr("orchestrator.mirror.RESTARTS", 1)
    with _mirror(project) as mirror:
        mirror.finished(project.plans()[0].planned[0].id)
        assert not mirror.catch_up(60)
        assert "ImportError: spoilt" in str(mirror.error)
        assert "isoflop sync" in str(mirror.shortfall)


DRIVER = """
import sys, time
from orchestrator.mirror import Mirror
from orchestrator.project import open_project

project = open_project(sys.argv[1])
with Mirror(project, project.plans()[0].name) as mirror:
    mirror.start()
    while not mirror._said.get("written"):
        time.sleep(0.01)
    print(mirror._said["process"], flush=True)
    time.sleep(600)
"""


def test_the_writer_ends_when_its_driver_dies_and_takes_no_foreign_packages(
    simulated_project: MakeProject, tmp_path: Path
) -> None:
    project = simulated_project(measured=70, sizes=7, seeds=list(range(12)))
    for package in ("orchestrator", "analysis", "mlflow"):  # in the user's own directory
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('not ours')")
    command = [sys.executable, "-P", "-c", DRIVER, project.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as driver:
        assert driver.stdout is not None
        writer = psutil.Process(int(driver.stdout.readline()))
        driver.kill()
        writer.wait(20)
    before = len(Tracker(project, store_of(project)).search(TRIAL_TAG))
    done = sync(project, store_of(project))
    assert done.half_written == 0  # it finished its run
    assert (before + done.written, done.differences) == (70, [])
    assert done.written > 0


def test_a_server_that_never_answers_holds_nobody_up(simulated_project: MakeProject) -> None:
    project = simulated_project(measured=1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with _mirror(project, uri) as mirror:
            names = _measure(project, 4)
            started = time.monotonic()
            for name in names * 10_000:  # far more than a pipe holds
                mirror.finished(name)
            assert time.monotonic() - started < 10  # it does not wait for the pipe
            assert not mirror.catch_up(1)
            wait(lambda: mirror.error is not None)
            assert "isoflop sync" in str(mirror.shortfall)
            closing = time.monotonic()
        assert time.monotonic() - closing < 25
    assert sync(project, store_of(project)).written == 5
