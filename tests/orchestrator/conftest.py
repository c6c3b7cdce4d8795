"""One Ray and one object store for all tests that need them; the command line; storages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.planner import make_plan
from orchestrator.project import Project, create_project
from orchestrator.spec import parse_spec
from orchestrator.storage import Storage, open_storage
from trainers.registry import trainer
from trainers.workspace import Scratch

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from orchestrator.connection import connected

    with connected():
        yield


@pytest.fixture
def isoflop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isoflop", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def s3_server(**environment: str) -> Iterator[str]:
    """A server of the S3 protocol on loopback, as a process of its own; gives its address."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                    break
            assert found, "the server ended by itself"
            drain = threading.Thread(target=process.stderr.read, daemon=True)
            drain.start()  # it logs every request, and would stop when the pipe is full
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def start_s3() -> Callable[..., Iterator[str]]:
    """`s3_server`, for a test that needs one of its own."""
    return s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Address of an S3 server, which the environment names; anybody may do anything there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for address in s3_server():
            patch.setenv("AWS_ENDPOINT_URL", address)
            patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield address


@pytest.fixture
def bucket(s3: str) -> str:
    """URI of a new bucket."""
    from s3fs import S3FileSystem

    name = f"bucket-{uuid.uuid4().hex}"
    S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a project: a directory, then a prefix in a bucket."""
    if request.param == "local":
        return str(tmp_path / "project")
    bucket = request.getfixturevalue("bucket")
    assert bucket.startswith("s3://"), "a parameter of the test hides the fixture `bucket`"
    return f"{bucket}/some/project"


@pytest.fixture
def storage(location: str) -> Storage:
    made = open_storage(location)
    made.make()
    return made


@pytest.fixture
def simulated_project(tmp_path: Path, empty_store: Path) -> Callable[..., Project]:
    """Makes a project of simulated trials, so many of them measured, with an empty MLflow store."""

    def make(*, measured: int = 5, sizes: int = 5, at: str = "project", **spec: object) -> Project:
        project = create_project(tmp_path / at)
        if not (project.local / "mlflow.db").exists():
            shutil.copy(empty_store, project.local / "mlflow.db")
        defaults = {"name": "s", "trainer": "simulated", "budgets": [1e10], "sizes": sizes}
        plan = make_plan(parse_spec({**defaults, **spec}, source=Path("s.toml")))
        project.save_plan(plan, extend=True)
        for trial in plan.trials[:measured]:
            *_, measurement = trainer("simulated").train(trial, Scratch(Path("nowhere")))
            project.ledger.write(trial, measurement)
        return project

    return make
