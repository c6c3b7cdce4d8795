"""Submission to a real Ray head on loopback, with its dashboard and token authentication."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis.errors import InputError
from cluster.dashboard import Token, hosts
from cluster.submit import Job, _Log, submit
from orchestrator.proof import ROOMS
from tests.cluster.heads import Head, running_head
from tests.waiting import wait


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Sockets' paths are short: not below pytest's own directory.
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory,
        running_head(Path(directory)) as made,
    ):
        yield made


class _Breaking:
    """A client whose connection breaks in the middle of the log, which then starts afresh."""

    def __init__(self) -> None:
        self.tries = iter([["one\n", "tw"], ["one\ntwo\n", "three\n"], ["one\ntwo\nthree\n"]])

    async def tail_job_logs(self, job_id: str):
        for chunk in next(self.tries):
            yield chunk


def test_a_log_is_written_once_however_often_the_connection_breaks() -> None:
    written: list[str] = []
    client = _Breaking()
    log = _Log(written.append)
    for _ in range(3):
        # It has of a client what the log needs.
        asyncio.run(log.tail(client, "job"))  # type: ignore[arg-type] # all that a log needs of one
    assert "".join(written) == "one\ntwo\nthree\n"


# On a cluster.

PROBE = """
import json, os, sys
import analysis, cluster, orchestrator, trainers
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")

@ray.remote
def seen():
    import analysis, cluster, orchestrator, trainers
    return os.getcwd(), [m.__file__ for m in (analysis, cluster, orchestrator, trainers)]

modules = [m.__file__ for m in (analysis, cluster, orchestrator, trainers)]
told = {"driver": [os.getcwd(), modules], "worker": ray.get(seen.remote())}
told["user"] = sorted(os.listdir("user"))
print("TOLD", json.dumps(told))
sys.exit(3)
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory of a user who has modules of our names."""
    directory = tmp_path / "mine"
    (directory / "cluster").mkdir(parents=True)
    for name in ("cluster/__init__", "analysis", "trainers", "orchestrator"):
        (directory / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    (directory / ".gitignore").write_text("secret.txt\n")
    (directory / "secret.txt").write_text("mine")
    return directory


@pytest.mark.slow
def test_our_packages_win_in_driver_and_workers(head: Head, hostile: Path) -> None:
    job = head.submit(PROBE, directory=hostile)
    code, out, err = head.run("--follow", job, PWD=str(hostile))
    assert code == 3
    assert f"job {job} failed with exit code 3" in err
    (line,) = [line for line in out.splitlines() if line.startswith("TOLD ")]
    told = json.loads(line.removeprefix("TOLD "))
    for where in ("driver", "worker"):
        root, modules = told[where]
        assert modules == [f"{root}/{room}/__init__.py" for room in sorted(ROOMS)]
        assert "working_dir_files" in root
    assert "analysis.py" in told["user"]
    assert "secret.txt" not in told["user"]


@pytest.mark.slow
def test_a_sweep_is_run_from_a_hostile_directory(
    head: Head, hostile: Path, tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    sweep = shutil.copy(sweep_file(budgets="[1e16]"), hostile)
    project = tmp_path / "project"
    code, out, err = head.run(
        *(sweep, "--project", project, "--working-dir", hostile, "--no-wait"),
        PWD=str(hostile),
        RAY_ADDRESS="http://127.0.0.1:9",  # another cluster, which must not win over --address
    )
    # The two files lie in the same directory, which is sent as it is, too.
    assert code == 0
    assert re.fullmatch(
        r"isoflop: sending isoflop itself and 6 files of yours, [\d,]+ bytes "
        r"\(the largest is files/sweep\.toml, \d+ bytes\)\n",
        err,
    )
    job = out.strip()
    assert job.startswith("isoflop-test-")
    code, out, err = head.run("--follow", job)
    assert code == 0, out + err
    assert len(list((project / "ledger").glob("*.parquet"))) == 5


@pytest.mark.slow
def test_the_exit_code_is_the_jobs(
    head: Head, tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = head.run(sweep_file(), "--project", tmp_path / "file")
    assert code == 2
    assert "isoflop: " in out  # the sentence of the run on the cluster
    assert "failed with exit code 2" in err


@pytest.mark.slow
def test_a_directory_too_large_to_travel_is_refused(
    head: Head, tmp_path: Path, sweep_file: Callable[..., Path]
) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large/weights").write_bytes(os.urandom(105 << 20))
    code, out, err = head.run(sweep_file(), "--project", "/p", "--working-dir", tmp_path / "large")
    assert (code, out, err.count("\n")) == (2, "", 2)
    assert "2 files of yours, 110,1" in err
    assert "100 MiB" in err
    assert ".gitignore" in err


SLEEPER = """
import sys, time
from pathlib import Path
print("asleep", flush=True)
try:
    time.sleep(300)
except KeyboardInterrupt:
    Path(sys.argv[1]).write_text("checkpoint")
    sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_job_running_and_cancel_lets_it_finish(head: Head, tmp_path: Path) -> None:
    job = head.submit(SLEEPER, str(tmp_path / "kept"))
    following = head.isoflop("--follow", job)
    assert following.stdout is not None
    while "asleep" not in (line := following.stdout.readline()):
        assert line
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=30)
    assert following.returncode == 130
    assert f"job {job} goes on" in err
    assert f"isoflop submit --cancel {job} --address {head.url}" in err
    assert err.count("\n") == 1
    assert head.status(job) == "RUNNING"

    code, _, err = head.run("--cancel", job)
    assert (code, err) == (0, f"isoflop: job {job} was interrupted\n")
    assert (tmp_path / "kept").read_text() == "checkpoint"
    assert head.status(job) == "STOPPED"
    assert head.run("--follow", job)[0] == 130
    assert "had ended already" in head.run("--cancel", job)[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (("--follow", "none"), {}, "there is no job none on this cluster"),
        (("--cancel", "none"), {}, "there is no job none on this cluster"),
        (("--follow", "x"), {"RAY_AUTH_TOKEN": "wrong"}, "refuses the token in RAY_AUTH_TOKEN"),
        (("--follow", "x", "--no-auth"), {}, "asks for a token: leave out --no-auth"),
        (("none.toml", "--project", "/p"), {}, "cannot read none.toml"),
        ((), {}, "give one of these"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    head: Head, arguments: tuple[str, ...], changes: dict[str, str], words: str
) -> None:
    code, out, err = head.run(*arguments, **changes)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_head_without_an_agent_is_told_from_one_that_refuses() -> None:
    def refuse(**job: object) -> str:
        raise RuntimeError("Request failed with status code 500: No available agent to submit job.")

    client = SimpleNamespace(submit_job=refuse)
    with pytest.raises(InputError, match="--dashboard-agent-listen-port=0"):
        submit(client, Job(name="j", command=("true",), packages=()))


class _TwoMachines(http.server.BaseHTTPRequestHandler):
    """A dashboard that answers as Ray's does, of two machines, and takes no job."""

    def do_GET(self) -> None:
        answers = {
            "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": ""},
            "/nodes?view=hostNameList": {"data": {"hostNameList": ["one", "two"]}},
        }
        answer = answers.get(self.path)
        self.send_response(200 if answer else 500)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_PUT = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("project", "warned"), [("/p", True), ("file:///p", True), ("s3://b/p", False)]
)
def test_a_path_on_several_machines_gets_a_warning(
    sweep_file: Callable[..., Path], project: str, warned: bool
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _TwoMachines)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        head = Head(url=f"http://127.0.0.1:{server.server_port}", token="none")
        code, _, err = head.run(sweep_file(), "--project", project)
    finally:
        server.shutdown()
        server.server_close()
    *before, last = err.splitlines()
    assert (code, "does not take the job" in last) == (2, True)
    warnings = [line for line in before if "warning" in line]
    wanted = f"--project {project} must be on a file system that all 2"
    assert [wanted in line for line in warnings] == [True] * warned


@pytest.mark.slow
def test_a_cluster_names_its_machines(head: Head) -> None:
    token = Token(value=head.token, source="the tests")
    wait(lambda: hosts(head.url, token) == [socket.gethostname()])  # once it knows its first node
    assert hosts(head.url, Token(value="wrong", source="the tests")) == []
