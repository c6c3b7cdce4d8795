"""A sweep on a node of several GPUs, one of which fails whatever runs on it. There are none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.project import Project
from orchestrator.storage import LocalStorage
from tests.faults.processes import Cluster, Steps, environment

pytestmark = pytest.mark.slow

GPUS = 4
SWEEP = """
name = "gpus"
trainer = "simulated"
recipe = "llama-adamw"
budgets = [1e16, 1e17]
sizes = 4
[shapes]
aspect = 64
head_width = 32
context = 1024
width_multiple = 32
[simulated]
seconds = 1.0
gpus = 1.0
[limits]
retries = 0
"""


@pytest.fixture
def node(steps: Steps) -> Iterator[Cluster]:
    """A head, and one node of fake GPUs."""
    cluster = Cluster(steps.directory, FAULTS_BAD_GPU="-1")  # the first of raylets.py
    try:
        cluster.add(GPUS, GPUS)
        yield cluster
    finally:
        cluster.end()


def test_one_bad_gpu_of_a_node_costs_no_trial_and_is_named(
    node: Cluster, steps: Steps, tmp_path: Path
) -> None:
    """Though no trial that raises is tried again; the end does not wait for the GPU."""
    (tmp_path / "sweep.toml").write_text(SWEEP)
    command = [sys.executable, "-P", "-m", "orchestrator", "run", str(tmp_path / "sweep.toml")]
    command += ["--project", str(tmp_path / "project"), "--address", node.address, "--json"]
    done = subprocess.run(
        command,
        env=environment(steps.directory, **node.environment),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["complete"], data["failed"]) == (data["trials"], 0)
    assert re.search(r"GPU -1 of \S+ is not used until \d\d:\d\d UTC", done.stderr)
    assert re.search(r"GPU -1 of \S+ ended \d trials?: have it checked .*ECC", done.stderr)
    attempts = Project(LocalStorage(tmp_path / "project")).attempts.all()
    assert attempts
    assert {attempt.kind for attempt in attempts} == {"raised"}
    assert all(str(attempt.error).endswith("(GPU -1)") for attempt in attempts)
