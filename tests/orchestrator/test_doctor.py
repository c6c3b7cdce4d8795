"""What doctor prints, of this machine and of a cluster's nodes, and how it exits."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster import nvidia
from orchestrator import doctor, gpu_checks
from orchestrator.checks import Check
from orchestrator.doctor import Machine, Report, agreement, show
from tests.faults.processes import Cluster

Run = Callable[..., tuple[int, str, str]]

CHECKS = (
    Check.ok("versions", "Python 3.11.7, isoflop 0.1.0, torch 2.13.0, ray 2.60.0, mlflow 3.17.2"),
    Check.failure(
        "driver",
        "torch sees no GPU: driver 550.54.15 (CUDA up to 12.4), torch 2.13.0 for CUDA 13.0",
        "install driver 580 or newer, or a torch for CUDA 12",
    ),
    Check.warning(
        "clock of the storage",
        "29 s ahead of this machine's: times in the ledger mislead",
        "synchronise the clocks (chrony or systemd-timesyncd)",
    ),
)
REPORT = Report(machines=(Machine(name="this machine", checks=CHECKS),))


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_machine_on_which_a_sweep_runs(isoflop: Run, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for arguments in ((project,), ("--project", project)):
        code, out, err = isoflop("doctor", *arguments, "--json")
        found = json.loads(out)
        assert (code, err) == (0, "")
        (machine,) = found["machines"]
        names = {check["name"]: check for check in machine["checks"]}
        assert {"versions", "token", "project", "MLflow", "GPUs", "memory", "disk"} < set(names)
        assert names["project"]["value"] == f"{project}: conditional writes work"
        assert all(set(c) == {"name", "status", "value", "remedy"} for c in machine["checks"])
    assert not project.exists()


def test_what_would_stop_a_sweep_is_exit_code_1_and_has_a_remedy(
    isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "9" * 90)
    code, out, _ = isoflop("doctor", tmp_path / "file")
    assert code == 1
    assert f"chmod 600 {token}" in out
    assert "set RAY_TMPDIR to a short path" in out
    assert "2 failures, 1 warning: a failure would stop a sweep" in out
    assert str(tmp_path / "file") in out


def test_warnings_alone_are_exit_code_0(
    isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.checks, "disk", lambda: Check.warning("disk", "x", "set TMPDIR"))
    code, out, _ = isoflop("doctor", "--tracking-uri", "http://127.0.0.1:9")
    assert code == 0
    assert "2 warnings: nothing would stop a sweep" in out


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has GPUs")
def test_a_machine_with_nvidia_smi_and_no_gpu_gets_a_warning(
    isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep runs on its cores."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, _ = isoflop("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["machines"][0]["checks"]}
    assert code == 0
    assert checks["driver"]["status"] == "warning"
    assert "torch sees no GPU" in checks["driver"]["value"]
    offered = {check.name: check for check in gpu_checks.gpu_checks("torch", 1)}
    assert offered["driver"].status == "failure"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "--project", "b"), "give one of them"),
        (("ftp://x/y",), "no storage is called ftp://"),
        (("--address", "127.0.0.1:9"), "no Ray cluster answers at 127.0.0.1:9"),
        (("--address", "ray://x:10001"), "is a Ray client's"),
    ],
)
def test_bad_input_is_exit_code_2(isoflop: Run, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = isoflop("doctor", *arguments)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    show(Console(file=out, width=width), REPORT)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(line.split()) for line in lines)
    for check in CHECKS:
        assert check.name in text
        assert not check.remedy or f"→ {check.remedy}" in text
    assert "1 failure, 1 warning: a failure would stop a sweep" in text
    assert any(line.startswith("FAILURE  driver") for line in lines)


def test_nodes_that_differ_in_a_version_are_named() -> None:
    ours = dict.fromkeys(doctor.SHARED, "1")
    assert agreement(ours, ours).status == "ok"
    check = agreement(ours | {"torch": "2"}, ours)
    assert (check.status, check.value) == ("warning", "torch 2, here 1")
    check = agreement(ours | {"isoflop sources": "2", "torch": "2"}, ours)
    assert (check.status, check.value) == ("failure", "isoflop sources 2, here 1; torch 2, here 1")
    assert "isoflop submit" in check.remedy


def test_a_driver_that_hangs_does_not_hang_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both nvidia-smi and torch wait for it for ever."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nsleep 600\n")
    smi.chmod(0o755)
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "SMI_SECONDS", 0.5)
    monkeypatch.setattr(gpu_checks, "_device_files", lambda: True)
    probe = gpu_checks.probe
    monkeypatch.setattr(gpu_checks, "probe", lambda use, **rest: probe(use, seconds=10, **rest))
    found = {check.name: check for check in doctor.examine().machines[0].checks}
    assert found["driver"].status == "failure"
    assert "did not end within 10 s" in found["driver"].value


@pytest.mark.slow
def test_every_node_of_a_cluster_is_asked(tmp_path: Path) -> None:
    """A head, and two nodes, one of which claims two GPUs that it does not have."""
    cluster = Cluster(tmp_path)
    try:
        cluster.add(2)
        cluster.add(2, gpus=2)
        project = tmp_path / "project"
        project.mkdir()
        command = [sys.executable, "-P", "-m", "orchestrator", "doctor", str(project), "--json"]
        done = subprocess.run(
            [*command, "--address", cluster.address],
            env={**os.environ, **cluster.environment},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    finally:
        cluster.end()
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    here, *nodes = found["machines"]
    assert here["name"] == "this machine"
    assert len(nodes) == 3
    bad = []
    for node in nodes:
        checks = {check["name"]: check for check in node["checks"]}
        assert {"versions", "project", "clock", "memory", "disk"} <= set(checks)
        others = [c for name, c in checks.items() if name != "driver"]
        assert [c for c in others if c["status"] == "failure"] == []
        assert checks["project"]["value"] == f"sees {project}, and may write"
        bad += [checks["driver"]] if "driver" in checks else []
    (driver,) = bad
    assert driver["status"] == "failure"
    assert "torch sees no GPU" in driver["value"]
    assert found["failures"] == 1
    assert list(project.iterdir()) == []
