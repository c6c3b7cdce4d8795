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
PROGRAM = """
import json, os, sys, time
if os.environ["CUDA_VISIBLE_DEVICES"] == "0":  # the one that Ray gives first
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
time.sleep(1)
print(json.dumps({"loss": 3.0, "tokens": int(sys.argv[1])}))
"""
SWEEP = """
name = "gpus"
trainer = "command"
corpus = {kind = "declared", name = "x", version = "1", vocabulary = 50, tokens = 9_000_000_000}
[[budgets]]
flops = 1e11
widths = [64, 80, 96, 112, 128, 144]
[command]
run = ["{python}", "train.py", "{tokens}", "{width} {steps} {batch_tokens}"]
files = ["train.py"]
gpus = 1.0
[limits]
retries = 0
"""


@pytest.fixture
def node(steps: Steps) -> Iterator[Cluster]:
    """A head, and one node of fake GPUs."""
    cluster = Cluster(steps.directory)
    try:
        cluster.add(GPUS, GPUS)
        yield cluster
    finally:
        cluster.end()


def test_one_bad_gpu_of_a_node_costs_no_trial_and_is_named(
    node: Cluster, steps: Steps, tmp_path: Path
) -> None:
    """Though no trial that raises is tried again; the end does not wait for the GPU."""
    (tmp_path / "train.py").write_text(PROGRAM)
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
    assert re.search(r"GPU 0 of \S+ is not used until \d\d:\d\d UTC", done.stderr)
    assert re.search(r"GPU 0 of \S+ ended \d trials?: have it checked .*ECC", done.stderr)
    attempts = Project(LocalStorage(tmp_path / "project")).attempts.all()
    assert attempts
    assert {attempt.kind for attempt in attempts} == {"raised"}
    assert all(str(attempt.error).endswith("(GPU 0)") for attempt in attempts)
