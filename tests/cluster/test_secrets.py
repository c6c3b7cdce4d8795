"""Secrets on a cluster: a sweep that needs a token is run by a real Ray, and nobody else sees it.

The directory of that Ray is made by a manifest's own line, on a machine with another user.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from orchestrator.project import open_project
from tests.cluster.attacks import LIST, MOVE, READ, WRITE, is_refused
from tests.cluster.heads import Head, running_head
from tests.strangers import needs_stranger
from tests.waiting import wait

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ONPREMISE = yaml.safe_load((ROOT / "cluster/launcher/onpremise.yaml").read_text())
TOKEN, PASSWORD, OPTION = "t0ken-of-the-team", "passw0rd-of-mlflow", "0ption-of-submit"
SECONDS = 600.0
"""For a sweep of fifteen short programs, on a machine that does much else."""


@dataclass(frozen=True, kw_only=True)
class Private:
    """A head, and the private directory that its files are below."""

    head: Head
    directory: Path

    @property
    def session(self) -> Path:
        return (self.directory / "ray/session_latest").resolve()


@pytest.fixture(scope="module")
def private() -> Iterator[Private]:
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as shared:
        Path(shared).chmod(0o1777)
        (line,) = (text for text in ONPREMISE["head_start_ray_commands"] if "mkdir" in text)
        subprocess.run(["bash", "-c", line.replace("/tmp/", f"{shared}/")], check=True)
        (directory,) = Path(shared).iterdir()
        variables = {"TEAM_TOKEN": TOKEN, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        with running_head(directory, **variables) as head:
            yield Private(head=head, directory=directory)


PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path

width, tokens, steps = map(int, sys.argv[1:4])
token = os.environ["TEAM_TOKEN"]
Path(sys.argv[4]).write_text(hashlib.sha256(token.encode()).hexdigest())
print("logging in with", token)
print("no such user:", token, file=sys.stderr)
for shown in Path("/proc").glob("[0-9]*/cmdline"):
    try:
        assert token.encode() not in shown.read_bytes(), "the list of processes has the token"
    except OSError:
        pass  # it has ended
# A law whose optimum is a width between those that are trained.
loss = 1.5 + 7.06 / (24 * width**2) ** 0.34 + 10 / tokens**0.34
print(json.dumps({"step": steps, "train_loss": loss}))
print(json.dumps({"loss": loss, "tokens": tokens, "device": token}))
"""
SWEEP = """
name = "own"
trainer = "command"
budgets = [
    { flops = 1e9, widths = [12, 16, 20, 24, 28] },
    { flops = 2e9, widths = [12, 16, 20, 24, 28] },
    { flops = 4e9, widths = [12, 16, 20, 24, 28] },
]
[corpus]
kind = "declared"
name = "x"
version = "1"
vocabulary = 50
tokens = 9_000_000_000
[command]
run = ["{python}", "train.py", "{width}", "{tokens}", "{steps}", "SEEN"]
files = ["train.py"]
env_from = ["TEAM_TOKEN"]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep that needs the token, alone in its directory."""
    directory = tmp_path / "sweeps"
    directory.mkdir()
    (directory / "train.py").write_text(PROGRAM)
    path = directory / "sweep.toml"
    path.write_text(SWEEP.replace("SEEN", str(tmp_path / "seen")))
    return path


def _files_with(text: str, *places: Path) -> list[str]:
    """Files below these places, or these files, in which the text is, by their bytes or names."""
    hits = []
    for place in places:
        for path in [place, *place.rglob("*")]:
            if path.is_file() and (text.encode() in path.read_bytes() or text in path.name):
                hits.append(str(path))
    return hits


def test_a_token_reaches_its_program_and_is_found_nowhere(
    private: Private, sweep: Path, tmp_path: Path
) -> None:
    """Not in plans, rows, logs, next.toml, MLflow, Ray's files or the list of processes."""
    head, project = private.head, tmp_path / "project"
    for option, value in (
        ("--tracking-uri", f"http://me:{OPTION}@127.0.0.1:9"),
        ("--env", f"HF_TOKEN={OPTION}"),
        ("--env", f"INDEX=https://me:{OPTION}@127.0.0.1:9"),
        ("--pip", f"https://{OPTION}@127.0.0.1:9/x.whl"),
    ):
        code, out, err = head.run(sweep, "--project", project, option, value)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "the list of processes could read it" in err
        assert OPTION not in err
    code, out, err = head.run(sweep, "--project", project, "--no-wait")
    assert code == 0, err
    job = out.strip()
    wait(lambda: head.status(job) not in ("PENDING", "RUNNING"), SECONDS, f"for job {job}")
    code, log, err = head.run("--follow", job)
    assert code == 0, log + err

    # It was there, and the grep would find it.
    assert (tmp_path / "seen").read_text() == hashlib.sha256(TOKEN.encode()).hexdigest()
    rows = open_project(project).ledger.read().to_pylist()
    assert [row["device"] for row in rows] == ["***"] * 15
    assert TOKEN not in str(rows)  # whose files are compressed
    for name in ("plans/own.json", "plans/own.toml", "next.toml"):
        assert "TEAM_TOKEN" in (project / name).read_text()
    assert (project / "mlflow.db").stat().st_size
    assert _files_with("logging in with ***", project)
    assert _files_with("no such user: ***", project)
    assert _files_with(job, private.session)
    for secret in (TOKEN, PASSWORD, OPTION):
        assert secret not in log + err
        assert _files_with(secret, project, private.directory) == []


@needs_stranger
def test_another_user_cannot_touch_a_real_rays_files(private: Private) -> None:
    """What Ray leaves open is closed by the directory above it, and by nothing else."""
    job = private.head.submit("print('done')")
    wait(lambda: private.head.status(job) == "SUCCEEDED", SECONDS, f"for job {job}")
    session, planted = private.session, private.session / "planted"
    assert is_refused(LIST, session)
    assert is_refused(WRITE, planted)
    assert is_refused(READ, session / "logs/gcs_server.out")
    assert is_refused(MOVE, session / "runtime_resources")
    private.directory.chmod(0o755)
    try:  # if this is refused, Ray closes its directory by itself, and the manifests need not
        assert not is_refused(WRITE, planted)
    finally:
        private.directory.chmod(0o700)
    assert planted.read_text() == "theirs"
