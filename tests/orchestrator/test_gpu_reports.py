"""Nodes that say which GPUs they have: asked in tasks of a real Ray, once each."""

import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from cluster.nvidia import GpuReport
from orchestrator import gpu_reports
from orchestrator.connection import machines, nodes
from orchestrator.gpu_reports import GpuReports

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import tests
PATIENCE = 120.0


@pytest.fixture
def gpu_node(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The one node of the tests' Ray, as if it had told Ray of four A100s."""
    (node,) = nodes()
    resources = node["Resources"] | {"GPU": 4.0, "accelerator_type:A100": 1.0}
    found = node | {"Resources": resources}
    monkeypatch.setattr("orchestrator.connection.nodes", lambda: [found])
    return found


def _with_driver(directory: Path, answer: str) -> GpuReport | None:
    """What a node reports whose programs are those in the directory; made anew in each task."""
    import os

    from cluster.nvidia import gpu_report

    program = directory / "nvidia-smi"
    program.write_text(f"#!{sys.executable} -S\nprint({answer!r})\n")
    program.chmod(0o755)
    with (directory / "asked").open("a") as asked:
        asked.write("x")
    before = os.environ["PATH"]
    os.environ["PATH"] = str(directory)
    try:
        return gpu_report()
    finally:
        os.environ["PATH"] = before


def test_a_node_is_asked_once_and_known_from_then_on(
    gpu_node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says A100, which is taken for the one of 40 GB; the node has the one of 80."""
    from functools import partial

    report = partial(_with_driver, tmp_path, "0, NVIDIA A100-SXM4-80GB, 580.65.06, Default, 81920")
    monkeypatch.setattr(gpu_reports, "gpu_report", lambda: report())
    reports = GpuReports()
    found = machines(reports, wait=PATIENCE)
    assert [node.gpu.name for node in found.nodes] == ["A100 80GB"]
    assert found.nodes[0].reported
    assert machines(reports) == machines(reports, wait=PATIENCE) == found
    assert (tmp_path / "asked").read_text() == "x"


def test_a_node_that_cannot_answer_is_taken_for_what_ray_says(
    gpu_node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> GpuReport:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(gpu_reports, "gpu_report", broken)
    found = machines(GpuReports(), wait=PATIENCE)
    assert [(node.gpu.name, node.reported) for node in found.nodes] == [("A100 40GB", False)]


def test_nodes_without_gpus_and_dead_ones_are_not_asked(ray_session: None) -> None:
    """No task is even made: nothing is waited for."""
    (node,) = nodes()
    cores = node | {"Resources": {"CPU": 2.0}}
    dead = node | {"Alive": False, "Resources": {"GPU": 8.0}}
    assert GpuReports().update([cores, dead], wait=PATIENCE) == {}


def test_an_answer_that_is_late_is_taken_up_when_it_comes(
    gpu_node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"

    def late() -> GpuReport:
        import time

        while not gate.exists():
            time.sleep(0.05)
        return GpuReport(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * 2**20, mps=True)

    monkeypatch.setattr(gpu_reports, "gpu_report", late)
    reports = GpuReports()
    assert machines(reports).nodes[0].gpu.name == "A100 40GB"
    gate.touch()
    found = machines(reports, wait=PATIENCE)
    assert (found.nodes[0].gpu.name, found.nodes[0].mps) == ("H100 SXM", True)
